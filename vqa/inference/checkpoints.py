"""Weights to predict with: what a fold's folder says of them, and of how they were trained to be asked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vqa.config.args_file import build_dataclass, read_args_file
from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.parser import check_machine, field_names
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.errors import UserError, preview
from vqa.core.hashing import checkpoint_fingerprint
from vqa.core.io import read_json, swap_root
from vqa.evaluation.oof import WEIGHTS, weights_folder
from vqa.modeling.loading import check_model_path, is_adapter

DTYPES = ("float32", "float16", "bfloat16")


FORMAT = "1"  # part of every fingerprint: raise it when rows are asked in another way


@dataclass
class Checkpoint:
    """One set of weights to predict with, and how it was trained to be asked. `adapter` None is the base model."""

    name: str
    adapter: Path | None
    weights: str
    validation: dict | None
    base_files: str | None
    logged: tuple[str, str]  # its id in the experiment log, and the fingerprint of the rows it was trained on
    output_dir: Path
    model: ModelArguments
    data: DataArguments
    dtype: torch.dtype
    batch_size: int

    def fingerprint(self, base_files: str) -> str:
        """16 hex digits, of the weights and of how they are asked, over base weights of that fingerprint."""
        files = ("adapter_config.json", "adapter_model.safetensors") if self.adapter else ()
        adapter = [hashlib.sha256((self.adapter / name).read_bytes()).hexdigest() for name in files]
        asked = [self.model.load_in_4bit, str(self.dtype), self.data.image_size, self.data.instruction]
        return hashlib.sha256(json.dumps([FORMAT, base_files, *adapter, *asked]).encode()).hexdigest()[:16]


def fold_checkpoint(
    folder: str, weights: str = "best", model: str | None = None, dtype: str | None = None
) -> Checkpoint:
    """The run of a fold's folder, by its `weights`; `model` and `dtype` override what it was trained with."""
    path = Path(folder)
    if not (path / "metrics.json").is_file():
        raise UserError(f"{folder}: no finished fold (it has no metrics.json); train it with train_fold.py first")
    metrics = read_json(path / "metrics.json")
    weights = metrics["best"] if weights == "best" else weights
    if weights not in WEIGHTS:  # it becomes a path
        raise UserError(f"{folder}/metrics.json: {weights!r} names no weights; it is one of {', '.join(WEIGHTS)}")
    adapter = weights_folder(path, weights)
    if not is_adapter(adapter):
        raise UserError(f"{folder}: it has no {weights} weights; predict with --weights best, or train with them on")
    output_dir = swap_root("outputs", path.parent, below="checkpoints")
    prints = metrics.get("fingerprints", {})
    logged = metrics.get("run", ""), prints.get("rows", "")
    validation, base = metrics["weights"].get(weights), prints.get("files")
    known = (path.resolve().name, adapter, weights, validation, base, logged, output_dir)
    return _make_run(known, path / "args.json", model, dtype)


def base_checkpoint(args_file: str, model: str | None = None, dtype: str | None = None) -> Checkpoint:
    output_dir = swap_root("outputs", Path(args_file).parent, below="args")
    return _make_run(("base", None, "base", None, None, ("", ""), output_dir), Path(args_file), model, dtype)


def _make_run(known: tuple, args_file: Path, model: str | None, dtype: str | None) -> Checkpoint:
    values = read_args_file(args_file, field_names()) | ({"model": model} if model else {})
    if dtype:
        values |= {"fp16": dtype == "float16", "bf16": dtype == "bfloat16"}
    check_machine(values)
    chosen = getattr(torch, dtype) if dtype else model_dtype(values.get("fp16"), values.get("bf16"))
    batch_size = values.get("per_device_eval_batch_size", RecipeArguments.per_device_eval_batch_size)
    return Checkpoint(
        *known,
        build_dataclass(ModelArguments, values),
        build_dataclass(DataArguments, values),
        chosen,
        int(batch_size),
    )


def check_alike(runs: Sequence[Checkpoint], fields: Sequence[str]) -> None:
    """Runs that are predicted together share the base model in memory, and the input: their `fields` are equal."""
    first = runs[0]
    for other in runs[1:]:
        for name in ("model", "load_in_4bit", "dtype", "image_size", "instruction", *fields):
            a, b = (getattr(run.model, name, getattr(run.data, name, run.dtype)) for run in (first, other))
            if a != b:
                raise UserError(f"{first.name} has {name} {a} and {other.name} {b}; predict them in two commands")


def check_base(runs: Sequence[Checkpoint]) -> str:
    """The fingerprint of the base model's files, which have to be those that every run was trained on."""
    model = runs[0].model.model
    check_model_path(model)
    found = checkpoint_fingerprint(model)
    if others := [run.name for run in runs if run.base_files not in (None, found)]:
        raise UserError(
            f"{preview(others)}: not trained on the base weights in {model}; give --model the folder of those that "
            "were used, or predict folds of different bases in different commands"
        )
    return found
