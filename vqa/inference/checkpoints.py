"""Checkpoints to predict with: the weights in a fold's folder and the settings that they were trained with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vqa.config.args_file import build_dataclass, read_args_file
from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.parser import check_machine, field_names
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.errors import UserError, preview
from vqa.core.hashing import checkpoint_fingerprint
from vqa.core.io import hash_files, read_json, swap_root
from vqa.evaluation.oof import WEIGHTS, weights_folder
from vqa.modeling.base_checks import check_model_path
from vqa.modeling.loading import is_adapter
from vqa.modeling.suffix_score import COLLATORS, HEAD_FILE

DTYPES = ("float32", "float16", "bfloat16")
FORMAT = "1"  # part of every fingerprint: raise it when the same weights give other probabilities


@dataclass(frozen=True)
class Checkpoint:
    """Weights to predict with, and how they were trained. Without an `adapter` it is the untrained base model.

    weights: "raw", "ema", "swa" or "base". output_dir: where predictions go by default. validation: the scores that
    training measured. base_fingerprint: of the base model's files in training. run_id: in the experiment log.
    data_fingerprint: of the rows that it was trained and validated on. args_file: the settings of its training.
    image_size: of prediction, where it is not that of training.
    """

    name: str
    weights: str
    output_dir: Path
    model: ModelArguments
    data: DataArguments
    dtype: torch.dtype
    batch_size: int
    adapter: Path | None = None
    validation: dict | None = None
    base_fingerprint: str | None = None
    run_id: str = ""
    data_fingerprint: str = ""
    args_file: str | Path = ""
    image_size: int | None = None

    def at_image_size(self, size: int) -> "Checkpoint":
        """The same weights for prediction at another image size, without the scores that training measured.

        At a larger size fewer rows go through the model at once: as many tokens fit the memory.
        """
        if size == self.data.image_size:
            return self
        rows = max(1, int(self.batch_size * min(1.0, (self.data.image_size / size) ** 2)))
        data = replace(self.data, image_size=size)
        return replace(self, data=data, batch_size=rows, validation=None, image_size=size)

    def fingerprint(self, base_fingerprint: str) -> str:
        """16 hex digits of all that decides a row's probabilities: adapter, base model, dtype, image size, prompt."""
        names = ("adapter_config.json", "adapter_model.safetensors")
        adapter = hash_files([str(self.adapter / name) for name in names]) if self.adapter else []
        if self.model.score == "suffix" and self.adapter:
            adapter += hash_files([str(self.adapter / HEAD_FILE)])
        settings = [self.model.load_in_4bit, str(self.dtype), self.data.image_size, self.data.instruction]
        return hashlib.sha256(json.dumps([FORMAT, base_fingerprint, *adapter, *settings]).encode()).hexdigest()[:16]


def fold_checkpoint(
    folder: str | Path,
    weights: str = "best",
    model: str | None = None,
    dtype: str | None = None,
    args_file: str | Path | None = None,
) -> Checkpoint:
    """The checkpoint in a fold's folder. `model` and `dtype` override what it was trained with.

    `args_file`: the settings of an adapter that was trained elsewhere, whose folder does not say them.
    """
    path = Path(folder)
    is_finished, has_args = ((path / name).is_file() for name in ("metrics.json", "args.json"))
    if not is_finished and not has_args and is_adapter(path):
        if args_file is None:
            raise UserError(
                f"{folder}: an adapter that was trained elsewhere. Give --args ARGS.json, an args file with its "
                "model, image_size and instruction."
            )
        base = base_checkpoint(args_file, model, dtype)
        return replace(base, name=path.resolve().name, weights="raw", adapter=path)
    metrics, (weights, adapter) = read_finished(path), fold_adapter(path, weights)
    fingerprints = metrics.get("fingerprints", {})
    return replace(
        base_checkpoint(path / "args.json", model, dtype),
        name=path.resolve().name,
        weights=weights,
        output_dir=output_folder(path),
        adapter=adapter,
        validation=metrics["weights"].get(weights),
        base_fingerprint=fingerprints.get("files"),
        run_id=metrics.get("run", ""),
        data_fingerprint=fingerprints.get("rows", ""),
    )


