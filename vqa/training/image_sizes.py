"""Which image size to train with: out-of-fold rows scored at several sizes, and what a T4 needs to train at each.

It is here, and not beside the other reports of predict.py, for the estimate of memory and time: inference does not
import training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState

from vqa.config.arguments import reader_options
from vqa.config.parser import parse_arguments
from vqa.core.distributed import run_on_main_and_broadcast
from vqa.core.errors import UserError
from vqa.core.io import check_writable, write_json
from vqa.data.image_inputs import ImageInputs
from vqa.data.images import all_images, oriented_sizes
from vqa.data.rows import LETTERS, Row, read_rows
from vqa.data.table import write_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.significance import compare, first_unbeaten
from vqa.inference.checkpoints import Checkpoint
from vqa.inference.jobs import Job, make_jobs
from vqa.inference.predictor import Predictor
from vqa.inference.tta import View
from vqa.modeling.suffix_score import COLLATORS
from vqa.training.batching import count_tokens, make_setup
from vqa.training.doctor import t4_cost
from vqa.training.memory import CUDA_BYTES, GIB, T4_BYTES, meta_model

Sizes = Mapping[str, tuple[int, int]]  # image -> upright (width, height) of its file


def compare_image_sizes(
    predictor: Predictor,
    checkpoints: Sequence[Checkpoint],
    folds: Sequence[list[Row]],
    image_sizes: Sequence[int],
    csv: str,
    base_fingerprint: str,
    output_dir: str | None,
) -> None:
    """Score the rows of each fold in the plain view at each of `image_sizes`, and print and write the report.

    `folds` are the out-of-fold rows of each checkpoint, from `csv`. Scores are cached as those of other views.
    """
    rows, processor = [row for fold in folds for row in fold], predictor.collate.processor
    natural = oriented_sizes(all_images(rows))
    grids = distinct_grids({size: image_grids(processor, size, rows, natural) for size in sorted(set(image_sizes))})
    costs = run_on_main_and_broadcast(lambda: training_costs(processor, checkpoints[0], folds[0], list(grids)))

    def make_job(checkpoint: Checkpoint, size: int, view: View) -> Job:
        return make_jobs([checkpoint.at_image_size(size)], [[view]], base_fingerprint, csv, True, None, output_dir)[0]

    folder = make_job(checkpoints[0], min(grids), View("plain", [], [])).path.parent
    run_on_main_and_broadcast(lambda: check_writable(folder, "--output_dir"))
    stack, start = np.zeros((len(grids), len(rows), len(LETTERS))), 0
    for checkpoint, fold in zip(checkpoints, folds):
        own = slice(start, start + len(fold))
        start, before = own.stop, [()] * len(fold)
        for number, (size, of_rows) in enumerate(grids.items()):
            changed = [i for i, grid in enumerate(of_rows[own]) if grid != before[i]]
            before = of_rows[own]
            if number:  # rows without a new grid keep their probabilities
                stack[number, own] = stack[number - 1, own]
            if changed:
                job = make_job(checkpoint, size, View("plain", fold, changed))
                stack[number, own][changed] = predictor.predict(job).probabilities[0][changed]
    if PartialState().is_main_process:
        labels = Labels(csv, **reader_options(checkpoints[0].data))
        shrunk = any(width * height > max(grids) ** 2 for width, height in natural.values())
        write_report(folder, labels, [row["id"] for row in rows], list(grids), stack, costs, shrunk)


def image_grids(processor, image_size: int, rows: Sequence[Row], natural: Sizes) -> list[tuple]:
    """For each row what the model gets of its images at that size: equal where the size makes no difference."""
    inputs = ImageInputs(processor, image_size)
    return [(*(inputs.size(*natural[path]) for path in row["images"]), str(inputs.options)) for row in rows]


def distinct_grids(grids: Mapping[int, list[tuple]]) -> dict[int, list[tuple]]:
    """`grids` without the sizes at which no row has another grid than at the size before; each of them is printed."""
    kept: dict[int, list[tuple]] = {}
    for size, of_rows in grids.items():
        if kept and of_rows == kept[before := max(kept)]:
            PartialState().print(f"image size {size}: every image has the same grid as at {before}, so it is left out")
        else:
            kept[size] = of_rows
    if len(kept) < 2:
        raise UserError("image_sizes: all of them give every image the same grid. Try smaller ones.")
    return kept


def training_costs(processor, checkpoint: Checkpoint, validated: list[Row], image_sizes: Sequence[int]) -> dict:
    """Image size -> mean tokens of a training row and, on a T4, hours and peak GiB of training on the fold's rows."""
    data, used = checkpoint.data, {row["id"] for row in validated} if checkpoint.adapter else set()
    rows = read_rows(data.train_csv, data.image_root, True, **reader_options(data))
    rows = [row for row in rows if row["id"] not in used]
    collator = COLLATORS[checkpoint.model.score]
    natural = oriented_sizes(all_images(rows))
    lengths = {
        size: count_tokens(rows, collator(processor, size, data.instruction), natural, show=False)
        for size in image_sizes
    }
    costs = {size: {"tokens": float(lengths[size].tokens.mean())} for size in image_sizes}
    try:
        if checkpoint.dtype.itemsize > 2:
            raise UserError("the model runs in float32, and a T4 trains in fp16.")
        recipe = parse_arguments([str(checkpoint.args_file)], "", trains=False)[2]
        setup = make_setup(checkpoint.model, recipe, meta_model(checkpoint.model, checkpoint.dtype))
    except UserError as reason:
        print(f"training on a T4 is not estimated: {reason}")
        return costs
    for size in image_sizes:
        costs[size]["t4_hours"], costs[size]["t4_gib"] = t4_cost(setup, recipe, data, lengths[size])
    return costs


