"""The answers of a CSV, and which of its rows belong together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.data.rows import LETTERS, count_votes, parse_answer
from vqa.data.table import check_ids, numbered_columns, read_table, require_columns

CLUSTER_COLUMNS = {"image": "path", "question": "question"}


# With fewer, a clustering tells kinds of rows that every sample has (ten question templates), and its variance is
# known too badly to widen an interval by.
FEWEST_CLUSTERS = 20


class Labels:
    """A CSV with `id,answer` (or annotators) and, where it has them, `path` and `question`; read once, asked by id."""

    def __init__(self, path: str | Path):
        self.path = path
        self.table = read_table(path, ("id",))
        self.annotators = numbered_columns(self.table, "answer")
        if not self.annotators:
            require_columns(path, self.table, ("answer",))
        check_ids(path, self.table["id"])
        self.index = pd.Index(self.table["id"])

    def answers(self, ids: Sequence[str]) -> np.ndarray:
        """Indices of the answers, int (rows,)."""
        if self.annotators:
            return np.array([answer for answer, _ in self._votes(ids)])
        cells = self._rows(ids)["answer"]
        return np.array([parse_answer(f"{self.path}: id {i}", cell, len(LETTERS)) for i, cell in zip(ids, cells)])

    def shares(self, ids: Sequence[str]) -> np.ndarray | None:
        """The share of each row's annotators that chose each letter (rows, 10); None where the CSV has none."""
        return np.array([shares for _, shares in self._votes(ids)]) if self.annotators else None

    def _votes(self, ids: Sequence[str]) -> list[tuple[int, list[float]]]:
        rows = self._rows(ids)[[name for name in ("id", "answer", *self.annotators) if name in self.table]]
        return [
            count_votes(f"{self.path}: id {cells['id']}", cells, self.annotators, len(LETTERS))
            for cells in rows.to_dict("records")
        ]

    def clusters(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """ "image" and "question" -> cluster of each row, int (rows,) from 0 on, where several rows share one."""
        table = self._rows(ids)
        coded = {
            name: pd.factorize(table[column]) for name, column in CLUSTER_COLUMNS.items() if column in table.columns
        }
        return {name: codes for name, (codes, own) in coded.items() if FEWEST_CLUSTERS <= len(own) < len(codes)}

    def _rows(self, ids: Sequence[str]) -> pd.DataFrame:
        place = self.index.get_indexer(pd.Index(ids))
        if missing := [ids[i] for i in np.flatnonzero(place < 0)]:
            raise UserError(
                f"{self.path}: {len(missing)} predicted ids are not in it: {preview(missing)}; give the whole file"
            )
        return self.table.iloc[place]
