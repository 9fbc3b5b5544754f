"""The fold's Trainer: its schedule, its scaler, and where it stops."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import GradScalerKwargs
from torch.utils.data import DataLoader
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from vqa.core.errors import UserError, run_main
from vqa.training.callbacks import FrozenWeightsCheck, SWACallback
from vqa.training.checkpointing import COMPLETE, CheckpointMarkerCallback
from vqa.training.dataset import SetEpochCallback, TrainDataset
from vqa.training.loss import MAX_NON_FINITE, FiniteLossCheck
from vqa.training.trainer import INITIAL_SCALE


def optimizer(rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("begin", [0.5, 51])
def test_the_learning_rate_is_held_from_the_step_at_which_swa_begins(make_trainer, begin):
    trainer = make_trainer(learning_rate=2e-4, swa_lr=5e-5, swa_start=begin, warmup_steps=10)
    ours, usual = optimizer(2e-4), optimizer(2e-4)
    scheduler = trainer.create_scheduler(100, ours)
    cosine = get_cosine_schedule_with_warmup(usual, 10, 100)
    for step in range(1, 101):
        wanted = usual.param_groups[0]["lr"] if step < 51 else 5e-5
        assert ours.param_groups[0]["lr"] == pytest.approx(wanted, abs=1e-12), step
        for one, schedule in ((ours, scheduler), (usual, cosine)):
            one.step()
            schedule.step()


def test_swa_averages_the_steps_that_have_its_learning_rate_also_after_skipped_steps(make_trainer):
    trainer, ours, swa = make_trainer(swa_lr=5e-5, swa_start=0.5), optimizer(2e-4), SWACallback(0.5)
    scheduler, state = trainer.create_scheduler(20, ours), SimpleNamespace(max_steps=20)
    for step in range(1, 21):
        skipped = step in (1, 2)  # by the fp16 scaler
        held, updates = ours.param_groups[0]["lr"] == pytest.approx(5e-5, abs=1e-12), swa.updates
        if not skipped:
            ours.step()
            scheduler.step()
        scaled = SimpleNamespace(step_was_skipped=skipped)
        swa.on_step_end(None, state, None, model=torch.nn.Linear(1, 1), optimizer=scaled)
        assert (swa.updates > updates) == held, step
    assert swa.updates == 8


def test_the_data_seed_may_be_zero(make_trainer):
    seeds = [make_trainer(data_seed=seed, seed=42)._get_train_sampler().seed for seed in (0, 7, None)]
    assert seeds == [0, 7, 42]


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run_with_the_remedy(make_trainer, monkeypatch):
    trainer, seen = make_trainer(max_steps=50), []

    def broken(model, batch, keep=1):
        seen.append(batch["ids"])
        return torch.full((4, keep, 2000), float("nan"), requires_grad=True)

    monkeypatch.setattr("vqa.training.trainer.answer_logits", broken)
    with pytest.raises(UserError, match=f"{MAX_NON_FINITE} times in a row, the last time for row_00") as error:
        trainer.train()
    assert len(seen) == MAX_NON_FINITE and "Lower the learning rate" in str(error.value)


def test_a_single_loss_that_is_not_finite_does_not():
    check = FiniteLossCheck()
    for value in [float("nan")] * (MAX_NON_FINITE - 1) + [1.0] + [float("inf")] * (MAX_NON_FINITE - 1):
        check.add(torch.tensor(value), ["row"])
        check.check(step=1)
    check.add(torch.tensor(float("nan")), ["row"])
    with pytest.raises(UserError, match="step 2: the loss was not finite"):
        check.check(step=2)


@pytest.mark.slow
def test_losses_are_read_from_the_gpu_once_an_optimiser_step(make_trainer, monkeypatch):
    """Reading a value makes the host wait for the GPU; here, the check of a step's losses is what reads them."""
    trainer, calls = make_trainer(max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1), []
    check = trainer.loss_check.check
    monkeypatch.setattr(
        trainer.loss_check, "check", lambda step: (calls.append(len(trainer.loss_check.pending)), check(step))
    )
    trainer.train()
    assert calls == [2, 2, 2] and not trainer.loss_check.pending


def test_the_scaler_starts_where_the_first_steps_are_not_lost(make_trainer):
    handlers = make_trainer()._build_accelerator_args()["kwargs_handlers"]
    assert [h.init_scale for h in handlers if isinstance(h, GradScalerKwargs)] == [INITIAL_SCALE]
    assert INITIAL_SCALE < torch.amp.GradScaler("cpu").get_scale()


def test_skipped_steps_are_those_at_which_the_schedule_stood_still(make_trainer):
    trainer = make_trainer()
    trainer.optimizer = optimizer(1e-3)
    trainer.lr_scheduler = trainer.create_scheduler(100, trainer.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    parameter = trainer.optimizer.param_groups[0]["params"][0]
    for step in range(10):
        loss = (parameter * (float("inf") if step in (0, 1, 6) else 1.0)).sum()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(trainer.optimizer)
        scaler.update()
        if scaler.get_scale() >= before:  # as accelerate tells whether a step was taken
            trainer.lr_scheduler.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
    assert trainer.skipped_steps() == 3


def test_choices_are_shuffled_anew_each_epoch_in_workers_that_outlive_it(rows):
    dataset = TrainDataset(rows[:6], True, 42)
    dataset.epoch.share_memory_()  # as train_fold.py does where workers persist
    loader = DataLoader(dataset, None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0.0, 1.0, 0.0):
        SetEpochCallback(dataset).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        orders.append([row["permutation"] for row in loader])
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders[0])


@pytest.mark.slow
def test_a_run_that_changed_the_base_fails(make_trainer):
    trainer = make_trainer([FrozenWeightsCheck()], max_steps=1)
    trainer.train()

    class Careless(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_input_embeddings().weight[0, 0] += 1.0

    trainer.add_callback(Careless())
    with pytest.raises(RuntimeError, match="changed 1 frozen weights of the base model, first .*embed_tokens"):
        trainer.train()


def test_gpu_memory_that_runs_out_is_one_line(capsys):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(SystemExit) as stop:
        run_main(out_of_memory)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--per_device_train_batch_size 2" in error


@pytest.mark.slow
def test_a_checkpoint_is_not_whole_while_it_is_written_anew(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer([CheckpointMarkerCallback()], max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / COMPLETE).is_file() and json.loads((folder / "trainer_state.json").read_text())

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint(trainer.model, None)
    assert not (folder / COMPLETE).exists()
