"""The answers of a CSV, and which of its rows belong together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.data.answers import AnswerForm
from vqa.data.columns import find_columns
from vqa.data.rows import LETTERS, Row, add_answers, read_texts
from vqa.data.table import check_ids, read_table
from vqa.evaluation.question_types import question_types

# Fewer clusters are kinds of rows that every sample has, such as ten question templates, and their variance is too
# uncertain to widen an interval by.
FEWEST_CLUSTERS = 20


class Labels:
    """The answers in a CSV, by id. It has an id and an answer (or annotators), and optionally all that a contest has.

    `columns` and `answer_form` as in `vqa.data.rows.read_contest`.
    """

    def __init__(self, path: str | Path, columns: Mapping | str | None = None, answer_form: str | None = None):
        self.path = path
        self.table = read_table(path, ())
        self.columns = find_columns(path, list(self.table.columns), columns, labels_only=True)
        self.form, self._index, self._answers, self._soft_labels = self._read(answer_form)

    def _read(self, answer_form: str | None) -> tuple[AnswerForm, pd.Index, np.ndarray, np.ndarray | None]:
        """(form of the answers, ids, their indices (rows,), the annotators' soft labels (rows, letters) if any)."""
        found, table = self.columns, self.table
        ids = list(table[found.id]) if found.id else [str(number) for number in range(len(table))]
        check_ids(self.path, ids)
        if found.answer and not found.annotators and not answer_form:  # a column of letters, read at once
            letters = table[found.answer].astype(str).str.strip().str.lower()
            answers = letters.map({letter: i for i, letter in enumerate(LETTERS)})
            if answers.notna().all():
                form = AnswerForm("letter").like(table[found.answer].iloc[0])
                return form, pd.Index(ids), answers.to_numpy(dtype=int), None
        if found.choices:
            rows = read_texts(self.path, table, found)
        else:
            rows = [Row(id=row_id, choices=list(LETTERS)) for row_id in ids]
        form = add_answers(self.path, rows, table, found, answer_form)
        soft = None
        if found.annotators:
            soft = np.array([row["annotators"] + [0.0] * (len(LETTERS) - len(row["annotators"])) for row in rows])
        return form, pd.Index(ids), np.array([row["answer"] for row in rows]), soft

    def answers(self, ids: Sequence[str]) -> np.ndarray:
        """Indices of the answers, int (rows,)."""
        return self._answers[self._positions(ids)]

    def soft_labels(self, ids: Sequence[str]) -> np.ndarray | None:
        """The share of each row's annotators that chose each letter (rows, letters); None without annotators."""
        return None if self._soft_labels is None else self._soft_labels[self._positions(ids)]

    def question_types(self, ids: Sequence[str]) -> np.ndarray:
        """The question type of each row, str (rows,). Raises UserError where the CSV has no questions or choices."""
        if not self.columns.question or not self.columns.choices:
            raise UserError(f"{self.path}: it has no questions or no choices, so their types are unknown. Give both.")
        return question_types(read_texts(self.path, self.table.iloc[self._positions(ids)], self.columns))

    def clusters(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """ "image" and "question" -> cluster of each row, int (rows,) from 0 on, where several rows share one."""
        table, found = self.table.iloc[self._positions(ids)], self.columns
        keys = {}
        if found.paths:  # all images of a row; a row without one is its own cluster
            images = zip(*(table[name].astype(str) for name in found.paths))
            keys["image"] = [" ".join(own).strip() or f"text of {row_id}" for own, row_id in zip(images, ids)]
        if found.question:
            keys["question"] = table[found.question].astype(str)
        coded = {name: pd.factorize(pd.Series(column, dtype=object)) for name, column in keys.items()}
        return {name: codes for name, (codes, unique) in coded.items() if FEWEST_CLUSTERS <= len(unique) < len(codes)}

    def _positions(self, ids: Sequence[str]) -> np.ndarray:
        positions = self._index.get_indexer(pd.Index(ids))
        if missing := [row_id for row_id, position in zip(ids, positions) if position < 0]:
            raise UserError(
                f"{self.path}: {len(missing)} predicted ids are not in it: {preview(missing)}. Give the complete file."
            )
        return positions
