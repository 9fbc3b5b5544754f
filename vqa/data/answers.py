"""Answers in the forms that contests use: `b`, `B`, `(B)`, `B. blue`, 1, 2, ②, or the text of the choice.

`find_answer_form` reads a whole column, since one cell does not say whether numbers start at 0 or at 1. The form that
it finds also writes answers, so that a submission looks like the sample.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vqa.core.errors import UserError

FORMS = ("letter", "number_from_0", "number_from_1", "text")
_LETTER = re.compile(r"([(\[{]?\s*)([A-Za-z])(\s*[)\]}]?\s*[.:]?)(?:\s+(\S.*))?", re.DOTALL)
_NUMBER = re.compile(r"([(\[{]?\s*)(\d+)(?:\.0+)?(\s*[)\]}]?\s*[.:번]?)")


def clean(text: object) -> str:
    """Text as it is compared: Unicode NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", str(text)).split())


def letter(index: int) -> str:
    """The letter of a choice: a for 0."""
    return chr(ord("a") + index)


@dataclass(frozen=True)
class AnswerForm:
    """How a file writes the index of a choice.

    kind: one of FORMS. upper: capital letters. before, after: what surrounds the letter or number. with_text: the
    text of the choice follows, as in `B. blue`.
    """

    kind: str
    upper: bool = False
    before: str = ""
    after: str = ""
    with_text: bool = False

    @property
    def first(self) -> int:
        """The number of the first choice."""
        return int(self.kind == "number_from_1")

    def read(self, cell: object, choices: Sequence[str]) -> int | None:
        """The index that a cell names, or None where it names none of `choices`."""
        text = clean(cell)
        if self.kind == "text":
            return _find_text(text, choices)
        if self.kind == "letter":
            if not (match := _LETTER.fullmatch(text)):
                return None
            index = ord(match[2].lower()) - ord("a")
            if match[4] and index < len(choices) and clean(match[4]) != clean(choices[index]):
                return None
        else:
            text = "".join(str(unicodedata.digit(c)) if unicodedata.category(c) == "No" else c for c in text)
            if not (match := _NUMBER.fullmatch(text)):
                return None
            index = int(match[2]) - self.first
        return index if 0 <= index < len(choices) else None

    def write(self, index: int, choices: Sequence[str]) -> str:
        """The cell that names choice `index`."""
        if self.kind == "text":
            return choices[index]
        name = letter(index) if self.kind == "letter" else str(index + self.first)
        cell = f"{self.before}{name.upper() if self.upper else name}{self.after}"
        return f"{cell} {choices[index]}" if self.with_text else cell

    def like(self, cell: object) -> "AnswerForm":
        """This form with the case and the punctuation of a cell."""
        pattern = _LETTER if self.kind == "letter" else _NUMBER
        if self.kind == "text" or not (match := pattern.fullmatch(clean(cell))):
            return self
        with_text = self.kind == "letter" and bool(match[4])
        return replace(self, upper=match[2].isupper(), before=match[1], after=match[3], with_text=with_text)

    def __str__(self) -> str:
        if self.kind == "text":
            return "text of the choice"
        return f"{self.kind.replace('_', ' ')} (the first choice is {self.write(0, ['...'])!r})"


def _find_text(text: str, choices: Sequence[str]) -> int | None:
    """The first choice with this text; failing that, the only one that differs in case alone."""
    texts = [clean(choice) for choice in choices]
    if text in texts:
        return texts.index(text)
    same = [i for i, choice in enumerate(texts) if choice.casefold() == text.casefold()]
    return same[0] if len(same) == 1 else None


def possible_forms(cells: Sequence[object], choices: Sequence[Sequence[str]]) -> dict[AnswerForm, list[int]]:
    """Every form that reads all cells, with the indices that it gives."""
    forms = {}
    for kind in FORMS:
        form = AnswerForm(kind).like(cells[0]) if len(cells) else AnswerForm(kind)
        indices = [form.read(cell, offered) for cell, offered in zip(cells, choices)]
        known = [index for index in indices if index is not None]
        if len(known) == len(indices):
            forms[form] = known
    return forms


def find_answer_form(
    path: object,
    places: Sequence[tuple[int, str, str]],
    cells: Sequence[object],
    choices: Sequence[Sequence[str]],
    kind: str | None = None,
) -> tuple[AnswerForm, list[int]]:
    """(the form of the answers `cells`, the index that each names).

    `places`: row number, id and column of each cell, for messages. `kind`, one of FORMS, decides where several forms
    fit. Raises UserError where no form reads every cell, and where two do and disagree.
    """
    forms = possible_forms(cells, choices)
    if kind:
        forms = {form: indices for form, indices in forms.items() if form.kind == kind}
    if not forms:
        raise UserError(_why_unreadable(path, places, cells, choices, kind))
    (form, indices), *others = forms.items()
    for other, differing in others:
        if differing != indices:
            row = next(i for i, (a, b) in enumerate(zip(indices, differing)) if a != b)
            raise UserError(
                f"{path}: {places[row][2]} can be {form} or {other}: {cells[row]!r} in row {places[row][0]} is "
                f"{choices[row][indices[row]]!r} or {choices[row][differing[row]]!r}. Set answer_form in the args "
                f"file to {form.kind} or {other.kind}."
            )
    return form, indices


def _why_unreadable(
    path: object,
    places: Sequence[tuple[int, str, str]],
    cells: Sequence[object],
    choices: Sequence[Sequence[str]],
    kind: str | None,
) -> str:
    """Names the first cell that cannot be read in the form that reads the most cells."""
    kinds = [AnswerForm(name) for name in ([kind] if kind else FORMS)]
    best = max(kinds, key=lambda form: sum(form.read(c, offered) is not None for c, offered in zip(cells, choices)))
    i = next(i for i, (c, offered) in enumerate(zip(cells, choices)) if best.read(c, offered) is None)
    number, row_id, column = places[i]
    place = f"{path}: row {number} (id {row_id})" + (f", {column}" if column != "answer" else "")
    offered = ", ".join(f"{letter(k)} {text!r}" for k, text in enumerate(choices[i]))
    return (
        f"{place}: answer {str(cells[i])!r} is not offered ({offered}). Write the letter, the number or the text of a "
        "choice, in one form in every row."
    )
