"""Groups of rows that may differ in difficulty: by question type, image size, length and similarity of the choices."""

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
import pandas as pd

from vqa.data.images import all_images, oriented_sizes
from vqa.data.rows import Row
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.question_types import question_types
from vqa.evaluation.significance import mean_loss
from vqa.reports.results import Results

TYPE = "question type"
MIN_ROWS = 20  # of a group that may be called the worst


def group_rows(rows: Sequence[Row]) -> dict[str, pd.Series]:
    """Name of a grouping -> group of each row (categories), by id."""
    ids = [row["id"] for row in rows]
    areas = {path: width * height for path, (width, height) in oriented_sizes(all_images(rows)).items()}
    sides = [round(math.sqrt(sum(areas[path] for path in row["images"]))) for row in rows]
    lengths = [len(row["question"]) for row in rows]
    return {
        TYPE: pd.Series(question_types(rows), ids, dtype="category"),
        "image size (square root of the pixels)": quartile_groups(sides, ids),
        "question length (characters)": quartile_groups(lengths, ids),
        "distractor similarity (0 to 100)": quartile_groups([distractor_similarity(row) for row in rows], ids),
        "number of choices": pd.Series([len(row["choices"]) for row in rows], ids, dtype="category"),
    }


def distractor_similarity(row: Row) -> int:
    """Similarity of the right choice's text to the most similar wrong one, 0 to 100 (difflib's ratio)."""
    right = row["choices"][row["answer"]]
    others = [choice for i, choice in enumerate(row["choices"]) if i != row["answer"]]
    return round(100 * max(SequenceMatcher(None, right, other, autojunk=False).ratio() for other in others))


def quartile_groups(values: Sequence[int], ids: Sequence[str]) -> pd.Series:
    """The values cut at their quartiles; each group is named by its minimum and maximum."""
    series = pd.Series(values, ids)
    quartiles = pd.qcut(series, 4, labels=False, duplicates="drop").fillna(0)  # NaN where all values are equal
    ranges = series.groupby(quartiles).agg(["min", "max"])
    names = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in ranges.itertuples(index=False)]
    return quartiles.map(dict(zip(ranges.index, names))).astype(pd.CategoricalDtype(names, ordered=True))


def group_table(results: Results, name: str, group: pd.Series) -> dict:
    """`lines`, one for each group, with accuracy and log-loss of each model; `worst`: the worst line or None.

    The worst group has the lowest upper bound of its accuracy's interval, so a few rows do not make one. A line is
    `hard` where every model's accuracy is below its accuracy on all rows, beyond noise.
    """
    lines: list[dict] = []
    overall = [results.correct(model).mean() for model in results.models]
    for value in group.cat.categories:
        rows = np.flatnonzero(group == value)
        answers, clusters = results.answers[rows], results.clusters(rows)
        models: list[dict] = []
        for probs in results.probs.values():
            correct, losses = probs[rows].argmax(1) == answers, row_log_loss(probs[rows], answers)
            models.append({"accuracy": accuracy(correct, clusters), "log_loss": mean_loss(losses, clusters)})
        hard = all(scores["accuracy"].high < mean for scores, mean in zip(models, overall))
        lines.append({"group": value, "rows": len(rows), "models": models, "hard": hard})
    large = [line for line in lines if line["rows"] >= MIN_ROWS]
    worst = min(large, key=lambda line: np.mean([m["accuracy"].high for m in line["models"]]), default=None)
    return {"name": name, "lines": lines, "worst": worst if len(large) > 1 else None}
