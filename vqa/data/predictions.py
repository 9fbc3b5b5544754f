"""Prediction files (`id,answer,p_a,p_b,...`) and the submission that comes of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid, csv

from vqa.core.errors import UserError, preview
from vqa.core.io import atomic_write, read_json
from vqa.data.prompt import LETTERS
from vqa.data.table import read_table

SURELY_OFFERED = 0.01  # no file of another program rounds this to 0


def write_predictions(path: str | Path, rows: Sequence[dict], probabilities: np.ndarray) -> None:
    """Write probabilities (rows, letters) of `rows` in their order, with the likeliest letter as answer.

    Rows that have a `note` give a last column of that name.
    """
    width, notes = max(len(row["choices"]) for row in rows), [row.get("note", "") for row in rows]
    write_probabilities(path, [row["id"] for row in rows], probabilities[:, :width], notes)


def write_probabilities(
    path: str | Path, ids: Sequence[str], probabilities: np.ndarray, notes: Sequence[str] = ()
) -> None:
    """The same of bare ids, with a column for each of the letters (rows, letters)."""
    table = pd.DataFrame({"id": ids, "answer": letters(probabilities)})
    for i in range(probabilities.shape[1]):
        table[f"p_{LETTERS[i]}"] = probabilities[:, i]
    if any(notes):
        table["note"] = notes
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.17g")


def read_predictions(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities float64 (rows, 10)) of a prediction file. Raises UserError where it is not one."""
    ids, values = _read(path)
    return ids, np.pad(values, ((0, 0), (0, len(LETTERS) - values.shape[1])))


def _read(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities float64 (rows, probability columns)), checked."""
    ids, names, values = _read_fast(path) or _read_slowly(path)
    if names != [f"p_{letter}" for letter in LETTERS[: len(names)]]:
        raise UserError(f"{path}: the probability columns are {preview(names, 10)}; they go p_a, p_b, ... in order")
    if len(set(ids)) < len(ids):
        twice = [row_id for row_id, times in Counter(ids).items() if times > 1]
        raise UserError(f"{path}: {len(twice)} ids stand there twice: {preview(twice)}; predict again")
    wrong = ~np.isfinite(values).all(1) | (values < 0).any(1) | (abs(values.sum(1) - 1) > 1e-6)
    if wrong.any():
        bad = [ids[i] for i in np.flatnonzero(wrong)]
        raise UserError(f"{path}: {len(bad)} rows whose probabilities do not sum to 1: {preview(bad)}; predict again")
    return ids, values


def _read_fast(path: str | Path) -> tuple[list[str], list[str], np.ndarray] | None:
    """(ids, names of the probability columns, values) by pyarrow, or None where it finds anything amiss."""
    convert = csv.ConvertOptions(
        column_types={"id": "string"} | {f"p_{a}": "float64" for a in LETTERS}, null_values=[]
    )
    try:
        table = csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    except (ArrowInvalid, OSError):
        return None
    names = [name for name in table.column_names if name.startswith("p_")]
    if (
        not table.num_rows
        or not {"id", "answer", "p_a", "p_b"} <= set(table.column_names)
        or len(names) > len(LETTERS)
    ):
        return None
    if len(set(table.column_names)) < table.num_columns or not set(names) <= {f"p_{a}" for a in LETTERS}:
        return None
    return table["id"].to_pylist(), names, np.column_stack([table[name].to_numpy() for name in names])


def _read_slowly(path: str | Path) -> tuple[list[str], list[str], np.ndarray]:
    """The same by the reader that says in one line what is wrong with a file."""
    table = read_table(path, ("id", "answer", "p_a", "p_b"))
    names = [name for name in table.columns if name.startswith("p_")]
    try:
        return list(table["id"]), names, table[names].astype(float).to_numpy()
    except ValueError as error:
        raise UserError(f"{path}: a probability is not a number ({error}); predict again") from None


def join(files: Sequence[str | Path]) -> tuple[list[str], np.ndarray]:
    """(ids in the first file's order, probabilities (files, rows, letters)) of prediction files, joined by id.

    Raises UserError where ids are missing or extra, and where a file has other choices.
    """
    ids, first = _read(files[0])
    stack = np.empty((len(files), *first.shape))
    stack[0] = first
    for number, path in enumerate(files[1:], start=1):
        other, values = _read(path)
        if values.shape[1] != first.shape[1]:
            raise UserError(
                f"{path}: it has {values.shape[1]} choices and {files[0]} has {first.shape[1]}; predict the same CSV"
            )
        if other != ids:
            values = values[_places(ids, other, files[0], path)]
        stack[number] = values
        differ = ((values == 0) & (first > SURELY_OFFERED) | (first == 0) & (values > SURELY_OFFERED)).any(1)
        if differ.any():
            rows = [ids[i] for i in np.flatnonzero(differ)]
            raise UserError(
                f"{path}: {len(rows)} rows have other choices than in {files[0]}: {preview(rows)}; "
                "predict the same CSV"
            )
    return ids, stack


def _places(ids: list[str], other: list[str], first: str | Path, path: str | Path) -> np.ndarray:
    """Where each of `ids` stands in `other`, int (rows,); both have to hold the same."""
    place = pd.Index(other).get_indexer(pd.Index(ids))
    if missing := [ids[i] for i in np.flatnonzero(place < 0)]:
        raise UserError(f"{path}: {len(missing)} ids of {first} are missing: {preview(missing)}; predict again")
    if len(other) > len(ids):
        extra = sorted(set(other) - set(ids))
        raise UserError(f"{path}: {len(extra)} ids are not in {first}: {preview(extra)}; predict again")
    return place


def letters(probabilities: np.ndarray) -> list[str]:
    """The likeliest letter of each row."""
    return [LETTERS[i] for i in probabilities.argmax(1)]


def read_card(path: str | Path) -> dict:
    """What predict.py noted beside a prediction file; empty where the file came without it."""
    card = Path(path).with_suffix(".json")
    return read_json(card) if card.is_file() else {}


def validation_scores(files: Sequence[str | Path], by: str) -> list[float]:
    """Each file's out-of-fold accuracy or log-loss, as training measured it."""
    scores = [(read_card(path).get("validation") or {}).get(by) for path in files]
    if unknown := [str(path) for path, score in zip(files, scores) if score is None]:
        raise UserError(f"{preview(unknown)}: no out-of-fold score beside it; use --method mean, or predict again")
    return scores
