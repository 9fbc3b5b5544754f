"""Groups of rows that may be harder than others: by question type, image size, length and likeness of the choices."""

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
import pandas as pd

from vqa.data.images import oriented_size
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.significance import mean_loss
from vqa.reports.question_types import question_type
from vqa.reports.results import Results

PARTS = 4


TYPE = "question type"


FEWEST_ROWS = 20  # of a group that may be called the worst


def group_rows(rows: Sequence[dict]) -> dict[str, pd.Series]:
    """What rows are grouped by -> group of each row (categories), by id."""
    ids = [row["id"] for row in rows]
    sides = [round(float(np.sqrt(np.prod(oriented_size(row["image"]))))) for row in rows]
    return {
        TYPE: pd.Series([question_type(row["question"]) for row in rows], ids, dtype="category"),
        "image size, side of a square of as many pixels": quartile_groups(sides, ids),
        "length of the question, characters": quartile_groups([len(row["question"]) for row in rows], ids),
        "likeness of the right choice to its nearest, of 100": quartile_groups(
            [distractor_similarity(row) for row in rows], ids
        ),
        "choices offered": pd.Series([len(row["choices"]) for row in rows], ids, dtype="category"),
    }


def distractor_similarity(row: dict) -> int:
    """How much of its text the right choice shares, in order, with the wrong one that is most like it, 0 to 100."""
    right = row["choices"][row["answer"]]
    others = [choice for i, choice in enumerate(row["choices"]) if i != row["answer"]]
    return round(100 * max(SequenceMatcher(None, right, other, autojunk=False).ratio() for other in others))


def quartile_groups(values: Sequence[int], ids: Sequence[str]) -> pd.Series:
    """Values cut at their quartiles; a part is named by the least and the most that it holds."""
    series = pd.Series(values, ids)
    parts = pd.qcut(series, PARTS, labels=False, duplicates="drop").fillna(0)  # all alike: one part
    ends = series.groupby(parts).agg(["min", "max"])
    names = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in ends.itertuples(index=False)]
    return parts.map(dict(zip(ends.index, names))).astype(pd.CategoricalDtype(names, ordered=True))


def group_table(results: Results, name: str, group: pd.Series) -> dict:
    """`lines`, one a group, with accuracy and log-loss of each model, and which of them is the `worst`, if any.

    The worst is the one whose interval ends lowest, so that a few rows do not make one. A line is `hard` where every
    model's accuracy lies below its accuracy on all rows, beyond noise.
    """
    lines, overall = [], [results.right(model).mean() for model in results.models]
    for value in group.cat.categories:
        at = np.flatnonzero(group == value)
        answers, clusters, models = results.answers[at], results.clusters(at), []
        for values in results.best.values():
            right, losses = values[at].argmax(1) == answers, row_log_loss(values[at], answers)
            models.append({"accuracy": accuracy(right, clusters), "log_loss": mean_loss(losses, clusters)})
        hard = all(scores["accuracy"].high < mean for scores, mean in zip(models, overall))
        lines.append({"group": value, "rows": len(at), "models": models, "hard": hard})
    large = [line for line in lines if line["rows"] >= FEWEST_ROWS]
    worst = min(large, key=lambda line: np.mean([m["accuracy"].high for m in line["models"]]), default=None)
    return {"name": name, "lines": lines, "worst": worst if len(large) > 1 else None}
