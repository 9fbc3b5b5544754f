"""Views that a prediction has finished, kept until the whole is written, so that it goes on where it was stopped.

outputs/.parts/fold0/<key>.npz is one view of outputs/fold0.csv; the key is made of the weights, of how they are asked,
and of the rows as that view shows them, so that a part of another run is never taken for one of this.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqa.core.hashing import rows_fingerprint
from vqa.core.io import atomic_write


class CachedView(NamedTuple):
    """Shares of the letters (rows, letters), as `vqa.scoring.letter_shares` gives them, and the seconds they took."""

    shares: np.ndarray
    seconds: float


class ViewCache:
    """The finished views of the prediction file `file` by the weights whose fingerprint is `model`."""

    def __init__(self, file: Path, model: str):
        self.folder, self.model = file.parent / ".parts" / file.stem, model

    def read(self, rows: Sequence[dict]) -> CachedView | None:
        """The part of a view that shows these rows, or None where it is not finished."""
        if not self._path(rows).is_file():
            return None
        with np.load(self._path(rows)) as file:
            return CachedView(file["shares"], float(file["seconds"]))

    def write(self, rows: Sequence[dict], part: CachedView) -> None:
        with atomic_write(self._path(rows)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **part._asdict())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _path(self, rows: Sequence[dict]) -> Path:
        return self.folder / f"{view_fingerprint(self.model, rows)}.npz"


def view_fingerprint(model: str, rows: Sequence[dict]) -> str:
    """Of a model and of rows as a view shows them: by the bytes of their images (`hash`), wherever these lie."""
    return rows_fingerprint([model], [{k: v for k, v in row.items() if k != "image"} for row in rows])
