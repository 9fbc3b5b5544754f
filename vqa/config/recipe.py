"""The recipe: transformers' TrainingArguments with this project's defaults and its own fields."""

import os
import warnings
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from vqa.config.arguments import arg
from vqa.core.compat import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from vqa.core.dtypes import has_bf16
from vqa.core.errors import UserError

# Every transformers from 5.20 on understands the name `gradient_checkpointing`; 5.23 says on each run, and PEFT once
# more, that it will be called otherwise in version 6.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)


CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # from transformers 5.23 on, and before


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' TrainingArguments with this recipe's defaults, and what it has no field for."""

    loss: str = arg(
        "token",
        "token: cross-entropy over the vocabulary at the answer's letter and the end of the turn, as in language "
        "modelling; letter: cross-entropy over the letters that the row offers, which is what is scored.",
    )
    ema_decay: float = arg(
        0.0, "Decay of the EMA of the adapter, per optimiser step, warmed up: 0.99, say. 0: none, which is quicker."
    )
    swa_start: float | None = arg(
        None, "Where SWA begins: below 1, after that share of the run (0.5, say); from 1 on, at that step. null: none."
    )
    swa_every: int = arg(1, "Steps between two weights that SWA averages.")
    swa_lr: float | None = arg(None, "Constant learning rate from SWA's beginning on; null keeps the schedule.")
    max_hours: float | None = arg(
        None,
        "Stop training with a checkpoint before so many hours have passed: 11 for a notebook that dies after 12 "
        "leaves an hour for prediction.",
    )
    output_dir: str | None = arg(None, "The fold's folder; args/demo/fold0.json gives checkpoints/demo/fold0.")
    num_train_epochs: float = arg(3.0, "Passes over the training rows.")
    learning_rate: float = arg(2e-4, "Peak learning rate: QLoRA's usual one; ten times that of full fine-tuning.")
    lr_scheduler_type: str = arg("cosine", "Falls to zero by the end: the last steps settle, as contests reward.")
    warmup_steps: float = arg(0.05, "Steps of warm-up; below 1, a share of the run.")
    per_device_train_batch_size: int = arg(8, "Rows a GPU takes at once, where auto_batch is off.")
    gradient_accumulation_steps: int = arg(2, "Batches an optimiser step; times the batch size: its rows.")
    per_device_eval_batch_size: int = arg(16, "Rows a GPU scores at once.")
    auto_batch: bool = arg(
        True,
        "Cut a step's rows (batch size times accumulation) into the micro-batches that suit this GPU; "
        "gradient_checkpointing is left out where memory allows, unless it is set. Out of memory, they get smaller.",
    )
    train_sampling_strategy: str = arg(
        "group_by_length", "Rows at random, those of a step sorted by length, which saves padding; random: not sorted."
    )
    max_grad_norm: float = arg(1.0, "Gradients are clipped to this norm.")
    fp16: bool = arg(False, "Mixed precision for GPUs before Ampere, such as the T4, which have no bf16.")
    gradient_checkpointing: bool | None = arg(
        None, "Recompute activations in the backward pass: memory for a third of speed. null: auto_batch decides."
    )
    eval_strategy: str = arg("epoch", "When to validate: epoch, steps (every eval_steps) or no.")
    save_strategy: str = arg(
        "epoch", "When to write a checkpoint to resume from: epoch, steps (every save_steps) or no."
    )
    save_total_limit: int | None = arg(
        2, "Checkpoints to keep, 2 or more: one has to last while the next is written. The best adapters are apart."
    )
    logging_steps: float = arg(10, "Optimiser steps between two lines of the training log.")
    logging_nan_inf_filter: bool = arg(False, "Stays false: a loss that is not finite is to be seen in the log.")
    ddp_find_unused_parameters: bool | None = arg(
        False, "Stays false: every adapter weight is used in every step, and looking for unused ones costs time."
    )
    dataloader_num_workers: int = arg(0, "Processes that decode and resize images ahead of the GPU; 2 on a T4 host.")
    remove_unused_columns: bool = arg(False, "Stays false: the collator reads the rows' own columns.")
    resume_from_checkpoint: str | None = arg(None, "A checkpoint folder to go on from, or `auto` for the newest.")
    seed: int = arg(42, "Seed of everything drawn at random; 42 by default.")
    full_determinism: bool = arg(False, "Give the same bytes in every run on a GPU too, as on a CPU; slower.")
    metric_for_best_model: str = arg("log_loss", "What chooses the best adapter: log_loss or accuracy, of letters.")
    report_to: str = arg("none", "Where to log: none, tensorboard, wandb, trackio.")

    def __post_init__(self):
        if torch.cuda.is_available() and not (self.fp16 or self.bf16 or self.use_cpu):
            self.bf16 = has_bf16()  # as model_dtype chooses for the base: 16 bits want autocast, and fp16 the scaler
            self.fp16 = not self.bf16
        # Without a GPU processes find each other only when told that the CPU is meant; each would train on its own.
        self.use_cpu |= "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
        named = [name for name in CHECKPOINTING if hasattr(self, name)]
        self.wants_checkpointing = next((v for v in (getattr(self, name) for name in named) if v is not None), None)
        for name in named:  # without re-entrance no input needs a gradient, so the vision tower gets none
            given = getattr(self, f"{name}_kwargs") or {}
            setattr(self, f"{name}_kwargs", {"use_reentrant": False} | given)
        super().__post_init__()
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns of it where there is no GPU

    def set_checkpointing(self, on: bool) -> None:
        """Under both of its names, since the Trainer reads the newer where there is one."""
        for name in CHECKPOINTING:
            if hasattr(self, name):
                setattr(self, name, on)


LOWEST = {"swa_start": 0, "swa_every": 1, "ema_decay": 0, "max_hours": 0, "lora_rank": 1, "image_size": 28}


# Fields of transformers' that would do nothing here, or harm, and why.
REFUSED = {
    "auto_find_batch_size": "averages and best adapters of the attempt that failed would stay",
    "label_smoothing_factor": "the loss is over the answer's tokens alone",
    "load_best_model_at_end": "the best adapters are kept apart, raw and averaged",
    "save_only_model": "no run could go on from such a checkpoint",
}


def check_recipe(values: dict) -> None:
    """Stop where fields contradict each other or this recipe."""
    for name, choices in (("loss", ("token", "letter")), ("metric_for_best_model", ("log_loss", "accuracy"))):
        if values[name] not in choices:
            raise UserError(f"{name} {values[name]!r} does not exist; it is {' or '.join(choices)}")
    for name, low in LOWEST.items():
        if values[name] is not None and values[name] < low:
            raise UserError(f"{name} is {values[name]}; it has to be {low} or more")
    if values["ema_decay"] >= 1:
        raise UserError(f"ema_decay is {values['ema_decay']}; it has to be below 1 (0.99), or 0 for no EMA")
    for name, why in REFUSED.items():
        if values[name]:
            raise UserError(f"{name} is not for this recipe: {why}; leave it out")
    check_reports(values["report_to"])
    if values["save_total_limit"] == 1:
        raise UserError("save_total_limit 1 deletes the last checkpoint before the next is whole; give 2 or more")
    if values["swa_lr"] is not None and values["swa_start"] is None:
        raise UserError("swa_lr is given but swa_start is null; say where SWA begins, or leave swa_lr out")
    if values["swa_lr"] is not None and values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"swa_lr needs a schedule by steps, and {values['lr_scheduler_type']} is none; use cosine")


def check_reports(report_to: str | list[str]) -> None:
    """Stop where a package that is to be reported to is unknown or not there."""
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to {name!r} does not exist; it is none, all or {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to {name} needs a package that is not here: pip install {name}")
