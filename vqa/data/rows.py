"""Read and check the contest's CSV files: the one place where rows come from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from vqa.core.errors import UserError, preview
from vqa.data.table import check_ids, numbered_columns, read_table, require_columns

LETTERS = "abcdefghij"  # the letter of each choice, in the prompt and as the name of its column


class Row(TypedDict, total=False):
    """One question about one image. `read_rows` fills the first part; later steps add the rest to copies of a row."""

    id: str
    image: str | None  # path of the file; None: answer from the text alone
    question: str
    choices: list[str]  # the texts offered, in the order of the columns a, b, ...
    answer: int  # index of the right choice
    annotators: list[float]  # share of the annotators that chose each choice
    paraphrases: list[str]  # other ways to ask the question

    target: list[float]  # soft label: probability of each choice
    permutation: list[int]  # index of the choice shown at each letter; [2, 0, 1] shows the third choice at letter a
    permutations: list[list[int]]  # several of them, scored in one pass that shares the prompt's beginning
    views: list[int]  # the test-time view that each of `permutations` belongs to
    paraphrase: int  # which paraphrase replaces the question; 0: the question itself
    scale: float  # side of the image relative to the pixel budget's
    flip: bool  # mirror the image
    image_hash: str | None  # SHA-256 of the image file
    note: str  # remark for the prediction file, such as a broken image


def read_rows(path: str | Path, image_root: str | Path | None = None, with_answer: bool = False) -> list[Row]:
    """Rows of a contest CSV (`id,path,question,a,b,...` and `answer`), checked.

    Each row has `id`, `image`, `question` and `choices`; `with_answer`, also `answer`, and `annotators` where the
    CSV has columns `answer1, answer2, ...`. `paraphrases` are the columns `question_1, question_2, ...`, if any.
    Raises UserError, which names the file and the row, for whatever cannot be used.
    """
    table = read_table(path, ("id", "path", "question", "a", "b"))
    annotators = numbered_columns(table, "answer") if with_answer else []
    paraphrases = numbered_columns(table, "question_")
    if with_answer and not annotators:
        require_columns(path, table, ("answer",))
    names = _choice_columns(path, list(table.columns))
    check_ids(path, table["id"])
    root = Path(image_root) if image_root else Path(path).parent
    rows: list[Row] = []
    bad_paths = []
    for number, cells in enumerate(table.to_dict("records"), start=1):
        place = f"{path}: row {number} (id {cells['id']})"
        row = Row(
            id=cells["id"],
            image=str(root / cells["path"]),
            question=cells["question"],
            choices=_offered(place, [cells[name] for name in names]),
        )
        if not cells["path"].strip() or _leaves_folder(cells["path"]):
            bad_paths.append(f"{cells['path']!r} (id {cells['id']})")
        if not cells["question"].strip():
            raise UserError(f"{place}: the question is empty. Write one, or delete the row.")
        if paraphrases:
            row["paraphrases"] = [cells[name] for name in paraphrases if cells[name].strip()]
        if annotators:
            row["answer"], row["annotators"] = count_votes(place, cells, annotators, len(row["choices"]))
        elif with_answer:
            row["answer"] = parse_answer(place, cells["answer"], len(row["choices"]))
        rows.append(row)
    if bad_paths:
        raise UserError(
            f"{path}: {len(bad_paths)} image paths are empty or lead out of {root}: {preview(bad_paths)}. Write them "
            "relative to that folder, or set another folder with --image_root."
        )
    return rows


def parse_answer(place: str, cell: str, num_choices: int) -> int:
    """The index of an answer letter, in either case. Raises UserError where the row does not offer it."""
    letter = cell.strip().lower()
    offered = LETTERS[:num_choices]
    if len(letter) != 1 or letter not in offered:
        raise UserError(f"{place}: answer {cell!r} is not offered. Write one of {', '.join(offered)}.")
    return LETTERS.index(letter)


def count_votes(
    place: str, cells: Mapping[str, str], annotators: list[str], num_choices: int
) -> tuple[int, list[float]]:
    """(index of the row's answer, share of its annotators that chose each choice).

    Blank annotators do not count. Where `answer` is blank or not a column, the answer is the choice with the most
    votes; of a tie, the one that was chosen first in the order of the columns. Where no annotator answered, `answer`
    is the only vote.
    """
    votes = [parse_answer(f"{place}, {name}", cells[name], num_choices) for name in annotators if cells[name].strip()]
    if cells.get("answer", "").strip():
        answer = parse_answer(place, cells["answer"], num_choices)
    elif votes:
        answer = max(votes, key=votes.count)
    else:
        raise UserError(f"{place}: answer and {preview(annotators)} are all blank. Fill in one of them.")
    votes = votes or [answer]
    return answer, [votes.count(choice) / len(votes) for choice in range(num_choices)]


def rows_with_equal_choices(rows: list[Row]) -> list[str]:
    """Ids of the rows that offer the same text twice: their score says nothing about the model."""
    texts = ([choice.strip() for choice in row["choices"]] for row in rows)
    return [row["id"] for row, choices in zip(rows, texts) if len(set(choices)) < len(choices)]


def _choice_columns(path: str | Path, columns: list[str]) -> list[str]:
    """The choice columns: a, b, ... without a gap. A letter after a gap is a mistake."""
    letters = [letter for letter in LETTERS if letter in columns]
    if letters != list(LETTERS[: len(letters)]):
        gap = next(letter for letter in LETTERS if letter not in columns)
        raise UserError(f"{path}: it has a choice column {letters[-1]!r} but no {gap!r}. Name the choices in order.")
    return letters


def _leaves_folder(path: str) -> bool:
    """Whether a relative path leads out of its folder, in the notation of any operating system."""
    parts = re.split(r"[/\\]", path)
    depth = 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return parts[0] == "" or bool(re.match(r"[A-Za-z]:", path))


def _offered(place: str, cells: list[str]) -> list[str]:
    """The choices of a row: at least two. Blank cells may only be the last ones."""
    filled = [bool(cell.strip()) for cell in cells]
    offered = sum(filled)
    if offered < 2:
        raise UserError(f"{place}: only {offered} choices are filled in. Give at least two.")
    if not all(filled[:offered]):
        gap = LETTERS[filled.index(False)]
        raise UserError(f"{place}: choice {gap} is blank but a later one is not. Move the later choices up.")
    return cells[:offered]
