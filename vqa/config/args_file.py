"""Args files: one flat JSON object, which may extend another.

    {"extends": "3b.json", "fold": 1}        # args/fold1.json: the values of args/3b.json, and what differs

With `extends`, the values that all folds share are in one file. The fields are those of the dataclasses in
`vqa.config.arguments` and `vqa.config.recipe`. This module imports neither: transformers takes seconds to import.
"""

import dataclasses
import difflib
from collections.abc import Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from vqa.core.errors import UserError
from vqa.core.io import read_json


def read_args_file(path: str | Path, known: Collection[str] | None = None, extended_by: tuple[Path, ...] = ()) -> dict:
    """The values of an args file, which override those of the file that it `extends`.

    Raises UserError for a field that is not in `known`, if that is given, and for a file that extends itself.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f'{path}: not an args file. Write one JSON object, such as {{"fold": 0}}.')
    base = values.pop("extends", None)
    for key in values:
        if known and key not in known:
            raise_unknown_field(key, path, known)
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        raise UserError(f'{path}: extends is {base!r}. Write the name of an args file beside it, such as "base.json".')
    chain = (*extended_by, Path(path).resolve())
    if (Path(path).parent / base).resolve() in chain:
        raise UserError(f"{path}: extends itself through {base}. Name the file with the values that all folds share.")
    return read_args_file(Path(path).parent / base, known, chain) | values


def raise_unknown_field(key: str, place: str | Path, known: Collection[str]) -> NoReturn:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "See `python train_fold.py --help`."
    raise UserError(f"{place}: unknown field {key!r}. {hint}")


def build_dataclass(kind: type, values: dict, path: str | Path | None = None):
    """A dataclass from an args file's values. Values of other dataclasses are ignored.

    With the file's `path`, types are checked; values that argparse has made need no check.
    """
    if path:
        check_types(kind, values, path)
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})


def check_types(kind: type, values: dict, place: str | Path) -> None:
    """Raise UserError where a value is not of its field's type.

    A field may have its default, and null where it is inherited from transformers: parsed args hold such nulls.
    """
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = values.get(field.name, field.default)
        is_usual = value is field.default or value is None and field.name not in kind.__annotations__
        if not is_usual and not _is_of(value, hints[field.name]):
            wanted = getattr(hints[field.name], "__name__", hints[field.name])
            raise UserError(f"{place}: {field.name} is {value!r}, but its type is {wanted}. Correct it.")


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value of JSON is of the type that an annotation names. Whole numbers are numbers, true is none."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, parts[0]) for item in value)
    kinds: Any = {float: (int, float), None: NoneType}.get(hint, origin or hint)
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
