"""Prediction files (`id,answer,p_a,p_b,...`), their ensembles, and the submission that comes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.errors import UserError, first_few
from vqa.files import read_json, whole
from vqa.prompt import LETTERS
from vqa.rows import read_table

METHODS = ("mean", "majority", "weighted")


def write_predictions(path: str | Path, rows: Sequence[dict], probabilities: np.ndarray) -> None:
    """Write probabilities (rows, letters) of `rows` in their order, with the likeliest letter as answer."""
    width = max(len(row["choices"]) for row in rows)
    table = pd.DataFrame({"id": [row["id"] for row in rows], "answer": letters(probabilities)})
    for i in range(width):
        table[f"p_{LETTERS[i]}"] = probabilities[:, i]
    with whole(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", float_format="%.17g")


def read_predictions(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities float64 (rows, 10)) of a prediction file. Raises UserError where it is not one."""
    table = read_table(path, ("id", "answer", "p_a", "p_b"))
    names = [name for name in table.columns if name.startswith("p_")]
    if names != [f"p_{letter}" for letter in LETTERS[: len(names)]]:
        raise UserError(f"{path}: the probability columns are {first_few(names, 10)}; they go p_a, p_b, ... in order")
    if table["id"].duplicated().any():
        twice = list(table["id"][table["id"].duplicated()].unique())
        raise UserError(f"{path}: {len(twice)} ids stand there twice: {first_few(twice)}; predict again")
    try:
        values = table[names].astype(float).to_numpy()
    except ValueError as error:
        raise UserError(f"{path}: a probability is not a number ({error}); predict again") from None
    wrong = ~np.isfinite(values).all(1) | (values < 0).any(1) | (abs(values.sum(1) - 1) > 1e-6)
    if wrong.any():
        bad = list(table["id"][wrong])
        raise UserError(
            f"{path}: {len(bad)} rows whose probabilities do not sum to 1: {first_few(bad)}; predict again"
        )
    return list(table["id"]), np.pad(values, ((0, 0), (0, len(LETTERS) - len(names))))


def is_submission(path: str | Path) -> bool:
    """Whether a CSV has just the columns of a submission, so that `outputs/*.csv` may hold an earlier one."""
    with open(path, encoding="utf-8-sig") as file:
        return file.readline().strip() == "id,answer"


def join(files: Sequence[str | Path]) -> tuple[list[str], np.ndarray]:
    """(ids in the first file's order, probabilities (files, rows, 10)) of prediction files, joined by id."""
    ids, first = read_predictions(files[0])
    stack = [first]
    for path in files[1:]:
        other, values = read_predictions(path)
        place = {row_id: i for i, row_id in enumerate(other)}
        if missing := [row_id for row_id in ids if row_id not in place]:
            raise UserError(
                f"{path}: {len(missing)} ids of {files[0]} are missing: {first_few(missing)}; predict again"
            )
        if len(other) > len(ids):
            extra = sorted(set(other) - set(ids))
            raise UserError(f"{path}: {len(extra)} ids are not in {files[0]}: {first_few(extra)}; predict again")
        stack.append(values[[place[row_id] for row_id in ids]])
    return ids, np.stack(stack)


def ensemble(stack: np.ndarray, method: str, weights: Sequence[float] | None = None) -> np.ndarray:
    """One set of probabilities (rows, 10) out of `stack` (files, rows, 10).

    mean: of the probabilities. weighted: the same with `weights` (files,). majority: the share of the files' votes,
    ties going to the letter of the larger mean probability.
    """
    if method == "majority":
        votes = (stack.argmax(-1)[..., None] == np.arange(stack.shape[-1])).mean(0)
        # Votes are multiples of 1 / files, so a share this small can order ties and nothing else.
        share = 1e-3 / len(stack)
        return (1 - share) * votes + share * stack.mean(0)
    return np.average(stack, axis=0, weights=weights if method == "weighted" else None)


def letters(probabilities: np.ndarray) -> list[str]:
    """The likeliest letter of each row."""
    return [LETTERS[i] for i in probabilities.argmax(1)]


def write_submission(
    path: str | Path, ids: Sequence[str], probabilities: np.ndarray, sample: str | Path | None
) -> None:
    """Write `id,answer`, in the order of the sample submission where one is given and with just its ids."""
    answers = dict(zip(ids, letters(probabilities)))
    order = list(ids)
    if sample is not None:
        order = list(read_table(sample, ("id",))["id"])
        if missing := [row_id for row_id in order if row_id not in answers]:
            raise UserError(
                f"{sample}: {len(missing)} of its ids are not predicted: {first_few(missing)}; predict them"
            )
        if extra := sorted(set(answers) - set(order)):
            raise UserError(
                f"{sample}: {len(extra)} predicted ids are not in it: {first_few(extra)}; is it this contest's?"
            )
    with whole(path) as temporary:
        pd.DataFrame({"id": order, "answer": [answers[row_id] for row_id in order]}).to_csv(
            temporary, index=False, lineterminator="\n"
        )


def read_card(path: str | Path) -> dict:
    """What predict.py noted beside a prediction file; empty where the file came without it."""
    card = Path(path).with_suffix(".json")
    return read_json(card) if card.is_file() else {}


def validation_weights(files: Sequence[str | Path], by: str) -> list[float]:
    """Weights that sum to 1: each file's out-of-fold accuracy, or the inverse of its out-of-fold log-loss."""
    scores = [(read_card(path).get("validation") or {}).get(by) for path in files]
    if unknown := [str(path) for path, score in zip(files, scores) if score is None]:
        raise UserError(f"{first_few(unknown)}: no out-of-fold score beside it; use --method mean, or predict again")
    raw = np.array(scores, dtype=float)
    raw = raw if by == "accuracy" else 1 / np.maximum(raw, 1e-9)
    return [float(weight) for weight in raw / raw.sum()]
