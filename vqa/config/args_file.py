"""Args files: one flat JSON object, which may extend another.

    {"extends": "3b.json", "fold": 1}        # args/fold1.json: the file 3b.json beside it, and what differs

`extends` keeps fold files from drifting apart: what folds share stands in one file. Their fields are those of the
dataclasses below and of `vqa.arguments.RecipeArguments`, which is apart since transformers takes seconds to import.
"""

import dataclasses
import difflib
from collections.abc import Collection
from pathlib import Path

from vqa.core.errors import UserError
from vqa.core.io import read_json


def read_args_file(path: str | Path, known: Collection[str] | None = None, extended_by: tuple[Path, ...] = ()) -> dict:
    """The values of an args file, those of the file that it `extends` included. Its own come first.

    Raises UserError where a field is none of the `known` ones, if they are given.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f'{path}: an args file is one JSON object, such as {{"fold": 0}}')
    base = values.pop("extends", None)
    for key in values:
        if known and key not in known:
            raise_unknown_field(key, path, known)
    if base is None:
        return values
    chain = (*extended_by, Path(path).resolve())
    if (Path(path).parent / base).resolve() in chain:
        raise UserError(f"{path}: extends itself, by way of {base}; name the file that holds what the folds share")
    return read_args_file(Path(path).parent / base, known, chain) | values


def raise_unknown_field(key: str, place: str | Path, known: Collection[str]):
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see `python train_fold.py --help`"
    raise UserError(f"{place}: unknown field {key!r}; {hint}")


def build_dataclass(kind: type, values: dict):
    """One dataclass out of an args file's values; whatever belongs to another is left out."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})
