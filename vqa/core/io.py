"""Atomic writes, JSON files, hashes of files, and where a run's files go."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

from vqa.core.errors import UserError

Result = TypeVar("Result")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends, deleted when the block raises.

    So a file is complete or not there at all, even if the process is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    os.chmod(name, 0o644)  # mkstemp makes files that only the owner can read
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def is_writable(folder: str | Path) -> bool:
    """Whether files can be made in `folder`, or in the nearest folder above it that exists."""
    existing = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise UserError where no file can be made in `folder`. `flag`: what sets another one."""
    if not is_writable(folder):
        raise UserError(f"{folder}: read-only, or no folder. Set {flag} to a folder that you can write to.")


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check the path.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a JSON file.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Correct it.") from None


def swap_root(root: str, path: str | Path, below: str) -> Path:
    """`path` with the folder `below` replaced by `root`: checkpoints/demo/fold0 for args/demo/fold0 and below="args".

    A folder name can occur twice. In the current folder the first one counts, so that args/fold0 and args/x/args/fold0
    stay apart. In an absolute path to elsewhere the last one counts: checkpoints/demo/fold0 for
    /data/args/me/args/demo/fold0. Without `below` in it, the path's last part is kept.
    """
    path = Path(path)
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    parts = path.relative_to(path.anchor).parts
    places = [number for number, part in enumerate(parts) if part == below] or [-2]
    return Path(root, *parts[places[-1 if path.is_absolute() else 0] + 1 :])


def once_a_version(function: Callable[[str | Path], Result]) -> Callable[[str | Path], Result]:
    """`function` of a file's path, called again only when the file's size or time of change differs."""

    @cache
    def of_version(path: str, size: int, mtime_ns: int) -> Result:
        return function(path)

    @wraps(function)
    def remembered(path: str | Path) -> Result:
        stat = os.stat(path)
        return of_version(str(path), stat.st_size, stat.st_mtime_ns)

    return remembered


@once_a_version
def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(images: Sequence[str]) -> list[str]:
    """`hash_file` of each image: equal for byte-identical files. Raises UserError where one cannot be read."""
    paths = list(dict.fromkeys(images))
    try:
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip(paths, pool.map(hash_file, paths)))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Copy the image again, or delete its rows.") from None
    return [hashes[path] for path in images]
