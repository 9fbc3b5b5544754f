"""The rows that a run trains on and validates on: the split, soft and pseudo labels, rows of further files, leaks."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vqa.config.arguments import DataArguments, folds_file, reader_options
from vqa.core.errors import UserError, preview
from vqa.core.io import hash_file, hash_files
from vqa.data.folds import read_folds, split_fold
from vqa.data.images import all_images
from vqa.data.predictions import read_predictions
from vqa.data.rows import Row, read_rows


def split_rows(
    rows: list[Row], data: DataArguments, seed: int, folds: np.ndarray | None = None
) -> tuple[list[Row], list[Row]]:
    """(training rows, validation rows) of the rows of train_csv; no validation rows where fold is null.

    `folds` is the fold of each row, read from the folds file where it is None. Pseudo-labelled test rows and the rows
    of extra_csv are added to the training rows; max_train_rows does not count them.
    """
    train, valid = np.arange(len(rows)), np.array([], dtype=int)
    if data.fold is not None:
        path = folds_file(data)
        if folds is None:
            folds = read_folds(path, [row["id"] for row in rows], data.train_csv)
        train, valid = split_fold(folds, data.fold, path)
    train = draw_rows(train, data.max_train_rows, seed, "max_train_rows")
    valid = draw_rows(valid, data.max_valid_rows, seed, "max_valid_rows")
    train_rows, valid_rows = [rows[i] for i in train], [rows[i] for i in valid]
    if data.soft_labels:
        train_rows = with_soft_labels(train_rows, data.train_csv)
    return train_rows + pseudo_rows(data, valid_rows) + extra_rows(data, valid_rows), valid_rows


def draw_rows(indices: np.ndarray, most: int | None, seed: int, field: str) -> np.ndarray:
    """At most `most` of the indices, drawn by seed and in their order; None: all."""
    if most is None:
        return indices
    if most < 1:
        raise UserError(f"{field} is {most}. Set it to 1 or more, or leave it out.")
    return np.sort(np.random.default_rng(seed).permutation(indices)[:most])


def with_soft_labels(rows: list[Row], csv: str) -> list[Row]:
    """The rows with the distribution of their annotators' answers as the target of the loss."""
    if "annotators" not in rows[0]:
        raise UserError(f"soft_labels: {csv} has no columns answer1, answer2, ... Add them, or leave soft_labels out.")
    return [{**row, "target": row["annotators"]} for row in rows]


def pseudo_rows(data: DataArguments, valid_rows: list[Row]) -> list[Row]:
    """The rows of test_csv whose likeliest choice in pseudo_csv has at least pseudo_min_confidence; none without it.

    Their `target` is the file's probabilities. Rows that repeat a validation row are left out. Their ids get a prefix,
    since a test row may have the id of a training row. Prints how many rows are used.
    """
    if data.pseudo_csv is None:
        return []
    test = {row["id"]: row for row in read_rows(data.test_csv, data.image_root, **reader_options(data))}
    ids, probabilities = read_predictions(data.pseudo_csv)
    if unknown := [row_id for row_id in ids if row_id not in test]:
        raise UserError(
            f"{data.pseudo_csv}: {len(unknown)} of its ids are not in {data.test_csv}: {preview(unknown)}. "
            "Predict that file, or set test_csv to the file that it predicts."
        )
    if wrong := [i for i, values in zip(ids, probabilities) if values[len(test[i]["choices"]) :].any()]:
        raise UserError(
            f"{data.pseudo_csv}: {len(wrong)} rows have probabilities of choices that {data.test_csv} does not offer: "
            f"{preview(wrong)}. Predict again."
        )
    least = data.pseudo_min_confidence
    rows = [pseudo_label(test[i], values.tolist()) for i, values in zip(ids, probabilities) if values.max() >= least]
    used = without_rows_of(valid_rows, rows)
    if not used:
        raise UserError(
            f"{data.pseudo_csv}: no rows with a confidence of {least:g} or more to train on. "
            "Lower pseudo_min_confidence."
        )
    print(
        f"{data.pseudo_csv}: {len(used)} of {len(ids)} rows become training rows (confidence {least:g} or more)"
        + left_out(len(rows) - len(used))
    )
    return used


def pseudo_label(row: Row, probabilities: list[float]) -> Row:
    """A test row as a training row, from the probabilities of its letters."""
    target = probabilities[: len(row["choices"])]
    return {**row, "id": f"pseudo {row['id']}", "answer": target.index(max(target)), "target": target}


