"""Finished views of an unfinished prediction, so that an interrupted run continues where it stopped.

outputs/.parts/fold0/<key>.npz is one view of outputs/fold0.csv. The key is a fingerprint of the weights, the prompt
settings and the rows as the view shows them, so a view of another run is never used.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqa.core.io import atomic_write
from vqa.data.rows import Row


class CachedView(NamedTuple):
    """Probabilities float64 (rows, letters), as `vqa.inference.scoring.choice_probs` returns them, and the seconds."""

    probs: np.ndarray
    seconds: float


class ViewCache:
    """The finished views of the prediction file `path` by the weights with the fingerprint `model`."""

    def __init__(self, path: Path, model: str):
        self.folder, self.model = path.parent / ".parts" / path.stem, model

    def read(self, rows: Sequence[Row]) -> CachedView | None:
        """The view that shows these rows; None if it is not finished."""
        path = self._path(rows)
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            return CachedView(arrays["probs"], float(arrays["seconds"]))

    def write(self, rows: Sequence[Row], view: CachedView) -> None:
        with atomic_write(self._path(rows)) as temporary, open(temporary, "wb") as file:
            np.savez(file, probs=view.probs, seconds=view.seconds)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, rows: Sequence[Row]) -> Path:
        return self.folder / f"{view_fingerprint(self.model, rows)}.npz"


def view_fingerprint(model: str, rows: Sequence[Row]) -> str:
    """Of weights and of rows as a view shows them. Images count by their bytes (`image_hash`), not by their path."""
    content = [model, *({key: value for key, value in row.items() if key != "images"} for row in rows)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
