"""Which rows a run trains on and which it validates on; pseudo-labelled rows; checks for leaks between the two."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vqa.config.arguments import DataArguments, folds_file
from vqa.core.errors import UserError, preview
from vqa.core.hashing import hash_files
from vqa.data.folds import read_folds, split_fold
from vqa.data.predictions import read_predictions
from vqa.data.rows import read_rows


def split_rows(rows: list[dict], data: DataArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows) out of the rows of train_csv; no validation rows where fold is null.

    Pseudo-labelled test rows, where asked for, are training rows beside max_train_rows.
    """
    train, valid = np.arange(len(rows)), np.array([], dtype=int)
    if data.fold is not None:
        path = folds_file(data)
        train, valid = split_fold(read_folds(path, [row["id"] for row in rows], data.train_csv), data.fold, path)
    if data.max_train_rows is not None:
        if data.max_train_rows < 1:
            raise UserError(f"max_train_rows is {data.max_train_rows}; give 1 or more, or leave it out for all rows")
        train = np.sort(np.random.default_rng(seed).permutation(train)[: data.max_train_rows])
    train_rows, valid_rows = [rows[i] for i in train], [rows[i] for i in valid]
    if data.soft_labels:
        train_rows = with_soft_labels(train_rows, data.train_csv)
    return train_rows + pseudo_rows(data, valid_rows), valid_rows


def with_soft_labels(rows: list[dict], csv: str) -> list[dict]:
    """The rows with their annotators' shares as the target of the loss."""
    if "annotators" not in rows[0]:
        raise UserError(f"soft_labels: {csv} has no columns answer1, answer2, ...; add them, or leave soft_labels out")
    return [{**row, "target": row["annotators"]} for row in rows]


def pseudo_rows(data: DataArguments, valid_rows: list[dict]) -> list[dict]:
    """The rows of test_csv to which pseudo_csv gives a choice of at least pseudo_min_confidence; none without it.

    Their `target` is what it says of their choices. Rows that show the very image of a validation row are left out.
    How many are taken is printed; their ids are given a prefix, since a test row may have the id of a training row.
    """
    if data.pseudo_csv is None:
        return []
    test = {row["id"]: row for row in read_rows(data.test_csv, data.image_root)}
    ids, probabilities = read_predictions(data.pseudo_csv)
    if unknown := [row_id for row_id in ids if row_id not in test]:
        raise UserError(
            f"{data.pseudo_csv}: {len(unknown)} of its ids are not in {data.test_csv}: {preview(unknown)}; "
            "predict that file, or name the one it predicts as test_csv"
        )
    if wrong := [i for i, values in zip(ids, probabilities) if values[len(test[i]["choices"]) :].any()]:
        raise UserError(
            f"{data.pseudo_csv}: {len(wrong)} rows have probabilities of choices that {data.test_csv} does not offer: "
            f"{preview(wrong)}; predict again"
        )
    sure = [(test[i], values) for i, values in zip(ids, probabilities) if values.max() >= data.pseudo_min_confidence]
    rows = [labelled(row, values.tolist()) for row, values in sure]
    seen = {row_id for row_id, _ in shared_images(rows, valid_rows)}
    taken = [row for row in rows if row["id"] not in seen]
    which = f"rows with a confidence of {data.pseudo_min_confidence:g} or more"
    if not taken:
        raise UserError(f"{data.pseudo_csv}: it has no {which} to train on; lower pseudo_min_confidence")
    print(
        f"{data.pseudo_csv}: of {len(ids)} rows {len(taken)} are taken as training rows: the {which}"
        + (f", but for {len(seen)} that show an image of a validation row" if seen else "")
    )
    return taken


def labelled(row: dict, probabilities: list[float]) -> dict:
    """A test row as a training row, by the probabilities of its letters."""
    target = probabilities[: len(row["choices"])]
    return {**row, "id": f"pseudo {row['id']}", "answer": target.index(max(target)), "target": target}


def split_problems(train_rows: list[dict], valid_rows: list[dict]) -> list[str]:
    """Whether a row, or the very bytes of an image, stand on both sides."""
    remedy = "make the folds anew: `python make_folds.py ARGS.json --overwrite`"
    problems = []
    if both := sorted({row["id"] for row in train_rows} & {row["id"] for row in valid_rows}):
        problems.append(f"{len(both)} validation rows are training rows too ({preview(both)}); {remedy}")
    elif pairs := shared_images(valid_rows, train_rows):
        named = [f"{a} and {b}" for a, b in pairs]
        problems.append(f"{len(pairs)} validation rows show an image of a training row ({preview(named)}); {remedy}")
    return problems


def shared_images(rows: list[dict], others: list[dict]) -> list[tuple[str, str]]:
    """(id, id of one of the others) for each of `rows` whose image is byte for byte that of one of the others."""
    holder = dict(zip(hash_files([row["image"] for row in others]), (row["id"] for row in others)))
    groups = hash_files([row["image"] for row in rows])
    return [(row["id"], holder[group]) for row, group in zip(rows, groups) if group in holder]


def images_across_folds(rows: list[dict], folds: Sequence[int]) -> list[list[str]]:
    """Ids of the rows that show one image and stand in different folds, a list an image."""
    ids, seen = defaultdict(list), defaultdict(set)
    for row, group, fold in zip(rows, hash_files([row["image"] for row in rows]), folds):
        ids[group].append(row["id"])
        seen[group].add(fold)
    return [ids[group] for group in ids if len(seen[group]) > 1]
