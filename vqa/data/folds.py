"""The folds file, `id,fold`: written once, read by every script, an error where it does not match the CSV."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError
from vqa.data.table import align_ids, read_table, write_table


def assign_folds(answers: Sequence[int], groups: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int (rows,): stratified by answer, the rows of a group (`image_groups`) in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    if not 2 <= folds <= len(set(groups)):
        raise UserError(
            f"{folds} folds cannot be made of {len(set(groups))} different images. Set --folds from 2 to that number."
        )
    if folds > (most := np.bincount(answers).max()):
        raise UserError(
            f"{folds} folds cannot be stratified where no answer occurs more than {most} times. Set fewer --folds."
        )
    result = np.empty(len(answers), dtype=int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # about answers too rare for every fold; make_folds.py prints the table of them
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(answers)), answers, groups)):
            result[rows] = fold
    return result


def write_folds(path: str | Path, ids: Sequence[str], folds: np.ndarray) -> None:
    write_table(path, pd.DataFrame({"id": ids, "fold": folds}))


def read_folds(path: str | Path, ids: Sequence[str], csv_path: str | Path) -> np.ndarray:
    """Fold of each of `ids`, int (rows,). Raises UserError unless the file has exactly the ids of the CSV."""
    remedy = f"Make the folds again for {csv_path}: `python make_folds.py ARGS.json --overwrite`."
    if not Path(path).is_file():
        raise UserError(f"{path}: no folds file. {remedy}")
    table = read_table(path, ("id", "fold"))
    positions = align_ids(path, list(table["id"]), ids, csv_path, remedy)
    if not table["fold"].str.isdigit().all():
        raise UserError(f"{path}: a fold is not a whole number from 0 on. {remedy}")
    return table["fold"].to_numpy(dtype=int)[positions]


def split_fold(folds: np.ndarray, fold: int, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation rows of one fold; `path` is the folds file, for the message."""
    if fold not in set(folds):
        raise UserError(
            f"fold {fold} is not in {path}, which has folds 0 to {folds.max()}. Change `fold`, or make more folds: "
            "`python make_folds.py ARGS.json --folds N --overwrite`."
        )
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
