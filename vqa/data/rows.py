"""Read and check the contest's files: the one place where rows come from.

Contests write their files in many forms. `vqa/data/columns.py` finds the columns, `vqa/data/answers.py` reads the
answers and `vqa/data/image_paths.py` finds the images. Whatever two readings are possible of is an error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import TypedDict

import pandas as pd

from vqa.core.errors import UserError, pluralize, preview
from vqa.data.answers import AnswerForm, find_answer_form
from vqa.data.columns import Columns, find_columns
from vqa.data.image_paths import ImageFinder, escapes
from vqa.data.table import check_ids, parse_list, read_table

LETTERS = ascii_lowercase  # the letter of each choice in the prompt


class Row(TypedDict, total=False):
    """One question about its images. `read_rows` fills the first part; later steps add the rest to copies of a row."""

    id: str
    images: list[str]  # paths of the files, in the order shown; none: answer from the text alone
    question: str
    choices: list[str]  # the texts offered, in the order of the columns a, b, ...
    answer: int  # index of the right choice
    annotators: list[float]  # share of the annotators that chose each choice
    paraphrases: list[str]  # other ways to ask the question

    target: list[float]  # soft label: probability of each choice
    weight: float  # of the row's loss; 1 if not given
    permutation: list[int]  # index of the choice shown at each letter; [2, 0, 1] shows the third choice at letter a
    permutations: list[list[int]]  # several of them, scored in one pass that shares the prompt's beginning
    views: list[int]  # the test-time view that each of `permutations` belongs to
    paraphrase: int  # which paraphrase replaces the question; 0: the question itself
    scale: float  # side of each image relative to the pixel budget's
    flip: bool  # mirror each image
    crops: list[int]  # indices of the images that are shown once more in four parts, after all images
    image_hash: str | None  # SHA-256 of the image file; of several files, joined by spaces
    note: str  # remark for the prediction file, such as a broken image


@dataclass(frozen=True)
class Contest:
    """A contest's file as it was understood. `form`: how it writes answers, None where answers were not read."""

    path: str | Path
    rows: list[Row]
    columns: Columns
    form: AnswerForm | None

    def summary(self) -> str:
        """One line: what was understood, and what is not used."""
        counts = Counter(len(row["choices"]) for row in self.rows)
        offered = " or ".join(str(count) for count in sorted(counts))
        parts = [f"{self.path}: {pluralize(len(self.rows), 'row')} of {offered} choices", str(self.columns)]
        if self.form:
            parts.append(f"answers as {self.form}")
        if several := sum(len(row["images"]) > 1 for row in self.rows):
            parts.append(f"{pluralize(several, 'row')} with several images")
        if text_only := sum(not row["images"] for row in self.rows):
            parts.append(f"{pluralize(text_only, 'row')} without an image, asked by their text alone")
        return "; ".join(parts)


def read_rows(path: str | Path, image_root: str | Path | None = None, with_answer: bool = False, **form) -> list[Row]:
    """The rows of `read_contest`."""
    return read_contest(path, image_root, with_answer, **form).rows


def read_questions(path: str | Path, columns: Mapping | str | None = None) -> dict[str, Row]:
    """id -> row with its question and choices; images and answers are not looked at."""
    table = read_table(path, ())
    return {row["id"]: row for row in read_texts(path, table, find_columns(path, list(table.columns), columns))}


def read_contest(
    path: str | Path,
    image_root: str | Path | None = None,
    with_answer: bool = False,
    columns: Mapping | str | None = None,
    answer_form: str | None = None,
) -> Contest:
    """Read and check a contest's file: CSV, TSV, JSON, JSON lines or Parquet.

    Each row has `id`, `images`, `question` and `choices`; `with_answer`, also `answer`, and `annotators` where the
    file has columns `answer1, answer2, ...`. `paraphrases` are the columns `question_1, question_2, ...`, if any.
    `columns` (role -> column) and `answer_form` decide where the file alone does not. Raises UserError, which names
    the file and the row, for whatever cannot be used.
    """
    table = read_table(path, ())
    found = find_columns(path, list(table.columns), columns)
    rows = read_texts(path, table, found)
    images = _find_images(path, table[list(found.paths)].to_dict("split")["data"], rows, image_root)
    for row, own in zip(rows, images):
        row["images"] = own
    form = add_answers(path, rows, table, found, answer_form) if with_answer else None
    return Contest(path, rows, found, form)


