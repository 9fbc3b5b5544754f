"""The recipe: transformers' TrainingArguments with this project's defaults and its own fields."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import whoami
from transformers import Trainer, TrainingArguments, get_scheduler

from vqa.config.arguments import arg
from vqa.core.compat import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
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


LOWEST = {
    "swa_start": 0,
    "swa_every": 1,
    "ema_decay": 0,
    "max_hours": 0,
    "lora_rank": 1,
    "lora_alpha": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
    "lora_dropout": 0,
    "lora_first_layer": 0,
    "vision_learning_rate": 0,
    "image_size": 28,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "swa_lr": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "effective_batch_size": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "vision_cache_gb": 0,
    "max_train_rows": 1,
    "max_valid_rows": 1,
    "early_stopping_patience": 1,
    "pseudo_min_confidence": 0,
}
BELOW_ONE = {"ema_decay": "such as 0.99, or to 0 for no EMA", "lora_dropout": "such as 0.05, or to 0 for no dropout"}
CHOICES = {
    "loss": ("token", "letter"),
    "metric_for_best_model": ("log_loss", "accuracy"),
    "train_sampling_strategy": ("group_by_length", "random"),
}
# Fields of transformers that would do nothing or harm here, and why.
REFUSED = {
    "auto_find_batch_size": "averages and best adapters of the failed attempt would stay; auto_batch does this",
    "label_smoothing_factor": "the loss is over the answer's tokens alone",
    "load_best_model_at_end": "the best adapters, raw and averaged, are saved separately",
    "save_only_model": "no run can resume from such a checkpoint",
    "use_liger_kernel": "its kernels would replace the fused layers of vqa/modeling/fused_lora.py",
    "deepspeed": "several GPUs train with DDP: accelerate launch --config_file args/accelerate/two_gpus.yaml",
    "fsdp": "each GPU needs the complete model (docs/multi_gpu.md): accelerate launch without FSDP",
    "fsdp_config": "each GPU needs the complete model (docs/multi_gpu.md)",
    "remove_unused_columns": "the collator reads the columns of the rows",
}
# Optimisers of transformers that work on full weight matrices, not on an adapter's parameters.
FULL_WEIGHT_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo")


def check_recipe(values: dict) -> None:
    """Raise UserError where fields contradict each other or this recipe."""
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{name} {values[name]!r} does not exist. Set {' or '.join(choices)}.")
    for name, low in LOWEST.items():
        if values.get(name) is not None and not values[name] >= low:  # also where it is not a number
            raise UserError(f"{name} is {values[name]}. Set it to {low} or more.")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if values[name] is not None and not 0 < values[name] < float("inf"):
            raise UserError(f"{name} is {values[name]}. Set it to 1 or more steps, or to a fraction of the run.")
    if values["max_steps"] == 0:
        raise UserError("max_steps is 0. Set it to 1 or more, or leave it out to train num_train_epochs.")
    if values["greater_is_better"] not in (None, values["metric_for_best_model"] == "accuracy"):
        raise UserError("greater_is_better contradicts metric_for_best_model, from which it follows. Leave it out.")
    for name, example in BELOW_ONE.items():
        if values[name] >= 1:
            raise UserError(f"{name} is {values[name]}. Set it below 1, {example}.")
    for name, why in REFUSED.items():
        if values[name]:
            raise UserError(f"{name} does not work with this recipe: {why}. Leave it out.")
    if values["vision_learning_rate"] is not None and not values["lora_vision"]:
        raise UserError("vision_learning_rate is set but lora_vision is false. Set lora_vision, or leave it out.")
    check_reports(values["report_to"])
    if values["effective_batch_size"] and values["gradient_accumulation_steps"]:
        raise UserError(
            "gradient_accumulation_steps follows from effective_batch_size and the number of GPUs. Leave it out."
        )
    if values["save_total_limit"] == 1:
        raise UserError(
            "save_total_limit 1 deletes the last checkpoint before the next one is complete. Set it to 2 or more."
        )
    if values["swa_lr"] is not None and values["swa_start"] is None:
        raise UserError("swa_lr is set but swa_start is null. Set swa_start, or leave swa_lr out.")
    if values["swa_lr"] is not None and values["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        raise UserError(f"swa_lr needs a schedule by steps, not {values['lr_scheduler_type']}. Use cosine.")


def check_reports(report_to: str | list[str]) -> None:
    """Raise UserError where `report_to` names a package that is unknown or not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"report_to {name!r} does not exist. Set none, all or {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to {name} needs a package that is not installed. Run `pip install {name}`.")


def check_optimizer(recipe: RecipeArguments) -> None:
    """Raise UserError where `optim` or `lr_scheduler_type` cannot be made: a package or a further field is missing.

    Both are made as the Trainer makes them, for one parameter.
    """
    name = recipe.optim.value  # type: ignore[attr-defined]  # TrainingArguments makes enums of both names
    schedule = recipe.lr_scheduler_type.value  # type: ignore[attr-defined]
    if name.startswith(FULL_WEIGHT_OPTIMIZERS):
        raise UserError(f"optim {name} is for full fine-tuning, and this recipe trains an adapter. Use adamw_torch.")
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        model: Any = torch.nn.Module()
        kind, options = Trainer.get_optimizer_cls_and_kwargs(recipe, model)
        optimizer = kind([parameter], **options)
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().rstrip(".")
        raise UserError(f"optim {name} cannot be used: {reason}. Install what it needs, or use adamw_torch.") from None
    except (ValueError, TypeError) as error:  # also of transformers where a package is missing
        reason = str(error).strip().rstrip(".")
        raise UserError(
            f"optim {name} cannot be used: {reason}. Correct learning_rate, adam_beta1, adam_beta2, adam_epsilon or "
            "optim_args, or use adamw_torch."
        ) from None
    try:
        options = recipe.lr_scheduler_kwargs
        get_scheduler(schedule, optimizer, 1, 100, scheduler_specific_kwargs=options)  # type: ignore[arg-type]
    except (ImportError, ValueError, TypeError) as error:
        reason = str(error).strip().rstrip(".")
        raise UserError(
            f"lr_scheduler_type {schedule} cannot be used: {reason}. Correct lr_scheduler_kwargs, or use cosine."
        ) from None


def check_compile(recipe: RecipeArguments) -> None:
    """Raise UserError where torch.compile has no such backend or mode. Nothing is compiled for it."""
    try:
        backend = recipe.torch_compile_backend or "inductor"
        torch.compile(torch.nn.Identity(), backend=backend, mode=recipe.torch_compile_mode)
    except Exception as error:  # torch raises its own for a backend, and RuntimeError for a mode
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"torch_compile cannot be used: {reason}. Leave torch_compile_backend and torch_compile_mode out."
        ) from None


def check_hub(recipe: RecipeArguments) -> None:
    """Raise UserError where `push_to_hub` cannot reach the model hub, or is not logged in."""
    try:
        whoami(recipe.hub_token)
    except Exception as error:  # many kinds: no token, a wrong one, no network, offline mode
        raise UserError(
            f"push_to_hub cannot log in to the model hub ({type(error).__name__}). Run `hf auth login` where the hub "
            "is reachable, or leave push_to_hub out and upload the adapter later."
        ) from None
