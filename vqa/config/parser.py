"""The arguments of a run: the fields of an args file and of transformers' TrainingArguments, overridden by flags.

The reason for a default is in the `help` of its field, which `python train_fold.py --help` prints.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from vqa.config.args_file import build_dataclass, check_types, raise_unknown_field, read_args_file
from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.checks import check_compile, check_hub, check_optimizer, check_recipe
from vqa.config.recipe import ROWS, RecipeArguments
from vqa.core.cli import non_default_args
from vqa.core.compat import parser_actions
from vqa.core.distributed import check_launcher
from vqa.core.dtypes import has_bf16
from vqa.core.errors import UserError
from vqa.core.io import swap_root
from vqa.core.workers import check_workers

DEMO = "args/demo/fold0.json"
CLASSES = (ModelArguments, DataArguments, RecipeArguments)


def parse_arguments(
    argv: list[str], description: str, trains: bool = True
) -> tuple[ModelArguments, DataArguments, RecipeArguments, dict]:
    """(model, data, recipe, resolved) from `[ARGS.json] [--field value ...]`.

    `resolved` is an args file that repeats the run: all fields of this project, and those of transformers that differ
    from its defaults. Raises UserError for values that cannot be used. Without `trains`, fields may need a GPU that
    this machine does not have.
    """
    parser = _parser(description)
    path = argv[0] if argv and not argv[0].startswith("-") else None
    values = read_args_file(path, field_names()) if path else {}
    for kind in CLASSES:  # text is read as that of a flag
        check_types(kind, {name: value for name, value in values.items() if not isinstance(value, str)}, path or "")
    if path and not values.get("output_dir"):
        values["output_dir"] = str(swap_root("checkpoints", Path(path).with_suffix(""), below="args"))
    parser.set_defaults(**values)
    given, unknown = parser.parse_known_args(argv[1:] if path else argv)
    for name in [name for name, value in vars(given).items() if value == [None]]:  # `--teacher null`
        setattr(given, name, None)
    if unknown:
        raise_unknown_field(unknown[0].lstrip("-").split("=")[0], "the command line", field_names())
    if not given.output_dir:
        raise UserError("no args file and no --output_dir. Name an args file, such as args/fold0.json, or see --help.")
    if trains:
        check_launch()
        check_machine(vars(given))
        check_workers(given.dataloader_num_workers, "dataloader_num_workers")
    check_recipe(vars(given))
    if given.model is None:
        raise UserError(
            f"no model given. Set `model` in {path or 'an args file'}, or --model, to the base model's folder."
        )
    plain = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    kept = {k: v for k, v in vars(given).items() if k in _own_fields() or v != plain[k]}
    try:
        model, data, recipe = (build_dataclass(kind, vars(given)) for kind in CLASSES)
    except (
        ValueError,
        TypeError,
        KeyError,
        OSError,
        ImportError,
        OverflowError,
    ) as error:  # what TrainingArguments raises
        raise UserError(f"{path or 'the command line'}: {error}") from None
    check_optimizer(recipe)
    if recipe.torch_compile:
        check_compile(recipe)
    if recipe.accelerator_config.split_batches:
        raise UserError("split_batches would change the rows of a step. Leave it out of accelerator_config.")
    if recipe.push_to_hub:
        check_hub(recipe)
    kept |= {"effective_batch_size": recipe.effective_batch_size, "gradient_accumulation_steps": None}
    return model, data, recipe, kept


def non_default_fields(resolved: dict) -> dict:
    """The fields of a run that differ from the defaults, without output_dir."""
    parser = _parser("")
    parser.set_defaults(effective_batch_size=ROWS)
    changed = non_default_args(parser, argparse.Namespace(**resolved))
    return {name: value for name, value in changed.items() if name != "output_dir"}


def field_names() -> set[str]:
    return {f.name for kind in CLASSES for f in dataclasses.fields(kind) if f.init}


def _own_fields() -> set[str]:
    """The fields that this project declares, including those of transformers with another default."""
    return {name for kind in CLASSES for name in kind.__annotations__}


def _parser(description: str) -> HfArgumentParser:
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = HfArgumentParser(
        CLASSES,  # type: ignore[arg-type]  # it takes several dataclasses, as its documentation says
        usage="python %(prog)s ARGS.json [--field value ...]",
        description=description,
        epilog="Every field of transformers.TrainingArguments can be given as well.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    ours = _own_fields() | {"help"}
    for action in parser_actions(parser):
        if action.dest not in ours or any(option.startswith(("--no_", "--no-")) for option in action.option_strings):
            action.help = argparse.SUPPRESS
        if action.type is not None and action.dest != "report_to":  # whose "none" is a value
            action.type = _or_null(action.type)  # type: ignore[arg-type]  # a callable in every dataclass field
        action.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")] or action.option_strings
    parser.error = _raise_usage_error  # type: ignore[method-assign]
    return parser


def _raise_usage_error(message: str) -> NoReturn:
    raise UserError(f"{message}; see `python train_fold.py --help`")


def _or_null(convert: Callable[[str], object]) -> Callable[[str], object]:
    """An argparse type that reads `--fold null` as None and the rest as `convert` does."""

    @functools.wraps(convert, updated=())  # argparse's message names the type
    def read(text: str) -> object:
        return None if text in ("null", "none", "None") else convert(text)

    return read


def check_launch() -> None:
    """Raise UserError where the model or each batch would be split: by the launcher, or by plain `python`."""
    check_launcher()
    if torch.cuda.is_available() and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible. Start with `accelerate launch` to use all of them, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one, which tune.py needs."
        )


def check_machine(values: dict) -> None:
    """Raise UserError where a field needs hardware that this machine does not have."""
    if torch.cuda.is_available():
        if values.get("bf16") and not has_bf16():
            raise UserError("this GPU has no bf16 and would emulate it slowly. Use fp16.")
        return
    for name in ("load_in_4bit", "fp16", "bf16"):
        if values.get(name):
            raise UserError(f"{name} needs a CUDA GPU, and this machine has none. On a CPU, try `make demo` ({DEMO}).")
