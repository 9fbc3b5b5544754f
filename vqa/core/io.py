"""Outputs are written whole or not at all: to a temporary name first, then renamed."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqa.core.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; it takes that name when the block ends well and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> object:
    """Read a JSON file; a missing or broken one is the user's to mend."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def swap_root(root: str, path: str | Path, below: str) -> Path:
    """`path` moved under `root`: checkpoints/demo/fold0 for args/demo/fold0 and below="args"."""
    parts = Path(path).parts
    return Path(root, *(parts[parts.index(below) + 1 :] if below in parts else parts[-1:]))
