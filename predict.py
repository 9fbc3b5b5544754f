"""Adapters + a CSV -> one CSV of letter probabilities per fold, in outputs/.

    python predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2
    python predict.py checkpoints/fold? --scales 0.9 1.0 1.1 --orders 4
    python predict.py --base args/fold0.json             # the untrained base model, to compare with

Each fold is asked as it was trained: its prompt, image size and base model stand in its args.json. Test-time
augmentation (TTA) averages the plain view with one view per further image scale and one per further order of the
choices, mapped back to the choices before averaging. What the plain view alone says goes to plain/, to compare with.
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import string_to_bool

from collator import Collator
from vqa.arguments import (
    DataArguments,
    ModelArguments,
    RecipeArguments,
    check_machine,
    folder_under,
    read_args_file,
    section,
)
from vqa.errors import UserError, first_few, run
from vqa.features import open_features
from vqa.files import read_json, write_json
from vqa.images import check_images
from vqa.model import is_adapter, load_adapter, load_base, load_processor
from vqa.precision import model_dtype
from vqa.predictions import write_predictions
from vqa.prompt import letter_ids
from vqa.rows import read_rows
from vqa.scoring import score_rows
from vqa.views import make_views
from vqa.vision import is_tower_untouched

WEIGHTS = ("raw", "ema", "swa")


def main() -> None:
    args = parse_args()
    runs = [base_run(args.base)] if args.base else []
    runs += [trained_run(folder, args.weights) for folder in args.folds]
    check_alike(runs)
    model_args, data = runs[0].model, runs[0].data
    batch_size = args.batch_size or runs[0].batch_size
    csv = args.csv or data.test_csv
    rows = read_rows(csv, args.image_root or data.image_root).to_list()
    check_images(rows, csv)

    processor = load_processor(model_args.model, model_args.trust_remote_code)
    ids = letter_ids(processor)
    collate = Collator(processor, data.image_size, data.instruction)
    views = make_views(rows, args.scales, args.orders, collate)
    model = load_base(model_args.model, model_args.load_in_4bit, runs[0].dtype, model_args.trust_remote_code)
    for name in ("vision_cache", "vision_cache_dir", "vision_cache_gb"):
        if getattr(args, name) is not None:
            setattr(data, name, getattr(args, name))
    features = open_features(model, processor, data, [view.changed_rows() for view in views])
    for number, item in enumerate(runs):
        if item.adapter:  # one base in memory for all of them; PEFT's names take no dots
            model = load_adapter(model, item.adapter, f"run{number}")
        collate.features = features if is_tower_untouched(model) else None
        start, views_used = time.time(), views if item.adapter else views[:1]  # the base is there to compare with
        plain, summed, counts = None, 0.0, np.zeros((len(rows), 1))
        for view in views_used:
            label = f"{item.name}, {view.name}"
            got = score_rows(model, view.changed_rows(), collate, ids, batch_size, label, args.workers)
            plain = got if plain is None else plain
            summed = summed + view.spread(got)  # a view that shows a row as it was does not count twice
            counts[view.changed] += 1
        card = {"test_csv": str(csv), "views": [view.name for view in views_used]}
        write_run(item, args.output_dir, rows, plain, summed / counts, card, time.time() - start)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="*", help="folders that train_fold.py wrote")
    parser.add_argument("--base", metavar="ARGS.json", help="predict with the base model of an args file, untrained")
    parser.add_argument("--csv", help="rows to predict (default: the test_csv that the folds were trained with)")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: as in training)")
    parser.add_argument("--weights", choices=("best", *WEIGHTS), default="best", help="(default: best)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="image scales (default: 1.0)")
    parser.add_argument("--orders", type=int, default=1, help="orders of the choices, by rotation (default: 1)")
    parser.add_argument("--batch_size", type=int, help="rows at once (default: as in validation)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0)")
    parser.add_argument("--vision_cache", type=string_to_bool, help="(default, as of the next two: as in training)")
    parser.add_argument("--vision_cache_dir", help="folder of the stored vision features")
    parser.add_argument("--vision_cache_gb", type=float, help="bound of that folder, in GB")
    parser.add_argument("--output_dir", help="(default: outputs/, and the fold's own place below checkpoints/)")
    args = parser.parse_args()
    if not args.folds and not args.base:
        raise UserError("no folds given; name the folders that train_fold.py wrote, such as checkpoints/fold0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("predict.py does not share its rows out among processes yet; start it with plain `python`")
    if min(args.scales) <= 0 or args.orders < 1:
        raise UserError("--scales have to be above 0 and --orders at least 1")
    return args


@dataclass
class Run:
    """One set of weights to predict with, and how it was trained to be asked."""

    name: str
    adapter: Path | None
    weights: str
    validation: dict | None
    base_weights: str | None
    output_dir: Path
    model: ModelArguments
    data: DataArguments
    dtype: torch.dtype
    batch_size: int


def trained_run(folder: str, weights: str) -> Run:
    path = Path(folder)
    if not (path / "metrics.json").is_file():
        raise UserError(f"{folder}: no finished fold (it has no metrics.json); train it with train_fold.py first")
    metrics = read_json(path / "metrics.json")
    weights = metrics["best"] if weights == "best" else weights
    if weights not in WEIGHTS:  # it becomes a path
        raise UserError(f"{folder}/metrics.json: {weights!r} names no weights; it is one of {', '.join(WEIGHTS)}")
    adapter = path if weights == "raw" else path / weights
    if not is_adapter(adapter):
        raise UserError(f"{folder}: it has no {weights} weights; predict with --weights best, or train with them on")
    output_dir = folder_under("outputs", path.parent, below="checkpoints")
    validation, base = metrics["weights"].get(weights), metrics.get("fingerprints", {}).get("base")
    return make_run(path.resolve().name, adapter, weights, validation, base, output_dir, path / "args.json")


def base_run(args_file: str) -> Run:
    output_dir = folder_under("outputs", Path(args_file).parent, below="args")
    return make_run("base", None, "base", None, None, output_dir, Path(args_file))


def make_run(name, adapter, weights, validation, base_weights, output_dir, args_file: Path) -> Run:
    values = read_args_file(args_file)
    check_machine(values)
    dtype = model_dtype(values.get("fp16"), values.get("bf16"))
    model, data = section(ModelArguments, values), section(DataArguments, values)
    batch_size = values.get("per_device_eval_batch_size", RecipeArguments.per_device_eval_batch_size)
    return Run(name, adapter, weights, validation, base_weights, output_dir, model, data, dtype, int(batch_size))


def check_alike(runs: list[Run]) -> None:
    """Folds that are predicted together share the base model in memory, the rows, and the input made of them."""
    first = runs[0]
    bases = {run.name: run.base_weights for run in runs if run.base_weights}
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{name}: {base}" for name, base in bases.items())
        raise UserError(f"the folds did not start from the same base weights ({told}); train them again from one base")
    for other in runs[1:]:
        for name in ("model", "load_in_4bit", "dtype", "image_size", "instruction", "test_csv", "image_root"):
            a, b = (getattr(run.model, name, getattr(run.data, name, run.dtype)) for run in (first, other))
            if a != b:
                raise UserError(f"{first.name} has {name} {a} and {other.name} {b}; predict them in two commands")
    places = [str(run.output_dir / run.name) for run in runs]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise UserError(f"two folders would both write {first_few(twice)}.csv; predict them in two commands")


def write_run(item: Run, output_dir: str | None, rows, plain, probabilities, card: dict, seconds: float) -> None:
    """The mean of the views and, in plain/, what the plain view says where there are more; beside each a JSON card."""
    path = Path(output_dir or item.output_dir, f"{item.name}.csv" if item.adapter else "base/base.csv")
    card |= {"adapter": item.adapter and str(item.adapter), "weights": item.weights, "validation": item.validation}
    alone = path.parent / "plain" / path.name
    alone.unlink(missing_ok=True)  # one of an earlier run would be taken for this run's
    if len(card["views"]) > 1:
        write_predictions(alone, rows, plain)
        write_json(alone.with_suffix(".json"), card | {"views": card["views"][:1]})
    write_predictions(path, rows, probabilities)
    write_json(path.with_suffix(".json"), card | {"seconds": round(seconds, 1)})
    print(f"{path}: {len(rows)} rows, {item.weights} weights, {len(card['views'])} views, {seconds:.1f} s")


if __name__ == "__main__":
    run(main)
