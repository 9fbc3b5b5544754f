"""Read and check the contest's CSV files: the one place where rows come from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.data.prompt import LETTERS

if TYPE_CHECKING:
    from datasets import Dataset
from vqa.data.table import numbered_columns, read_table, require_columns


def read_rows(path: str | Path, image_root: str | Path | None = None, with_answer: bool = False) -> "Dataset":
    """Rows of a contest CSV (`id,path,question,a,b,...` and `answer`), checked.

    Returns a Dataset with `id`, `image` (path of the file), `question`, `choices` (list of the texts offered) and,
    `with_answer`, `answer` (index into `choices`). Where the CSV has other wordings of the question, `paraphrases`
    lists them; where it has annotators, `annotators` is the share of them that chose each choice. Raises UserError,
    naming file and row, for whatever cannot be used.
    """
    from datasets import Dataset  # takes a second to import, and most readers of this module want tables only

    table = read_table(path, ("id", "path", "question", "a", "b"))
    annotators = numbered_columns(table, "answer") if with_answer else []
    paraphrases = numbered_columns(table, "question_")
    if with_answer and not annotators:
        require_columns(path, table, ("answer",))
    names = _choice_columns(path, list(table.columns))
    _check_ids(path, table["id"])
    root = Path(image_root) if image_root else Path(path).parent
    rows, escaping = [], []
    for number, cells in enumerate(table.to_dict("records"), start=1):
        place = f"{path}: row {number} (id {cells['id']})"
        row = {
            "id": cells["id"],
            "image": str(root / cells["path"]),
            "question": cells["question"],
            "choices": _offered(place, [cells[name] for name in names]),
        }
        if not cells["path"].strip() or _escapes(cells["path"]):
            escaping.append(f"{cells['path']!r} (id {cells['id']})")
        if not cells["question"].strip():
            raise UserError(f"{place}: the question is empty; write one or drop the row")
        if paraphrases:
            row["paraphrases"] = [cells[name] for name in paraphrases if cells[name].strip()]
        if annotators:
            row["answer"], row["annotators"] = count_votes(place, cells, annotators, len(row["choices"]))
        elif with_answer:
            row["answer"] = _answer(place, cells["answer"], len(row["choices"]))
        rows.append(row)
    if escaping:
        raise UserError(
            f"{path}: {len(escaping)} image paths are empty or lead out of {root}: {preview(escaping)}; "
            "write them relative to that folder, or give another one as --image_root"
        )
    return Dataset.from_list(rows)


def count_votes(place: str, cells: Mapping[str, str], annotators: list[str], offered: int) -> tuple[int, list[float]]:
    """(index of the row's answer, share of its annotators that chose each of the choices offered).

    Blank annotators do not count. Where `answer` is blank or no column, it is what most annotators chose, and of
    choices with as many votes the one chosen first, in the order of the columns. Where no annotator answered, the
    `answer` is their one vote.
    """
    votes = [_answer(f"{place}, {name}", cells[name], offered) for name in annotators if cells[name].strip()]
    if cells.get("answer", "").strip():
        answer = _answer(place, cells["answer"], offered)
    elif votes:
        answer = max(votes, key=votes.count)
    else:
        raise UserError(f"{place}: neither answer nor one of {preview(annotators)} is filled in; fill one in")
    votes = votes or [answer]
    return answer, [votes.count(choice) / len(votes) for choice in range(offered)]


def rows_with_equal_choices(rows: list[dict]) -> list[str]:
    """Ids of the rows that offer the same text twice: there the score says nothing about the model."""
    texts = ([choice.strip() for choice in row["choices"]] for row in rows)
    return [row["id"] for row, choices in zip(rows, texts) if len(set(choices)) < len(choices)]


def _choice_columns(path: str | Path, columns: list[str]) -> list[str]:
    """The choice columns, `a` up to the last letter before the first gap; a letter beyond the gap is a mistake."""
    letters = [letter for letter in LETTERS if letter in columns]
    if letters != list(LETTERS[: len(letters)]):
        gap = next(letter for letter in LETTERS if letter not in columns)
        raise UserError(f"{path}: there is a choice column {letters[-1]!r} but no {gap!r}; name the choices in order")
    return letters


def _check_ids(path: str | Path, ids: pd.Series) -> None:
    if empty := [number for number, value in enumerate(ids, start=1) if not value.strip()]:
        raise UserError(f"{path}: {len(empty)} rows have no id (row {preview(empty)}); give each one its own")
    if len(twice := list(ids[ids.duplicated()].unique())):
        raise UserError(f"{path}: {len(twice)} ids stand there twice: {preview(twice)}; give each row its own")


def _escapes(path: str) -> bool:
    """Whether a relative path leads out of its folder, however it is written on whichever system."""
    parts = re.split(r"[/\\]", path)
    depth = 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return parts[0] == "" or bool(re.match(r"[A-Za-z]:", path))


def _offered(place: str, cells: list[str]) -> list[str]:
    """The choices of a row: at least two, and the blank ones, if any, last."""
    filled = [bool(cell.strip()) for cell in cells]
    offered = sum(filled)
    if offered < 2:
        raise UserError(f"{place}: only {offered} choices are filled in; at least two are needed")
    if not all(filled[:offered]):
        gap = LETTERS[filled.index(False)]
        raise UserError(f"{place}: choice {gap} is blank but a later one is not; move the choices up")
    return cells[:offered]


def _answer(place: str, cell: str, offered: int) -> int:
    """The index of an answer letter, which has to be one that the row offers."""
    letter = cell.strip().lower()
    if len(letter) != 1 or letter not in LETTERS[:offered]:
        raise UserError(f"{place}: answer {cell!r} is not offered; it has to be one of {', '.join(LETTERS[:offered])}")
    return LETTERS.index(letter)
