"""Args files: one flat JSON object, which may extend another.

    {"extends": "3b.json", "fold": 1}        # args/fold1.json: the values of args/3b.json, and what differs

With `extends`, the values that all folds share are in one file. The fields are those of the dataclasses in
`vqa.config.arguments` and `vqa.config.recipe`. This module imports neither: transformers takes seconds to import.
"""

import dataclasses
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

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
    chain = (*extended_by, Path(path).resolve())
    if (Path(path).parent / base).resolve() in chain:
        raise UserError(f"{path}: extends itself through {base}. Name the file with the values that all folds share.")
    return read_args_file(Path(path).parent / base, known, chain) | values


def raise_unknown_field(key: str, place: str | Path, known: Collection[str]) -> NoReturn:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "See `python train_fold.py --help`."
    raise UserError(f"{place}: unknown field {key!r}. {hint}")


def build_dataclass(kind: type, values: dict):
    """A dataclass from an args file's values. Values of other dataclasses are ignored."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})
