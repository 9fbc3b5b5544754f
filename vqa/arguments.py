"""The arguments of a run: the fields of an args file and of transformers' TrainingArguments, overridden by flags.

The reason for a default stands in the `help` of its field, which is also what `python train_fold.py --help` prints.
"""

import argparse
import dataclasses
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from vqa.args_files import DataArguments, ModelArguments, read_args_file, refuse_unknown, section, setting
from vqa.errors import UserError
from vqa.files import folder_under
from vqa.precision import has_bf16

# Every transformers from 5.20 on understands the name `gradient_checkpointing`; 5.23 says on each run, and PEFT once
# more, that it will be called otherwise in version 6.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)

DEMO = "args/demo/fold0.json"
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # from transformers 5.23 on, and before


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' TrainingArguments with this recipe's defaults, and what it has no field for."""

    loss: str = setting(
        "token",
        "token: cross-entropy over the vocabulary at the answer's letter and the end of the turn, as in language "
        "modelling; letter: cross-entropy over the letters that the row offers, which is what is scored.",
    )
    ema_decay: float = setting(
        0.0, "Decay of the EMA of the adapter, per optimiser step, warmed up: 0.99, say. 0: none, which is quicker."
    )
    swa_start: float | None = setting(
        None, "Where SWA begins: below 1, after that share of the run (0.5, say); from 1 on, at that step. null: none."
    )
    swa_every: int = setting(1, "Steps between two weights that SWA averages.")
    swa_lr: float | None = setting(None, "Constant learning rate from SWA's beginning on; null keeps the schedule.")
    max_hours: float | None = setting(
        None,
        "Stop training with a checkpoint before so many hours have passed: 11 for a notebook that dies after 12 "
        "leaves an hour for prediction.",
    )
    output_dir: str | None = setting(None, "The fold's folder; args/demo/fold0.json gives checkpoints/demo/fold0.")
    num_train_epochs: float = setting(3.0, "Passes over the training rows.")
    learning_rate: float = setting(2e-4, "Peak learning rate: QLoRA's usual one; ten times that of full fine-tuning.")
    lr_scheduler_type: str = setting("cosine", "Falls to zero by the end: the last steps settle, as contests reward.")
    warmup_steps: float = setting(0.05, "Steps of warm-up; below 1, a share of the run.")
    per_device_train_batch_size: int = setting(8, "Rows a GPU takes at once, where auto_batch is off.")
    gradient_accumulation_steps: int = setting(2, "Batches an optimiser step; times the batch size: its rows.")
    per_device_eval_batch_size: int = setting(16, "Rows a GPU scores at once.")
    auto_batch: bool = setting(
        True,
        "Cut a step's rows (batch size times accumulation) into the micro-batches that suit this GPU; "
        "gradient_checkpointing is left out where memory allows, unless it is set. Out of memory, they get smaller.",
    )
    train_sampling_strategy: str = setting(
        "group_by_length", "Rows at random, those of a step sorted by length, which saves padding; random: not sorted."
    )
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.")
    fp16: bool = setting(False, "Mixed precision for GPUs before Ampere, such as the T4, which have no bf16.")
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations in the backward pass: memory for a third of speed. null: auto_batch decides."
    )
    eval_strategy: str = setting("epoch", "When to validate: epoch, steps (every eval_steps) or no.")
    save_strategy: str = setting(
        "epoch", "When to write a checkpoint to resume from: epoch, steps (every save_steps) or no."
    )
    save_total_limit: int | None = setting(
        2, "Checkpoints to keep, 2 or more: one has to last while the next is written. The best adapters are apart."
    )
    logging_steps: float = setting(10, "Optimiser steps between two lines of the training log.")
    logging_nan_inf_filter: bool = setting(False, "Stays false: a loss that is not finite is to be seen in the log.")
    ddp_find_unused_parameters: bool | None = setting(
        False, "Stays false: every adapter weight is used in every step, and looking for unused ones costs time."
    )
    dataloader_num_workers: int = setting(
        0, "Processes that decode and resize images ahead of the GPU; 2 on a T4 host."
    )
    remove_unused_columns: bool = setting(False, "Stays false: the collator reads the rows' own columns.")
    resume_from_checkpoint: str | None = setting(None, "A checkpoint folder to go on from, or `auto` for the newest.")
    seed: int = setting(42, "Seed of everything drawn at random; 42 by default.")
    full_determinism: bool = setting(False, "Give the same bytes in every run on a GPU too, as on a CPU; slower.")
    metric_for_best_model: str = setting(
        "log_loss", "What chooses the best adapter: log_loss or accuracy, of letters."
    )
    report_to: str = setting("none", "Where to log: none, tensorboard, wandb, trackio.")

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

CLASSES = (ModelArguments, DataArguments, RecipeArguments)


def parse_arguments(
    argv: list[str], description: str, trains: bool = True
) -> tuple[ModelArguments, DataArguments, RecipeArguments, dict]:
    """(model, data, recipe, resolved) from `[ARGS.json] [--field value ...]`.

    `resolved` is an args file that repeats the run: all of our fields, and those of transformers' that were set.
    Raises UserError for what cannot be used; without `trains`, the fields may ask for a GPU that is not here.
    """
    parser = _parser(description)
    path = argv[0] if argv and not argv[0].startswith("-") else None
    values = read_args_file(path, field_names()) if path else {}
    if path and not values.get("output_dir"):  # the args file's place names the run
        values["output_dir"] = str(folder_under("checkpoints", Path(path).with_suffix(""), below="args"))
    flags, values = _null_flags(argv[1:] if path else argv, values)
    parser.set_defaults(**values)
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        refuse_unknown(unknown[0].lstrip("-").split("=")[0], "the command line", field_names())
    if given.output_dir is None:
        raise UserError("no args file and no --output_dir; name an args file, such as args/fold0.json, or see --help")
    if trains:
        check_launch()
        check_machine(vars(given))
    check_recipe(vars(given))
    if given.model is None:
        raise UserError(
            f"no model given; name the base model's folder as `model` in {path or 'an args file'} or as --model"
        )
    plain = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    kept = {k: v for k, v in vars(given).items() if k in _own_fields() or v != plain[k]}
    try:
        return *(section(kind, vars(given)) for kind in CLASSES), kept
    except (ValueError, TypeError) as error:
        raise UserError(f"{path or 'the command line'}: {error}") from None


def differing(resolved: dict) -> dict:
    """The fields of a run that differ from the defaults; not where it wrote."""
    usual = vars(_parser("").parse_args([]))  # as parsed: transformers' own defaults come out in another form
    return {name: value for name, value in resolved.items() if value != usual[name] and name != "output_dir"}


def field_names() -> set[str]:
    return {f.name for kind in CLASSES for f in dataclasses.fields(kind) if f.init}


def _own_fields() -> set[str]:
    """The fields that this module declares, be it only to give one of transformers' another default."""
    return {name for kind in CLASSES for name in kind.__annotations__}


