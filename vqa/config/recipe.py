"""The recipe: transformers' TrainingArguments with this project's defaults and its own fields."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from vqa.config.arguments import arg
from vqa.core.dtypes import has_bf16
from vqa.core.errors import UserError

# transformers 5.23 and PEFT warn in every run that version 6 will rename `gradient_checkpointing`.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)

ROWS = 16  # of an optimiser step, by default

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # since transformers 5.23, and before


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' TrainingArguments with this recipe's defaults and further fields."""

    loss: str = arg(
        "token",
        "token: cross-entropy over the vocabulary at the answer's letter and the end of the turn, as in language "
        "modelling; letter: cross-entropy over the letters that the row offers, as in scoring.",
    )
    permutations_per_step: int = arg(
        1,
        "Show each row with this many permutations of its choices in one step: the one drawn and its rotations. With "
        "as many as there are choices, the answer is at every letter once. They share image and question, so they "
        "cost less than as many rows. The row's loss is their mean.",
    )
    consistency_weight: float = arg(
        0.0,
        "With permutations_per_step: add this times the KL divergence between the permutations' probabilities of the "
        "choices. 0: do not.",
    )
    ema_decay: float = arg(
        0.0, "Decay of the EMA of the adapter per optimiser step, with warm-up; for example 0.99. 0: no EMA, faster."
    )
    swa_start: float | None = arg(
        None, "Start of SWA: below 1, a fraction of the run (for example 0.5); otherwise a step. null: no SWA."
    )
    swa_every: int = arg(1, "Optimiser steps between two updates of the SWA average.")
    swa_lr: float | None = arg(None, "Constant learning rate after swa_start; null: keep the schedule.")
    early_stopping_patience: int | None = arg(
        None,
        "Stop after this many validations in a row without a better metric_for_best_model of any weights; null: train "
        "to the end. The best adapters are kept in either case.",
    )
    max_hours: float | None = arg(
        None,
        "Stop with a checkpoint before this many hours have passed. 11 leaves an hour for prediction in a notebook "
        "that is stopped after 12.",
    )
    output_dir: str = arg(None, "The fold's folder; by default checkpoints/demo/fold0 for args/demo/fold0.json.")
    num_train_epochs: float = arg(3.0, "Passes over the training rows.")
    learning_rate: float = arg(2e-4, "Peak learning rate: usual for QLoRA, ten times that of full fine-tuning.")
    vision_learning_rate: float | None = arg(
        None, "Peak learning rate of the adapter on the vision tower (lora_vision); null: learning_rate."
    )
    lr_scheduler_type: str = arg("cosine", "Schedule; cosine falls to zero at the end, so that the last steps settle.")
    warmup_steps: float = arg(0.05, "Warm-up steps; below 1, a fraction of the run.")
    effective_batch_size: int = arg(
        None, f"Rows of an optimiser step, on all GPUs together ({ROWS} if not given). It decides the result."
    )
    per_device_train_batch_size: int = arg(
        None, "Most rows that a GPU processes at once; null: auto_batch chooses. It decides memory and speed only."
    )
    gradient_accumulation_steps: int = arg(
        None,
        "For args files of release 0.1, without effective_batch_size: a step has this many times "
        "per_device_train_batch_size rows, on any number of GPUs. Otherwise it follows from the rows and the GPUs.",
    )
    per_device_eval_batch_size: int = arg(16, "Rows of a validation batch on each GPU.")
    auto_batch: bool = arg(
        True,
        "Split the rows of a step into micro-batches that suit this GPU, and halve them when memory runs out. Also "
        "turns gradient_checkpointing off where memory allows, unless it is set.",
    )
    train_sampling_strategy: str = arg(
        "group_by_length", "Random rows, sorted by length within a step, which saves padding; random: not sorted."
    )
    max_grad_norm: float = arg(1.0, "Clip gradients to this norm.")
    fp16: bool = arg(False, "Mixed precision in fp16, for GPUs without bf16 such as the T4.")
    gradient_checkpointing: bool | None = arg(
        None, "Recompute activations in the backward pass: less memory, a third slower. null: auto_batch decides."
    )
    eval_strategy: str = arg("epoch", "When to validate: epoch, steps (every eval_steps) or no.")
    save_strategy: str = arg(
        "epoch", "When to save a checkpoint to resume from: epoch, steps (every save_steps) or no."
    )
    save_total_limit: int | None = arg(
        2,
        "Checkpoints to keep, at least 2: one stays while the next is written. The best adapters are extra.",
    )
    logging_steps: float = arg(10, "Optimiser steps between two lines of the training log.")
    logging_nan_inf_filter: bool = arg(False, "Keep false: the log must show a loss that is not finite.")
    ddp_find_unused_parameters: bool | None = arg(
        False, "Keep false: every adapter weight is used in every step, and a search for unused ones costs time."
    )
    dataloader_num_workers: int = arg(0, "Processes that decode and resize images ahead of the GPU; 2 on a T4 host.")
    remove_unused_columns: bool = arg(False, "Keep false: the collator reads the columns of the rows.")
    resume_from_checkpoint: str | None = arg(None, "A checkpoint folder to resume from, or `auto` for the newest one.")
    seed: int = arg(42, "Seed of everything random.")
    full_determinism: bool = arg(False, "Give identical bytes in every run on a GPU, as on a CPU; slower.")
    metric_for_best_model: str = arg("log_loss", "Metric that selects the best adapter: log_loss or accuracy.")
    report_to: str = arg("none", "Where to log: none, tensorboard, wandb or trackio.")

    def __post_init__(self):
        if torch.cuda.is_available() and not (self.fp16 or self.bf16 or self.use_cpu):
            self.bf16 = has_bf16()  # as model_dtype chooses for the base: 16 bits need autocast
            self.fp16 = not self.bf16
        # Without this, several processes on a CPU would not find each other, and each would train alone.
        self.use_cpu |= "WORLD_SIZE" in os.environ and not torch.cuda.is_available()
        named = [name for name in CHECKPOINTING if hasattr(self, name)]
        self.wants_checkpointing = next((v for v in (getattr(self, name) for name in named) if v is not None), None)
        for name in named:  # non-reentrant: no input needs a gradient, so the vision tower gets none
            given = getattr(self, f"{name}_kwargs") or {}
            setattr(self, f"{name}_kwargs", {"use_reentrant": False} | given)
        self.most_rows_at_once = self.per_device_train_batch_size
        self.effective_batch_size = rows_of_step(vars(self))
        self.per_device_train_batch_size = self.gradient_accumulation_steps = 1  # until the processes are counted
        super().__post_init__()
        self.per_device_train_batch_size = self.micro_batch_sizes()[-1]
        self.gradient_accumulation_steps = self.rows_per_process() // self.per_device_train_batch_size
        self.dataloader_pin_memory &= torch.cuda.is_available()  # torch warns without a GPU

    def rows_per_process(self) -> int:
        """Rows of an optimiser step on each process. Raises UserError where they cannot be split evenly."""
        rows, processes = self.effective_batch_size, self.world_size
        if rows % processes:
            possible = [n for n in (rows - rows % processes, rows + -rows % processes) if n]
            raise UserError(
                f"the {rows} rows of an optimiser step cannot be split evenly over {processes} GPUs. Set "
                f"effective_batch_size to {' or '.join(map(str, possible))}, or use another number of GPUs."
            )
        return rows // processes

    def micro_batch_sizes(self) -> list[int]:
        """The numbers of rows that a process may take through the model at once, ascending."""
        rows = self.rows_per_process()
        return [size for size in range(1, (self.most_rows_at_once or rows) + 1) if rows % size == 0]

    def set_checkpointing(self, on: bool) -> None:
        """Set it under both of its names; the Trainer reads the newer one where it exists."""
        for name in CHECKPOINTING:
            if hasattr(self, name):
                setattr(self, name, on)


def rows_of_step(values: Mapping) -> int:
    """Rows of an optimiser step by the fields of an args file of any release.

    Those of release 0.1 have no `effective_batch_size`. Their step has the product of the two other fields, which were
    8 and 2 by default.
    """
    rows, batch, accumulation = (
        values.get(name)
        for name in ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if rows is not None:
        return rows
    return ROWS if batch is accumulation is None else (batch or 8) * (accumulation or 2)
