"""The submission file, checked against the sample submission and the test file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.io import atomic_write
from vqa.data.predictions import _places, letters
from vqa.data.prompt import LETTERS
from vqa.data.table import read_table


def is_submission(path: str | Path) -> bool:
    """Whether a CSV has just the columns of a submission, so that `outputs/*.csv` may hold an earlier one."""
    with open(path, encoding="utf-8-sig") as file:
        return file.readline().strip() == "id,answer"


def check_offered(test_csv: str | Path, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Raise UserError unless the ids are those of the test CSV and letters that its rows do not offer have 0."""
    table = read_table(test_csv, ("id", "a", "b"))
    names = [letter for letter in LETTERS if letter in table.columns]
    place = _places(list(ids), list(table["id"]), "the predictions", test_csv)
    blank = np.column_stack([table[name].str.strip() == "" for name in names])[place]
    width = probabilities.shape[1]
    blank = np.pad(blank, ((0, 0), (0, max(0, width - blank.shape[1]))), constant_values=True)[:, :width]
    if wrong := [ids[i] for i in np.flatnonzero(((probabilities > 0) & blank).any(1))]:
        raise UserError(
            f"{test_csv}: {len(wrong)} rows do not offer letters that were predicted: {preview(wrong)}; predict again"
        )


def write_submission(
    path: str | Path, ids: Sequence[str], probabilities: np.ndarray, sample: str | Path | None
) -> None:
    """Write `id,answer`, in the order of the sample submission where one is given and with just its ids."""
    answers = dict(zip(ids, letters(probabilities)))
    order = list(ids)
    if sample is not None:
        order = list(read_table(sample, ("id",))["id"])
        if missing := [row_id for row_id in order if row_id not in answers]:
            raise UserError(f"{sample}: {len(missing)} of its ids are not predicted: {preview(missing)}; predict them")
        if extra := sorted(set(answers) - set(order)):
            raise UserError(
                f"{sample}: {len(extra)} predicted ids are not in it: {preview(extra)}; is it this contest's?"
            )
    with atomic_write(path) as temporary:
        pd.DataFrame({"id": order, "answer": [answers[row_id] for row_id in order]}).to_csv(
            temporary, index=False, lineterminator="\n"
        )


def previous_answers(path: str | Path) -> dict[str, str]:
    """id -> answer of the submission that lies at `path`; empty where there is none."""
    if not Path(path).is_file():
        return {}
    if not is_submission(path):
        raise UserError(f"{path} exists and is no submission; give another --output")
    table = read_table(path, ("id", "answer"))
    return dict(zip(table["id"], table["answer"]))
