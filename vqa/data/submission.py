"""The submission: columns, order, ids and form of the answers as in the sample submission.

Without a sample it is `id,answer` with letters. A sample's answers are placeholders, so they show a form (`A`, `0`,
`(a)`, the text of a choice, one probability column per choice) and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.data.answers import FORMS, AnswerForm, clean, letter, possible_forms
from vqa.data.columns import ALIASES, normalize
from vqa.data.predictions import is_prediction_file, letters
from vqa.data.table import align_ids, read_table, write_table

_PROBABILITY = re.compile(r"(?:(?:p|prob|probability|option|choice|score)_?)?([a-z]|\d{1,2})")


@dataclass(frozen=True)
class SubmissionForm:
    """What a sample submission asks for: its table, the id column, and an answer column or probability columns."""

    table: pd.DataFrame
    id: str
    answer: str | None
    probabilities: tuple[str, ...]
    form: AnswerForm

    def __str__(self) -> str:
        what = (
            f"{self.answer!r} as {self.form}" if self.answer else f"probabilities in {', '.join(self.probabilities)}"
        )
        return f"ids in {self.id!r}, {what}"


def read_submission_form(
    sample: str | Path,
    ids: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    train_form: AnswerForm | None = None,
    kind: str | None = None,
) -> SubmissionForm:
    """What `sample` asks for, for rows `ids` whose choices are known (id -> texts).

    `train_form` is how the training file writes answers; `kind`, one of FORMS, decides where the sample does not.
    Raises UserError where the sample has other ids, contradicts the training answers or can be read in two ways.
    """
    table = read_table(sample, ())
    id_column = _id_column(sample, table, ids)
    others = [name for name in table.columns if name != id_column]
    answer = [name for name in others if normalize(name) in ALIASES["answer"]] or others
    probabilities = () if len(answer) == 1 else _probability_columns(table, others)
    if probabilities:
        return SubmissionForm(table, id_column, None, probabilities, AnswerForm("letter"))
    if len(answer) != 1:
        raise UserError(_not_understood(sample, table, "which column is the answer", train_form))
    offered = [choices.get(row_id, ()) for row_id in table[id_column]]
    form = _answer_form(sample, table, answer[0], offered, train_form, kind)
    return SubmissionForm(table, id_column, answer[0], (), form)


def _id_column(sample: str | Path, table: pd.DataFrame, ids: Sequence[str]) -> str:
    """The column whose cells are the predicted ids."""
    wanted = set(ids)
    for name in table.columns:
        if len(table) == len(wanted) and set(table[name]) == wanted:
            return name
    named = [name for name in table.columns if normalize(name) in ALIASES["id"]] or list(table.columns[:1])
    found = list(table[named[0]])
    if missing := [row_id for row_id in found if row_id not in wanted]:
        raise UserError(f"{sample}: {len(missing)} of its ids have no prediction: {preview(missing)}. Predict them.")
    extra = [row_id for row_id in ids if row_id not in set(found)]
    if extra:
        raise UserError(
            f"{sample}: {len(extra)} predicted ids are not in it: {preview(extra)}. Give the sample of this contest."
        )
    raise UserError(f"{sample}: ids occur twice in column {named[0]!r}. Give the contest's own sample.")


def _probability_columns(table: pd.DataFrame, names: Sequence[str]) -> tuple[str, ...]:
    """One column per choice, in the choices' order; empty where the columns are something else."""
    places = {}
    for name in names:
        if match := _PROBABILITY.fullmatch(normalize(name)):
            places[int(match[1]) if match[1].isdigit() else ord(match[1]) - ord("a")] = name
    first = min(places, default=2)
    if len(places) < 2 or first > 1 or sorted(places) != list(range(first, first + len(places))):
        return ()
    return tuple(places[place] for place in sorted(places))


