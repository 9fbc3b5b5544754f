"""The arguments of a run: the fields of an args file and of transformers' TrainingArguments, overridden by flags.

The reason for a default stands in the `help` of its field, which is also what `python train_fold.py --help` prints.
"""

import argparse
import dataclasses
import os
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from vqa.config.args_file import build_dataclass, raise_unknown_field, read_args_file
from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.recipe import RecipeArguments, check_recipe
from vqa.core.compat import parser_actions
from vqa.core.dtypes import has_bf16
from vqa.core.errors import UserError
from vqa.core.io import swap_root

DEMO = "args/demo/fold0.json"


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
        values["output_dir"] = str(swap_root("checkpoints", Path(path).with_suffix(""), below="args"))
    flags, values = _parse_null_flags(argv[1:] if path else argv, values)
    parser.set_defaults(**values)
    given, unknown = parser.parse_known_args(flags)
    if unknown:
        raise_unknown_field(unknown[0].lstrip("-").split("=")[0], "the command line", field_names())
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
        return *(build_dataclass(kind, vars(given)) for kind in CLASSES), kept
    except (ValueError, TypeError) as error:
        raise UserError(f"{path or 'the command line'}: {error}") from None


def non_default_fields(resolved: dict) -> dict:
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
    for action in parser_actions(parser):
        if action.dest not in ours or any(option.startswith(("--no_", "--no-")) for option in action.option_strings):
            action.help = argparse.SUPPRESS
        action.option_strings = [o for o in action.option_strings if "-" not in o.lstrip("-")] or action.option_strings
    parser.error = lambda message: _raise(UserError(f"{message}; see `python train_fold.py --help`"))
    return parser


def _raise(error: Exception):
    raise error


def _parse_null_flags(flags: list[str], values: dict) -> tuple[list[str], dict]:
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
