"""train_fold.py's main, watched, in one process or in several; tests/test_processes.py starts it.

accelerate launch --config_file args/accelerate/cpu.yaml tests/jobs.py FOLDER     # FOLDER holds jobs.json
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import Trainer, TrainingArguments

import train_fold
from vqa.core.errors import run_main
from vqa.training.callbacks import EMACallback, SWACallback

STEPS, DECAY, START = 200, 0.9, 0.25


@contextmanager
def swapped(place, name: str, value):
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def train(argv: list[str], record: Path) -> None:
    """Run train_fold.py's main. `record`.json: its exit code and the rows it trained on; beside it the averages."""
    seen, averages = [], {}

    class Watched(train_fold.FoldTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.extend([int(self.state.epoch or 0), *row] for row in zip(inputs["ids"], inputs["weight"].tolist()))
            return super().training_step(model, inputs, num_items_in_batch)

        def train(self, *args, **kwargs):
            result = super().train(*args, **kwargs)
            for callback in self.validator.weight_averages:
                averages[callback.name] = callback.average
            return result

    code = 0
    with swapped(train_fold, "FoldTrainer", Watched), swapped(sys, "argv", ["train_fold.py", *map(str, argv)]):
        try:
            run_main(train_fold.main)
        except SystemExit as stop:
            code = stop.code
    Path(f"{record}.json").write_text(json.dumps({"code": code, "rows": seen}))
    for name, average in averages.items():
        save_file(average, f"{record}.{name}.safetensors")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"x": torch.randn(5, generator=torch.Generator().manual_seed(index))}


class Squares(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return {"loss": self.second(self.first(x).tanh()).sub(1).square().mean()}


def distance_from_torch(folder: Path) -> dict[str, float]:
    """Largest difference between our averages and torch's after STEPS optimiser steps of two batches each.

    torch's averages are updated by a hook of the optimiser itself, so they know nothing of the Trainer's events.
    """
    model, ema, swa = Squares(), EMACallback(DECAY), SWACallback(START)

    def warmed_up(averaged, current, count):
        get_ema_multi_avg_fn(min(DECAY, (1 + int(count)) / (10 + int(count))))(averaged, current, count)

    oracles = {
        "ema": AveragedModel(model, multi_avg_fn=warmed_up),
        "swa": AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = []

    def after_step(*_):
        steps.append(1)
        oracles["ema"].update_parameters(model)
        if len(steps) > START * STEPS:
            oracles["swa"].update_parameters(model)

    optimizer.register_step_post_hook(after_step)
    args = TrainingArguments(
        str(folder / "small"), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, disable_tqdm=True,
        gradient_accumulation_steps=2, save_strategy="no", logging_strategy="no", report_to="none",
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    args.dataloader_pin_memory = False
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Trainer(model, args, train_dataset=Rows(), callbacks=[ema, swa], optimizers=(optimizer, schedule)).train()
    assert len(steps) == STEPS
    moved = (model.second.weight - Squares().second.weight).abs().max()
    distances = {"moved": moved.item(), "ema_to_weights": (ema.average["second.weight"] - model.second.weight)
                 .abs().max().item()}  # fmt: skip
    for callback in (ema, swa):
        wanted = {name: p for name, p in oracles[callback.name].module.named_parameters() if p.requires_grad}
        assert set(wanted) == set(callback.average)
        distances[callback.name] = max((callback.average[n] - p).abs().max().item() for n, p in wanted.items())
    return distances


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    written = set()

    def watch(event: str, args: tuple) -> None:
        wanted = event in ("os.mkdir", "os.rename") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if wanted and isinstance(args[0], (str, Path)) and "runs" in Path(args[0]).parts:
            written.add(str(args[0]))

    sys.addaudithook(watch)
    for name, argv in json.loads((folder / "jobs.json").read_text()).items():
        train(argv, folder / "records" / f"{name}.{rank}")
        PartialState().wait_for_everyone()
    record = {"written": sorted(written), "distances": distance_from_torch(folder)}
    (folder / "records" / f"all.{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    PartialState().destroy_process_group()