def read_finished(folder: Path) -> dict:
    """The metrics.json of a finished fold."""
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder}: no finished fold (metrics.json is missing). Train it with train_fold.py first.")
    return read_json(folder / "metrics.json")


def fold_adapter(folder: Path, weights: str = "best") -> tuple[str, Path]:
    """(the name of a finished fold's weights, their folder)."""
    weights = read_finished(folder)["best"] if weights == "best" else weights
    if weights not in WEIGHTS:  # it becomes a path
        raise UserError(f"{folder}/metrics.json: unknown weights {weights!r}. Choose from {', '.join(WEIGHTS)}.")
    adapter = weights_folder(folder, weights)
    if not is_adapter(adapter):
        raise UserError(f"{folder}: no {weights} weights. Predict with --weights best, or train with them enabled.")
    return weights, adapter


def output_folder(fold: Path) -> Path:
    """Where the predictions of a fold's folder are written by default."""
    return swap_root("outputs", fold.parent, below="checkpoints")


def base_checkpoint(args_file: str | Path, model: str | None = None, dtype: str | None = None) -> Checkpoint:
    """The untrained base model of an args file."""
    values = read_args_file(args_file, field_names()) | ({"model": model} if model else {})
    if dtype:
        values |= {"fp16": dtype == "float16", "bf16": dtype == "bfloat16"}
    check_machine(values)
    return Checkpoint(
        name="base",
        weights="base",
        output_dir=swap_root("outputs", Path(args_file).parent, below="args"),
        model=build_dataclass(ModelArguments, values, args_file),
        data=build_dataclass(DataArguments, values, args_file),
        dtype=getattr(torch, dtype) if dtype else model_dtype(bool(values.get("fp16")), bool(values.get("bf16"))),
        batch_size=int(values.get("per_device_eval_batch_size", RecipeArguments.per_device_eval_batch_size)),
        args_file=args_file,
    )


def check_same_settings(checkpoints: Sequence[Checkpoint], fields: Sequence[str]) -> None:
    """Raise UserError unless all checkpoints can share the base model and the rows: these settings and `fields`."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        for name in ("model", "load_in_4bit", "score", "dtype", "image_size", "instruction", *fields):
            a, b = (getattr(item.model, name, getattr(item.data, name, item.dtype)) for item in (first, other))
            if a != b:
                raise UserError(f"{first.name} has {name} {a}, {other.name} {b}. Predict them in two commands.")


def check_score_head(item: Checkpoint) -> None:
    """Raise UserError unless weights that score suffixes have their trained head, and others have none."""
    if item.model.score not in COLLATORS:
        raise UserError(f"score {item.model.score!r} does not exist. Set {' or '.join(COLLATORS)} in the args file.")
    suffix = item.model.score == "suffix"
    if item.adapter is None and suffix:
        raise UserError("--base: score suffix needs a trained head, which the base model lacks. Set score to letter.")
    if item.adapter and suffix and not (item.adapter / HEAD_FILE).is_file():
        raise UserError(
            f"{item.adapter}: score is suffix but {HEAD_FILE} is missing. Copy it from where it was trained."
        )
    if item.adapter and not suffix and (item.adapter / HEAD_FILE).is_file():
        raise UserError(f"{item.adapter}: it has a {HEAD_FILE}, but score is letter. Set score to suffix in --args.")


def check_base_weights(checkpoints: Sequence[Checkpoint]) -> str:
    """The fingerprint of the base model's files. Raises UserError where a checkpoint was trained on others."""
    model = checkpoints[0].model.model
    check_model_path(model)
    fingerprint = checkpoint_fingerprint(model)
    if others := [item.name for item in checkpoints if item.base_fingerprint not in (None, fingerprint)]:
        raise UserError(
            f"{preview(others)}: not trained on the base weights in {model}. Give --model the folder of the right "
            "base, or predict folds of different bases in separate commands."
        )
    return fingerprint
