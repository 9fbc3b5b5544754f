"""EMA and SWA against torch's own averaging functions."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import TrainerControl

from vqa.training.callbacks import EarlyStoppingCallback, EMACallback, SWACallback, trainable_parameters

STEPS = 200


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model[0].bias.requires_grad_(False)
    return model


def drift(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)


def run(callback, model, oracle=None, skipped=()):
    """STEPS optimiser steps, those in `skipped` without effect; the oracle is updated at each that counts."""
    state = SimpleNamespace(global_step=0, max_steps=STEPS)
    callback.on_train_begin(None, state, None, model=model)
    for step in range(1, STEPS + 1):
        state.global_step = step
        if step not in skipped:
            drift(model)
        optimizer = SimpleNamespace(step_was_skipped=step in skipped)
        callback.on_step_end(None, state, None, model=model, optimizer=optimizer)
        if oracle is not None and step not in skipped and callback.is_due(STEPS):
            oracle.update_parameters(model)


def assert_equal_to(callback, oracle):
    wanted = {name: p for name, p in oracle.module.named_parameters() if p.requires_grad}
    assert set(wanted) == set(callback.average)
    for name, parameter in wanted.items():
        assert torch.allclose(callback.average[name], parameter, atol=1e-6, rtol=0), name


def test_swa_is_torchs_equal_mean():
    model, callback = small_model(), SWACallback(start=0.25)
    oracle = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    run(callback, model, oracle)
    assert callback.updates == STEPS * 3 // 4
    assert_equal_to(callback, oracle)


@pytest.mark.parametrize(("start", "every", "wanted"), [(150, 1, range(150, 201)), (0.5, 7, range(101, 201, 7))])
def test_swa_begins_at_a_step_and_takes_every_nth(start, every, wanted):
    model, callback, seen = small_model(), SWACallback(start, every), []
    average = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    update = average.update_parameters
    average.update_parameters = lambda model: (seen.append(callback.updates), update(model))
    run(callback, model, average)
    assert callback.updates == len(wanted) == len(seen)
    due = []
    for callback.steps in range(1, STEPS + 1):
        due += [callback.steps] * callback.is_due(STEPS)
    assert due == list(wanted)
    assert_equal_to(callback, average)


def test_ema_is_torchs_with_the_warmed_up_decay():
    model, callback = small_model(), EMACallback(decay=0.9)

    def warmed_up(averaged, current, count):
        decay = min(0.9, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    oracle = AveragedModel(model, multi_avg_fn=warmed_up)
    run(callback, model, oracle)
    assert callback.updates == STEPS
    assert_equal_to(callback, oracle)


@pytest.mark.parametrize("callback", [EMACallback(0.99), SWACallback(0.0)])
def test_skipped_steps_do_not_count(callback):
    model = small_model()
    oracle = AveragedModel(
        model, avg_fn=lambda average, current, n: average + callback_weight(callback, n) * (current - average)
    )
    run(callback, model, oracle, skipped={1, 2, 50, 200})
    assert callback.updates == STEPS - 4
    assert_equal_to(callback, oracle)


def callback_weight(callback, count):
    count = int(count)
    return 1 / (count + 1) if callback.name == "swa" else 1 - min(callback.decay, (1 + count) / (10 + count))


def test_the_initial_weights_leave_the_average_at_the_first_step():
    model, callback = small_model(), EMACallback(decay=0.9999)
    run(callback, model)
    start = small_model().state_dict()
    for name, parameter in trainable_parameters(model):
        moved = (parameter - start[name]).norm()
        assert (callback.average[name] - parameter).norm() < 0.9 * moved, "the average follows the weights"


def test_only_trainable_parameters_are_averaged_in_float32_whatever_they_are_in():
    model, callback = small_model().to(torch.bfloat16), EMACallback()
    callback.update(model)
    assert "0.bias" not in callback.average and len(callback.average) == 3
    assert {tensor.dtype for tensor in callback.average.values()} == {torch.float32}
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    callback = EMACallback(decay=0.999)
    callback.update(model)
    callback.updates = 100_000  # warmed up
    with torch.no_grad():
        model[1].weight.fill_(1.5)
    for _ in range(1000):
        callback.update(model)
    # 1.5 - 0.5 * 0.999 ** 1000; in bfloat16 the average would stand still at 1
    assert callback.average["1.weight"].mean().item() == pytest.approx(1.3162, abs=1e-3)


def test_the_model_holds_the_average_within_the_block_and_its_own_weights_after():
    model, callback = small_model(), SWACallback(0.0)
    run(callback, model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    average = {name: tensor.clone() for name, tensor in callback.average.items()}
    with callback.average_parameters(model):
        held = dict(model.named_parameters())
        assert all(torch.equal(held[name], average[name]) for name in average)
        assert not torch.equal(held["1.weight"], before["1.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(callback.average[name], average[name]) for name in average)


def test_an_average_survives_a_checkpoint(tmp_path):
    model, callback = small_model(), EMACallback()
    run(callback, model)
    (tmp_path / f"checkpoint-{STEPS}").mkdir()
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    state = SimpleNamespace(global_step=STEPS, max_steps=STEPS, is_world_process_zero=True)
    callback.on_save(args, state, None)
    fresh = EMACallback()
    fresh.on_train_begin(args, state, None, model=model)
    assert (fresh.updates, fresh.steps) == (callback.updates, callback.steps)
    assert all(torch.equal(fresh.average[name], tensor) for name, tensor in callback.average.items())


def validations(*scores: dict) -> list[dict]:
    return [{"loss": 1.0}, *({f"eval_{name}": value for name, value in values.items()} for values in scores)]


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ([], False),
        ([{"log_loss": 0.9}], False),
        ([{"log_loss": 0.9}, {"log_loss": 0.95}], False),
        ([{"log_loss": 0.9}, {"log_loss": 0.95}, {"log_loss": 0.9}], True),
        ([{"log_loss": 0.9}, {"log_loss": 0.95}, {"log_loss": 0.89}], False),
        ([{"log_loss": 0.9}, {"log_loss": 1.0, "ema_log_loss": 0.8}, {"log_loss": 1.1, "ema_log_loss": 0.7}], False),
        ([{"log_loss": 0.9, "annotator_log_loss": 0.9}] + 2 * [{"log_loss": 1.0, "annotator_log_loss": 0.1}], True),
    ],
)
@pytest.mark.parametrize("event", ["on_evaluate", "on_train_begin"])
def test_a_run_stops_early_after_two_validations_without_a_better_score(scores, stops, event):
    """Also where it resumes: then it takes no further step."""
    args = SimpleNamespace(metric_for_best_model="log_loss", greater_is_better=False)
    control, state = TrainerControl(), SimpleNamespace(log_history=validations(*scores))
    getattr(EarlyStoppingCallback(2), event)(args, state, control)
    assert control.should_training_stop == stops