def _answer_form(
    sample: str | Path,
    table: pd.DataFrame,
    column: str,
    offered: Sequence[Sequence[str]],
    train_form: AnswerForm | None,
    kind: str | None,
) -> AnswerForm:
    """How the sample writes answers: the one form that reads and rewrites every cell of it.

    A text may be the placeholder of rows that do not offer it.
    """
    cells = list(table[column])
    if not any(clean(cell) for cell in cells):  # a sample without placeholders
        return train_form or AnswerForm(kind or "letter")
    forms = [
        form
        for form, indices in possible_forms(cells, offered).items()
        if all(clean(form.write(i, texts)) == clean(cell) for i, texts, cell in zip(indices, offered, cells))
    ]
    texts = {clean(text) for choices in offered for text in choices}
    if not forms and all(clean(cell) in texts for cell in cells):
        forms = [AnswerForm("text")]
    if kind:
        return next((form for form in forms if form.kind == kind), AnswerForm(kind))
    if len(forms) > 1 and train_form and train_form.kind in {form.kind for form in forms}:
        forms = [form for form in forms if form.kind == train_form.kind]
    numbers = {form.kind for form in forms if form.kind.startswith("number")}
    if train_form and train_form.kind.startswith("number") and numbers and train_form.kind not in numbers:
        raise UserError(_not_understood(sample, table, "whether numbers start at 0 or at 1", train_form))
    if len(forms) != 1:
        raise UserError(_not_understood(sample, table, f"the form of {column!r}", train_form))
    return forms[0]


def _not_understood(sample: str | Path, table: pd.DataFrame, what: str, train_form: AnswerForm | None) -> str:
    rows = "; ".join(", ".join(map(str, row)) for row in table.head(3).itertuples(index=False))
    trained = f" The training answers are written as {train_form}." if train_form else ""
    return (
        f"{sample}: it does not say {what}. Its first rows are: {', '.join(table.columns)}: {rows}.{trained} "
        f"Give --answer_form, one of {', '.join(FORMS)}."
    )


def write_submission(
    path: str | Path,
    ids: Sequence[str],
    probabilities: np.ndarray,
    form: SubmissionForm | None = None,
    choices: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write `probabilities` (rows, letters) in the form of the sample, or as `id,answer` where `form` is None."""
    if form is None:
        table = pd.DataFrame({"id": ids, "answer": letters(probabilities)})
    else:
        place = dict(zip(ids, probabilities))
        table = form.table.copy()
        rows = [place[row_id] for row_id in table[form.id]]
        if form.answer:
            offered = [(choices or {}).get(row_id) or [""] * len(row) for row_id, row in zip(table[form.id], rows)]
            table[form.answer] = [form.form.write(int(row.argmax()), texts) for row, texts in zip(rows, offered)]
        else:
            width = len(form.probabilities)
            if probabilities[:, width:].any():
                raise UserError(
                    f"the sample has {width} probability columns and the test rows offer up to "
                    f"{letter(int(np.flatnonzero(probabilities.any(0))[-1]))}. Give the sample of this contest."
                )
            values = np.pad(np.stack(rows), ((0, 0), (0, max(0, width - probabilities.shape[1]))))[:, :width]
            for i, name in enumerate(form.probabilities):
                table[name] = values[:, i]
    write_table(path, table, float_format="%.17g")


def check_offered(
    test_csv: str | Path, ids: Sequence[str], probabilities: np.ndarray, choices: Mapping[str, Sequence[str]]
) -> None:
    """Raise UserError unless the ids are those of the test file and letters that a row does not offer have 0."""
    align_ids(test_csv, list(choices), ids, "the predictions", "Predict this file again.")
    offered = np.array([len(choices[row_id]) for row_id in ids])
    beyond = (probabilities > 0) & (np.arange(probabilities.shape[1]) >= offered[:, None])
    if wrong := [ids[int(i)] for i in np.flatnonzero(beyond.any(1))]:
        raise UserError(
            f"{test_csv}: {len(wrong)} rows do not offer letters that were predicted: {preview(wrong)}. Predict again."
        )


def read_previous(path: str | Path) -> pd.DataFrame | None:
    """The submission that is at `path` already. Raises UserError where the file is something else."""
    if not Path(path).is_file():
        return None
    if is_prediction_file(path):
        raise UserError(f"{path} exists and is not a submission. Set another --output.")
    return read_table(path, ())


def count_changes(before: pd.DataFrame, after: pd.DataFrame) -> int | None:
    """Rows that differ between two submissions; None where they have other columns or ids."""
    if list(before.columns) != list(after.columns) or set(before.iloc[:, 0]) != set(after.iloc[:, 0]):
        return None
    first, second = (table.set_index(table.columns[0]).sort_index() for table in (before, after))
    return int((first != second).any(axis=1).sum())
