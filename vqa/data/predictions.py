"""Prediction files: `id,answer,p_a,p_b,...`, probabilities that sum to 1 over the choices that a row offers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid, csv

from vqa.core.errors import UserError, preview
from vqa.core.io import read_json
from vqa.data.rows import LETTERS, Row
from vqa.data.table import align_ids, check_ids, read_table, write_table

COLUMNS = ("id", "answer", "p_a", "p_b")  # every prediction file has them
SURELY_OFFERED = 0.01  # no program rounds a probability above this to 0


def write_predictions(path: str | Path, rows: Sequence[Row], probabilities: np.ndarray) -> None:
    """Write probabilities (rows, letters) of `rows` in their order, with the likeliest letter as answer.

    Where a row has a `note`, the file gets a last column of that name.
    """
    width, notes = max(len(row["choices"]) for row in rows), [row.get("note", "") for row in rows]
    write_probabilities(path, [row["id"] for row in rows], probabilities[:, :width], notes)


def write_probabilities(
    path: str | Path, ids: Sequence[str], probabilities: np.ndarray, notes: Sequence[str] = ()
) -> None:
    """`write_predictions` from ids alone; every column of `probabilities` is written."""
    table = pd.DataFrame({"id": ids, "answer": letters(probabilities)})
    for letter, column in zip(LETTERS, probabilities.T):
        table[f"p_{letter}"] = column
    if any(notes):
        table["note"] = notes
    write_table(path, table, float_format="%.17g")


def read_predictions(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities float64 (rows, 10)) of a prediction file. Raises UserError where it is not one."""
    ids, values = _read(path)
    return ids, np.pad(values, ((0, 0), (0, len(LETTERS) - values.shape[1])))


def _read(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities float64 (rows, probability columns)), checked."""
    table = _read_with_pyarrow(path)
    if table is None:
        table = read_table(path, COLUMNS)
    names = [name for name in table.columns if name.startswith("p_")]
    if names != [f"p_{letter}" for letter in LETTERS[: len(names)]]:
        raise UserError(f"{path}: the probability columns are {preview(names, 10)}. Name them p_a, p_b, ... in order.")
    try:
        ids, values = list(table["id"]), table[names].astype(float).to_numpy()
    except ValueError as error:
        raise UserError(f"{path}: a probability is not a number ({error}). Predict again.") from None
    check_ids(path, ids, "Predict again.")
    wrong = ~np.isfinite(values).all(1) | (values < 0).any(1) | (abs(values.sum(1) - 1) > 1e-6)
    if wrong.any():
        bad = [ids[i] for i in np.flatnonzero(wrong)]
        raise UserError(f"{path}: {len(bad)} rows whose probabilities do not sum to 1: {preview(bad)}. Predict again.")
    return ids, values


def _read_with_pyarrow(path: str | Path) -> pd.DataFrame | None:
    """The table, ten times as fast as `read_table`; None for a file that only `read_table` can read or explain."""
    types = {"id": "string"} | {f"p_{letter}": "float64" for letter in LETTERS}
    convert = csv.ConvertOptions(column_types=types, null_values=[])
    try:
        table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    except (ArrowInvalid, OSError):
        return None
    names = set(table.column_names)
    return table.to_pandas() if table.num_rows and names >= set(COLUMNS) and len(names) == table.num_columns else None


def join(files: Sequence[str | Path]) -> tuple[list[str], np.ndarray]:
    """(ids in the first file's order, probabilities (files, rows, letters)) of prediction files, joined by id.

    Raises UserError where ids are missing or extra, and where a file has other choices.
    """
    ids, first = _read(files[0])
    stack = np.empty((len(files), *first.shape))
    stack[0] = first
    for number, path in enumerate(files[1:], start=1):
        file_ids, values = _read(path)
        if values.shape[1] != first.shape[1]:
            raise UserError(
                f"{path}: it has {values.shape[1]} choices and {files[0]} has {first.shape[1]}. Predict the same CSV."
            )
        if file_ids != ids:
            values = values[align_ids(path, file_ids, ids, files[0], "Predict again.")]
        stack[number] = values
        differ = ((values == 0) & (first > SURELY_OFFERED) | (first == 0) & (values > SURELY_OFFERED)).any(1)
        if differ.any():
            rows = [ids[i] for i in np.flatnonzero(differ)]
            raise UserError(
                f"{path}: {len(rows)} rows have other choices than in {files[0]}: {preview(rows)}. "
                "Predict the same CSV."
            )
    return ids, stack


def letters(probabilities: np.ndarray) -> list[str]:
    """The likeliest letter of each row of probabilities (rows, letters)."""
    return [LETTERS[i] for i in probabilities.argmax(1)]


def read_card(path: str | Path) -> dict:
    """The JSON file that predict.py writes beside a prediction file; empty where there is none."""
    card = Path(path).with_suffix(".json")
    return read_json(card) if card.is_file() else {}


def validation_scores(files: Sequence[str | Path], by: str) -> list[float]:
    """Each file's out-of-fold accuracy or log-loss, as training measured it."""
    scores: list = [(read_card(path).get("validation") or {}).get(by) for path in files]
    if unknown := [str(path) for path, score in zip(files, scores) if score is None]:
        raise UserError(f"{preview(unknown)}: no out-of-fold score beside it. Use --method mean, or predict again.")
    return scores


def is_prediction_file(path: str | Path) -> bool:
    """Whether a file has the columns of a prediction file; `outputs/*.csv` may match a submission too."""
    with open(path, encoding="utf-8-sig") as file:
        return set(COLUMNS) <= set(file.readline().strip().split(","))