def _parser(description: str) -> HfArgumentParser:
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = HfArgumentParser(
        CLASSES,
        usage="python %(prog)s ARGS.json [--field value ...]",
        description=description,
        epilog="Every field of transformers.TrainingArguments can be given as well.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    ours = _own_fields() | {"help"}
    for action in parser._actions:
        if action.dest not in ours or any(option.startswith(("--no_", "--no-")) for option in action.option_strings):
            action.help = argparse.SUPPRESS
        action.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")] or action.option_strings
    parser.error = lambda message: _raise(UserError(f"{message}; see `python train_fold.py --help`"))
    return parser


def _raise(error: Exception):
    raise error


def _null_flags(flags: list[str], values: dict) -> tuple[list[str], dict]:
    """`--fold null` on the command line, which argparse has no word for, becomes a None among the values."""
    kept, index = [], 0
    while index < len(flags):
        if flags[index].startswith("--") and flags[index + 1 : index + 2] in (["null"], ["none"], ["None"]):
            name = flags[index][2:].replace("-", "_")
            if name in field_names() and name != "report_to":
                values = values | {name: None}
                index += 2
                continue
        kept.append(flags[index])
        index += 1
    return kept, values


def check_launch() -> None:
    """Stop where plain python would split each batch over several GPUs in threads, or put all of it on one."""
    if torch.cuda.is_available() and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible; start with `accelerate launch` to use them, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one, as tune.py needs it"
        )


def check_machine(values: dict) -> None:
    """Stop where the fields ask for what this machine has not, before anything is loaded."""
    if torch.cuda.is_available():
        if values.get("bf16") and not has_bf16():
            raise UserError("bf16 on this GPU would be slow emulation (it has no bf16 of its own); use fp16")
        return
    for name in ("load_in_4bit", "fp16", "bf16"):
        if values.get(name):
            raise UserError(f"{name} needs a CUDA GPU and there is none here; on a CPU try `make demo` ({DEMO})")


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
