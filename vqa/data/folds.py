"""The folds file: `id,fold`, made once, read by every script, refused where it does not match the CSV."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.hashing import hash_files
from vqa.core.io import atomic_write
from vqa.data.table import read_table


def assign_folds(answers: Sequence[int], images: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """Fold of each row, int (rows,): stratified by answer, rows with byte-identical images in one fold."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    groups = hash_files(images)
    if not 2 <= folds <= len(set(groups)):
        raise UserError(f"{folds} folds cannot be made of {len(set(groups))} different images; give --folds from 2 on")
    if folds > (most := np.bincount(answers).max()):
        raise UserError(
            f"{folds} folds cannot be stratified where no answer occurs more than {most} times; give fewer"
        )
    result = np.empty(len(answers), dtype=int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of answers too rare for every fold: the table that is printed shows them
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(answers)), answers, groups)):
            result[rows] = fold
    return result


def write_folds(path: str | Path, ids: Sequence[str], folds: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        pd.DataFrame({"id": ids, "fold": folds}).to_csv(temporary, index=False, lineterminator="\n")


def read_folds(path: str | Path, ids: Sequence[str], csv_path: str | Path) -> np.ndarray:
    """Fold of each of `ids`, int (rows,). Raises UserError where the file does not hold exactly these ids."""
    remake = f"make it anew for {csv_path}: `python make_folds.py ARGS.json --overwrite`"
    if not Path(path).is_file():
        raise UserError(f"{path}: no folds file; {remake}")
    table = read_table(path, ("id", "fold"))
    if table["id"].duplicated().any():
        raise UserError(f"{path}: the same id stands there twice; {remake}")
    found = dict(zip(table["id"], table["fold"]))
    if missing := [row_id for row_id in ids if row_id not in found]:
        raise UserError(f"{path}: {len(missing)} ids of {csv_path} are not in it ({preview(missing)}); {remake}")
    known = set(ids)
    if extra := [row_id for row_id in found if row_id not in known]:
        raise UserError(f"{path}: {len(extra)} of its ids are not in {csv_path} ({preview(extra)}); {remake}")
    if not all(fold.isdigit() for fold in found.values()):
        raise UserError(f"{path}: a fold has to be a whole number from 0 on; {remake}")
    return np.array([int(found[row_id]) for row_id in ids])


def split_fold(folds: np.ndarray, fold: int, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) as indices, for one fold of the file at `path`."""
    if fold not in set(folds):
        raise UserError(
            f"fold {fold} is not in {path}, which has folds 0 to {folds.max()}; change `fold`, or make more: "
            "`python make_folds.py ARGS.json --folds N --overwrite`"
        )
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
