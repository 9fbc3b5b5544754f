"""The submission file, checked against the sample submission and the test file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.io import atomic_write
from vqa.data.predictions import letters
from vqa.data.rows import LETTERS
from vqa.data.table import align_ids, read_table


def is_submission(path: str | Path) -> bool:
    """Whether a CSV has exactly the columns of a submission; `outputs/*.csv` may match an earlier one."""
    with open(path, encoding="utf-8-sig") as file:
        return file.readline().strip() == "id,answer"


def check_offered(test_csv: str | Path, ids: Sequence[str], probabilities: np.ndarray) -> None:
    """Raise UserError unless the ids are those of the test CSV and letters that a row does not offer have 0."""
    table = read_table(test_csv, ("id", "a", "b"))
    names = [letter for letter in LETTERS if letter in table.columns]
    positions = align_ids(test_csv, list(table["id"]), ids, "the predictions", "Predict this file again.")
    blank = np.column_stack([table[name].str.strip() == "" for name in names])[positions]
    width = probabilities.shape[1]
    blank = np.pad(blank, ((0, 0), (0, max(0, width - blank.shape[1]))), constant_values=True)[:, :width]
    if wrong := [ids[i] for i in np.flatnonzero(((probabilities > 0) & blank).any(1))]:
        raise UserError(
            f"{test_csv}: {len(wrong)} rows do not offer letters that were predicted: {preview(wrong)}. Predict again."
        )


def write_submission(
    path: str | Path, ids: Sequence[str], probabilities: np.ndarray, sample: str | Path | None
) -> None:
    """Write `id,answer`: in the order of the sample submission, which must have the same ids, where there is one."""
    table = pd.DataFrame({"id": ids, "answer": letters(probabilities)})
    if sample is not None:
        remedy = "Give the sample submission of the file that you predicted."
        sample_ids = list(read_table(sample, ("id",))["id"])
        table = table.iloc[np.argsort(align_ids(sample, sample_ids, ids, "the predictions", remedy))]
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def previous_answers(path: str | Path) -> dict[str, str]:
    """id -> answer of the submission at `path`; empty where there is no file."""
    if not Path(path).is_file():
        return {}
    if not is_submission(path):
        raise UserError(f"{path} exists and is not a submission. Set another --output.")
    table = read_table(path, ("id", "answer"))
    return dict(zip(table["id"], table["answer"]))
