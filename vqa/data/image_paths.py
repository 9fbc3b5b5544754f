"""From a cell of an image column to files: contests write paths with other separators, cases, Unicode forms, no
extension, or as a bare name."""

import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path, PurePosixPath

from vqa.core.errors import UserError, preview
from vqa.data.table import parse_list

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .heic .heif .avif .jp2 .ppm .pgm .jpe".split()
)
_SEPARATORS = re.compile(r"\s*[;|,\n]\s*")


class ImageFinder:
    """Finds the files that cells name, below `root` and nowhere else.

    A path that exists as it is written costs one look at the disk; the folder is listed only when one does not.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def split(self, cell: object) -> list[str]:
        """The paths in a cell: one, several joined by `;`, `|` or a comma, or a list; none where it is blank."""
        text = str(cell).strip()
        listed = parse_list(cell if isinstance(cell, (list, tuple)) else text) if text[:1] in ("[", "(") else None
        if listed is not None:
            return [str(path).strip() for path in listed if str(path).strip()]
        if not text or (self.root / text).is_file():  # a name may hold a comma
            return [text] if text else []
        parts = [part for part in _SEPARATORS.split(text) if part]
        several = len(parts) > 1 and all(PurePosixPath(part).suffix.lower() in IMAGE_SUFFIXES for part in parts)
        return parts if several or "\n" in text or ";" in text or "|" in text else [text]

    def find(self, path: str) -> str:
        """The file that `path` names; the path below `root` as it is written where there is none.

        `path` must not lead out of `root` (see `escapes`). Raises UserError where several files fit.
        """
        written = self.root / path
        if written.is_file():
            return str(written)
        wanted = _key(path)
        for index in self._indexes:
            files = index.get(wanted, [])
            if len(files) > 1:
                raise UserError(
                    f"image {path!r} could be {preview(files)} below {self.root}. Write the path that is meant."
                )
            if files:
                return str(self.root / files[0])
        return str(written)

    @cached_property
    def _files(self) -> list[str]:
        """Every image below the root, relative, in order."""
        found = []
        for folder, _, names in os.walk(self.root, followlinks=True):
            place = os.path.relpath(folder, self.root)
            found += [
                os.path.normpath(os.path.join(place, name))
                for name in names
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
            ]
        return sorted(found)

    @cached_property
    def _indexes(self) -> list[dict[str, list[str]]]:
        """Key -> files, by path, by path without extension, by name and by name without extension."""
        indexes: list[dict[str, list[str]]] = [defaultdict(list) for _ in range(4)]
        for file in self._files:
            path = _key(file)
            name = path.rpartition("/")[2]
            for index, key in zip(indexes, (path, path.rpartition(".")[0], name, name.rpartition(".")[0])):
                index[key].append(file)
        return indexes


def suggest_image_root(root: str | Path, path: str, limit: int = 200_000) -> Path | None:
    """A folder beside or below `root`'s parent under which `path` exists; None where none is found quickly."""
    wanted, entries = PurePosixPath(_slashes(path).lstrip("/")), 0
    for folder, folders, names in os.walk(Path(root).resolve().parent):
        entries += len(names) + len(folders)
        if entries > limit:
            return None
        if Path(folder) != Path(root).resolve() and (Path(folder) / wanted).is_file():
            return Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return None


def escapes(path: str) -> bool:
    """Whether a path leads out of its folder, however it is written on whichever system."""
    parts, depth = _slashes(path).split("/"), 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        if depth < 0:
            return True
    return parts[0] == "" or bool(re.match(r"[A-Za-z]:", path))


def _slashes(path: str) -> str:
    return path.replace("\\", "/")


def _key(path: str) -> str:
    """A path as it is compared: NFC, lower case, forward slashes, without `.` steps."""
    plain = unicodedata.normalize("NFC", _slashes(path).strip()).casefold()
    return "/".join(part for part in plain.split("/") if part not in ("", "."))