def write_report(
    folder: Path,
    labels: Labels,
    ids: Sequence[str],
    image_sizes: Sequence[int],
    stack: np.ndarray,
    costs: Mapping[int, dict],
    shrunk: bool,
) -> None:
    """Print a line for each size and the recommended one; write them to image_sizes.json and image_sizes.csv.

    stack: probabilities (sizes, rows, letters) of the rows `ids`. shrunk: whether the largest size shrinks an image.
    """
    answers, clusters = labels.answers(ids), labels.clusters(ids)
    lines = []
    for number, (size, values) in enumerate(zip(image_sizes, stack)):
        correct = accuracy(values.argmax(1) == answers, clusters)
        comparison = compare(stack[number - 1], values, answers, clusters) if number else None
        line: dict = {"image_size": size, "accuracy": correct.value, "low": correct.low, "high": correct.high}
        line |= {"log_loss": float(row_log_loss(values, answers).mean())}
        line |= {"p": comparison and comparison.p_value, "verdict": comparison.words if comparison else ""}
        lines.append(line | costs[size])
    best = first_unbeaten(stack, answers, clusters)
    sentence = recommendation(lines[best], len(ids), best + 1 == len(lines) and shrunk)
    print(f"\neach image size against the one above it, on {len(ids)} out-of-fold rows of {labels.path}:")
    print(pd.DataFrame(lines).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    if "t4_hours" in lines[0]:
        print("t4_hours and t4_gib: training one fold on a T4, at its data sheet's speed; real hours are more")
    print(f"\n{sentence}")
    write_json(folder / "image_sizes.json", {"rows": len(ids), "sizes": lines, "recommendation": sentence})
    write_table(folder / "image_sizes.csv", pd.DataFrame(lines))


def recommendation(line: dict, rows: int, larger_may_help: bool) -> str:
    """One sentence with the field to set, from the line of the size where the gain ends."""
    size, room = line["image_size"], (T4_BYTES - CUDA_BYTES) / GIB
    parts = [f'recommended: "image_size": {size} in the args file, or --image_size {size}']
    if larger_may_help:
        parts.append("it is the largest size here and still shrinks images, so try larger ones, too")
    else:
        parts.append(f"no larger size is better beyond noise at {rows} rows")
    if line.get("t4_gib", 0) > room:
        parts.append(f"by the estimate it does not fit a T4 ({room:.1f} GiB)")
    return "; ".join(parts) + "."
