"""Which column of a contest's file is which: names in any case, common aliases in English and Korean, or a mapping.

The mapping is the field `columns` of an args file: `{"question": "문항", "choices": ["보기 A", "보기 B"]}`. Where two
columns could have the same role, nothing is guessed: the error asks for the mapping.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vqa.core.errors import UserError, preview

ALIASES = {
    "id": "id row_id question_id qid sample_id item_id idx index 번호 아이디".split(),
    "path": "path paths image images image_path image_paths img img_path image_file image_name file file_name "
    "filename file_path 이미지 사진 파일 파일명 경로".split(),
    "question": "question query q 질문 문제 문항".split(),
    "choices": "choices options candidates 보기 선택지".split(),
    "answer": "answer label target gt ground_truth correct correct_answer correct_option answer_key gold "
    "정답 답".split(),
}
# A column for each choice: a letter or a number, alone or behind one of these.
_CHOICE = re.compile(r"(?:(?:option|choice|opt|candidate|보기|선택지)_?)?([a-z]|\d{1,2})")
_NUMBERED_PATH = re.compile(rf"(?:{'|'.join(ALIASES['path'])})_?(\d{{1,2}})")


@dataclass(frozen=True)
class Columns:
    """The columns of a file by role. `choices` is one column where its cells hold lists."""

    id: str | None
    paths: tuple[str, ...]
    question: str
    choices: tuple[str, ...]
    answer: str | None
    annotators: tuple[str, ...]
    paraphrases: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        roles = {
            "id": self.id or "row number",
            "images": ", ".join(self.paths) or "none",
            "question": self.question,
            "choices": ", ".join(self.choices),
            "answer": self.answer or ", ".join(self.annotators),
            "paraphrases": ", ".join(self.paraphrases),
        }
        text = "; ".join(f"{role}: {name}" for role, name in roles.items() if name)
        return text + (f"; unused: {', '.join(self.unused)}" if self.unused else "")


def normalize(name: str) -> str:
    """A header as it is compared: NFC, lower case, words joined by underscores."""
    name = re.sub(r"([a-z])([A-Z])", r"\1_\2", unicodedata.normalize("NFC", name).strip())
    return re.sub(r"[\s\-.]+", "_", name).casefold()


def find_columns(
    path: object, header: Sequence[str], mapping: Mapping | str | None = None, labels_only: bool = False
) -> Columns:
    """The role of each column of `header`. `mapping` (role -> column, or a list of them) decides before any alias.

    A mapping may be JSON text, as on a command line. `labels_only`: the file may hold ids and answers alone. Raises
    UserError where a role has no column or several, and where the mapping names a column that does not exist.
    """
    mapping = _parse_mapping(mapping) if isinstance(mapping, str) else dict(mapping or {})
    if unknown := [role for role in mapping if role not in (*ALIASES, "annotators", "paraphrases")]:
        raise UserError(f"columns: {preview(unknown)} is no role. The roles are {', '.join(ALIASES)}.")
    given = {role: [names] if isinstance(names, str) else list(names or ()) for role, names in mapping.items()}
    if missing := [name for names in given.values() for name in names if name not in header]:
        raise UserError(f"{path}: columns names {preview(missing)}, but the header has {', '.join(header)}.")
    taken = {name for names in given.values() for name in names}
    free = {name: normalize(name) for name in header if name not in taken}

    def one(role: str, required: bool) -> str | None:
        if role in given:
            return given[role][0] if given[role] else None
        names = [name for name, plain in free.items() if plain in ALIASES[role]]
        if exact := [name for name in names if free[name] == role]:
            names = exact
        if len(names) > 1:
            raise UserError(_ask(path, role, names))
        if required and not names:
            raise UserError(
                f"{path}: no column for the {role} (the header has {', '.join(header)}). Name it in the args file: "
                f'"columns": {{"{role}": "..."}}.'
            )
        return names[0] if names else None

    def numbered(role: str, pattern: str) -> tuple[str, ...]:
        if role in given:
            return tuple(given[role])
        found = {int(m[1]): name for name, plain in free.items() if (m := re.fullmatch(pattern, plain))}
        return tuple(found[n] for n in sorted(found)) if 1 in found else ()

    id_, question = one("id", required=False), one("question", required=not labels_only)
    annotators, paraphrases = numbered("annotators", r"answer(\d+)"), numbered("paraphrases", r"question_(\d+)")
    choices = tuple(given["choices"]) if "choices" in given else _choices(path, header, free, labels_only)
    return _with_unused(
        header,
        Columns(
            id_,
            tuple(given["path"]) if "path" in given else _paths(path, header, free, labels_only),
            question or "",
            choices,
            one("answer", required=False),
            annotators,
            paraphrases,
            (),
        ),
    )


def _parse_mapping(text: str) -> dict:
    try:
        mapping = json.loads(text)
    except ValueError as error:
        raise UserError(f"columns: not valid JSON ({error}).") from None
    if not isinstance(mapping, dict):
        raise UserError(f'columns: {text[:60]!r} is no mapping. Write {{"question": "...", "answer": "..."}}.')
    return mapping


def _with_unused(header: Sequence[str], found: Columns) -> Columns:
    used = {found.id, found.question, found.answer}.union(
        found.paths, found.choices, found.annotators, found.paraphrases
    )
    return replace(found, unused=tuple(name for name in header if name not in used))


def _paths(path: object, header: Sequence[str], free: Mapping[str, str], optional: bool) -> tuple[str, ...]:
    """The image columns: one, or several that are numbered (path, path_2 or image1, image2)."""
    single = [name for name, plain in free.items() if plain in ALIASES["path"]]
    if exact := [name for name in single if free[name] == "path"]:
        single = exact
    if len(single) > 1:
        raise UserError(_ask(path, "path", single))
    numbers = {int(m[1]): name for name, plain in free.items() if (m := _NUMBERED_PATH.fullmatch(plain))}
    if not single and not numbers and not optional:
        raise UserError(
            f"{path}: no column for the path of the image (the header has {', '.join(header)}). Name it in the args "
            'file: "columns": {"path": "..."}, or null if there are no images.'
        )
    return (*single, *(numbers[n] for n in sorted(numbers)))


def _choices(path: object, header: Sequence[str], free: Mapping[str, str], optional: bool) -> tuple[str, ...]:
    """The choice columns in order: letters from a, numbers from 0 or 1, or one column of lists."""
    lists = [name for name, plain in free.items() if plain in ALIASES["choices"]]
    styles: dict[tuple[str, bool], dict[int, str]] = {}
    for name, plain in free.items():
        if match := _CHOICE.fullmatch(plain):
            place = int(match[1]) if match[1].isdigit() else ord(match[1]) - ord("a")
            style = plain.removesuffix(match[1]), match[1].isdigit()
            styles.setdefault(style, {})[place] = name
    # Two in a row from the first on: a lone letter, such as a column `q`, is no list of choices.
    styles = {
        (prefix, is_number): found
        for (prefix, is_number), found in styles.items()
        if {0, 1} <= found.keys() or is_number and {1, 2} <= found.keys()
    }
    candidates = [tuple(found[place] for place in sorted(found)) for found in styles.values()]
    candidates += [(name,) for name in lists]
    if len(candidates) > 1:
        raise UserError(_ask(path, "choices", [", ".join(names) for names in candidates]))
    if not candidates and optional:
        return ()
    if not candidates:
        raise UserError(
            f"{path}: no columns for the choices (the header has {', '.join(header)}). Name them in the args file: "
            '"columns": {"choices": ["...", "..."]}.'
        )
    for (_, is_number), found in styles.items():
        places = sorted(found)
        if gap := set(range(places[0], places[-1])) - found.keys():
            missing = str(min(gap)) if is_number else chr(ord("a") + min(gap))
            raise UserError(f"{path}: there is a choice column {found[places[-1]]!r} but no {missing!r}. Add it.")
    return candidates[0]


def _ask(path: object, role: str, names: Sequence[str]) -> str:
    return (
        f"{path}: {len(names)} columns could be the {role}: {'; '.join(names)}. Choose one in the args file: "
        f'"columns": {{"{role}": "{names[0]}"}}.'
    )
