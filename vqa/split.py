"""Which rows a run trains on, and which it validates on."""

import numpy as np

from vqa.args_files import DataArguments, folds_file
from vqa.errors import UserError
from vqa.folds import read_folds, split_fold
from vqa.pseudo import pseudo_rows


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