def extra_rows(data: DataArguments, valid_rows: list[Row]) -> list[Row]:
    """The rows of extra_csv with their `weight`; those that repeat a validation row are left out.

    Their ids get a prefix, since each file has its own. Prints how many rows are used.
    """
    extra: list[Row] = []
    for number, path in enumerate(data.extra_csv or [], start=1):
        rows = read_rows(path, with_answer=True)
        if data.extra_weight != 1:
            rows = [{**row, "weight": data.extra_weight} for row in rows]
        used = without_rows_of(valid_rows, [{**row, "id": f"extra{number} {row['id']}"} for row in rows])
        print(
            f"{path}: {len(used)} of {len(rows)} rows become training rows (weight {data.extra_weight:g})"
            + left_out(len(rows) - len(used))
        )
        extra += used
    return extra


def without_rows_of(valid_rows: list[Row], rows: list[Row]) -> list[Row]:
    """`rows` without the `repeated_rows` of the validation rows."""
    leaks = set(repeated_rows(rows, valid_rows))
    return [row for row in rows if row["id"] not in leaks]


def repeated_rows(rows: list[Row], others: list[Row]) -> list[str]:
    """Ids of `rows` with the images of one of the others, byte for byte, or without an image but with its text."""
    texts = {(row["question"], *row["choices"]) for row in others if not row["images"]}
    by_text = [row["id"] for row in rows if not row["images"] and (row["question"], *row["choices"]) in texts]
    return [row_id for row_id, _ in shared_images(rows, others)] + by_text


def left_out(count: int) -> str:
    return (
        f"; {count} are left out because a validation row has the same image, or text if it has none" if count else ""
    )


def split_problems(train_rows: list[Row], valid_rows: list[Row]) -> list[str]:
    """Messages about rows, or byte-identical images, that are in both lists; empty where there are none."""
    remedy = "Make the folds again: `python make_folds.py ARGS.json --overwrite`."
    problems = []
    if both := sorted({row["id"] for row in train_rows} & {row["id"] for row in valid_rows}):
        problems.append(f"{len(both)} validation rows are training rows too ({preview(both)}). {remedy}")
    elif pairs := shared_images(valid_rows, train_rows):
        names = preview([f"{a} and {b}" for a, b in pairs])
        problems.append(f"{len(pairs)} validation rows have the image of a training row ({names}). {remedy}")
    return problems


def image_hashes(rows: Sequence[Row]) -> list[list[str]]:
    """SHA-256 of each image of each row."""
    paths = all_images(rows)
    hashes = dict(zip(paths, hash_files(paths)))
    return [[hashes[path] for path in row["images"]] for row in rows]


def image_groups(rows: Sequence[Row], near: bool = False) -> list[str]:
    """A key of each row that rows with the same images share, byte for byte; without an image, those with its text.

    `near`: near-duplicates are the same image too.
    Rows that share some of their images are not joined: where pairs are drawn from a few images, that would join all.
    """
    keys = image_hashes(rows)
    if near:
        from vqa.data.duplicates import near_duplicate_keys  # takes half a second to import

        key_of = near_duplicate_keys(all_images(rows))
        keys = [[key_of[path] for path in row["images"]] for row in rows]
    return [" ".join(sorted(set(own))) or repr((row["question"], *row["choices"])) for row, own in zip(rows, keys)]


def shared_images(rows: list[Row], others: list[Row]) -> list[tuple[str, str]]:
    """(id, id of one of the others) for each of `rows` whose images are those of one of the others, byte for byte."""
    holder = dict(zip(image_groups(others), (row["id"] for row in others)))
    groups = image_groups(rows)
    return [(row["id"], holder[group]) for row, group in zip(rows, groups) if row["images"] and group in holder]


def images_across_folds(rows: list[Row], folds: Sequence[int] | np.ndarray) -> list[list[str]]:
    """For each image that is in several folds, the ids of its rows."""
    ids, folds_of = defaultdict(list), defaultdict(set)
    for row, hashes, fold in zip(rows, image_hashes(rows), folds):
        for image in hashes:
            ids[image].append(row["id"])
            folds_of[image].add(fold)
    return [ids[image] for image in ids if len(folds_of[image]) > 1]


def rows_fingerprint(*parts: Sequence[Row]) -> str:
    """16 hex digits for lists of rows, such as the training and the validation rows: every cell, in order.

    An image counts by its bytes and not by its path, so the same data in another folder has the same fingerprint and a
    replaced image another one. A missing file counts as no image: `check_images` reports it.
    """

    def content(row: Row) -> dict:
        hashes = [hash_file(path) if Path(path).is_file() else "" for path in row.get("images", ())]
        kept = {key: value for key, value in row.items() if key != "images"}
        return kept | {"image": row.get("image_hash") or " ".join(hashes) or None}

    rows = [[content(row) for row in part] for part in parts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