def read_texts(path: str | Path, table: pd.DataFrame, found: Columns) -> list[Row]:
    """The rows of a table with ids, questions, choices and paraphrases."""
    choices = found.choices if len(found.choices) > 1 else ()
    for name in (found.question, *choices, *found.paraphrases):
        if nested := [i for i, cell in enumerate(table[name], start=1) if not isinstance(cell, str)]:
            raise UserError(
                f"{path}: {name} is a list in {pluralize(len(nested), 'row')} (row {preview(nested)}). Write text."
            )
    ids = list(table[found.id]) if found.id else [str(number) for number in range(len(table))]
    check_ids(path, ids)
    rows: list[Row] = []
    for row_id, cells in zip(ids, table.astype(object).to_dict("records")):  # arrow strings are slow to iterate
        place = f"{path}: row {len(rows) + 1} (id {row_id})"
        row = Row(
            id=row_id,
            images=[],
            question=cells[found.question],
            choices=_choices(place, [cells[name] for name in found.choices]),
        )
        if not row["question"].strip():
            raise UserError(f"{place}: the question is empty. Write one, or delete the row.")
        if found.paraphrases:
            row["paraphrases"] = [cells[name] for name in found.paraphrases if cells[name].strip()]
        rows.append(row)
    return rows


def add_answers(
    path: str | Path, rows: Sequence[Row], table: pd.DataFrame, found: Columns, kind: str | None
) -> AnswerForm:
    """Set `answer`, and `annotators` where there are some; returns how the file writes answers.

    Blank annotators do not count. Where `answer` is blank or not a column, the answer is the choice with the most
    votes; of a tie, the one that was chosen first in the order of the columns. Where no annotator answered, `answer`
    is the only vote.
    """
    names = [name for name in (found.answer, *found.annotators) if name]
    if not names:
        raise UserError(
            f"{path}: no column for the answer (header: {', '.join(table.columns)}). Name it in the args file: "
            '"columns": {"answer": "..."}.'
        )
    cells = [(i, name, cell) for name in names for i, cell in enumerate(table[name]) if str(cell).strip()]
    if blank := [rows[i]["id"] for i in sorted(set(range(len(rows))) - {i for i, _, _ in cells})]:
        raise UserError(
            f"{path}: {pluralize(len(blank), 'row')} without an answer in {' or '.join(names)}: {preview(blank)}. "
            "Fill them in, or delete the rows."
        )
    places = [(i + 1, rows[i]["id"], name) for i, name, _ in cells]
    offered = [rows[i]["choices"] for i, _, _ in cells]
    form, indices = find_answer_form(path, places, [cell for _, _, cell in cells], offered, kind)
    answers = {(i, name): index for (i, name, _), index in zip(cells, indices)}
    for i, row in enumerate(rows):
        votes = [answers[i, name] for name in found.annotators if (i, name) in answers]
        answered = found.answer and (i, found.answer) in answers
        row["answer"] = answers[i, found.answer or ""] if answered else max(votes, key=votes.count)
        if found.annotators:
            votes = votes or [row["answer"]]
            row["annotators"] = [votes.count(choice) / len(votes) for choice in range(len(row["choices"]))]
    return form


def rows_with_equal_choices(rows: Sequence[Row]) -> list[str]:
    """Ids of the rows that offer the same text twice: their score says nothing about the model."""
    texts = ([choice.strip() for choice in row["choices"]] for row in rows)
    return [row["id"] for row, choices in zip(rows, texts) if len(set(choices)) < len(choices)]


def _find_images(
    path: str | Path, cells: Sequence[Sequence], rows: Sequence[Row], image_root: str | Path | None
) -> list[list[str]]:
    """The image files of each row, in the order of the columns and of the names within a cell."""
    finder = ImageFinder(image_root or Path(path).parent)
    images, outside = [], []
    for row, row_cells in zip(rows, cells):
        names = [name for cell in row_cells for name in finder.split(cell)]
        outside += [f"{name!r} (id {row['id']})" for name in names if escapes(name)]
        try:
            images.append([finder.find(name) for name in names if not outside])
        except UserError as error:
            raise UserError(f"{path}: id {row['id']}: {error}") from None
    if outside:
        raise UserError(
            f"{path}: {len(outside)} image paths lead out of {finder.root}: {preview(outside)}. Write them relative "
            "to that folder, or set another folder with --image_root."
        )
    return images


def _choices(place: str, cells: Sequence[object]) -> list[str]:
    """The choices of a row: at least two. Blank cells may only be the last ones."""
    if len(cells) == 1:  # one column of lists
        text, listed = str(cells[0])[:60], parse_list(cells[0])
        if listed is None:
            raise UserError(f'{place}: the choices {text!r} are not a list. Write them as ["red", "blue"].')
        cells = listed
    texts = [str(cell) for cell in cells]
    filled = [bool(text.strip()) for text in texts]
    offered = sum(filled)
    if offered < 2:
        raise UserError(f"{place}: only {offered} choices are filled in. Give at least two.")
    if not all(filled[:offered]):
        gap = LETTERS[filled.index(False)]
        raise UserError(f"{place}: choice {gap} is blank but a later one is not. Move the later choices up.")
    if offered > len(LETTERS):
        raise UserError(f"{place}: it offers {offered} choices. At most {len(LETTERS)} are possible.")
    return texts[:offered]
