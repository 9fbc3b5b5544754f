"""What a score is worth: accuracy with its interval, log-loss, and whether two models differ beyond noise.

Rows about one image, or of one question, are right or wrong together, so that n of them say less than n rows. Where
that can be measured, intervals are widened by the design effect: the variance of the mean over clusters (images,
questions) divided by the variance over rows that know nothing of each other (Kish 1965).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

EPS = float(np.finfo(float).eps)  # a probability below counts as this, as in scikit-learn's log_loss


NOISE = 0.05


class Accuracy(NamedTuple):
    """An accuracy in [0, 1], the bounds of its 95 % interval, and what the rows are clustered by, if anything."""

    value: float
    low: float
    high: float
    by: str | None = None

    def __str__(self) -> str:
        by = f", clustered by {self.by}" if self.by else ""
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f}{by})"


def row_log_loss(probabilities: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Log-loss of each row, in nats (rows,), of probabilities (rows, letters) against the answers' indices (rows,)."""
    width = probabilities.shape[1]
    offered = answers < width
    right = np.where(offered, probabilities[np.arange(len(answers)), np.where(offered, answers, 0)], 0.0)
    return -np.log(np.maximum(right, EPS))


def soft_label_log_loss(probabilities: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Cross-entropy, in nats (rows,), of probabilities (rows, letters) to annotators' shares (rows, 10)."""
    probabilities = np.pad(probabilities, ((0, 0), (0, shares.shape[1] - probabilities.shape[1])))
    return -(shares * np.log(np.maximum(probabilities, EPS))).sum(1)


def accuracy_and_log_loss(probabilities: np.ndarray, answers: Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    answers = np.asarray(answers)
    return {
        "accuracy": float((probabilities.argmax(1) == answers).mean()),
        "log_loss": float(row_log_loss(probabilities, answers).mean()),
    }


def wilson_interval(right: float, rows: float, z: float = float(ndtri(0.975))) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy of `right` out of `rows`, which need not be whole (effective rows)."""
    p = right / rows
    middle, spread = p + z * z / (2 * rows), z * np.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return float(max(0.0, (middle - spread) / scale)), float(min(1.0, (middle + spread) / scale))


def accuracy(correct: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None) -> Accuracy:
    """Accuracy of `correct`, bool (rows,). `clusters` name -> cluster of each row (rows,), from 0 on.

    Of several clusterings the one that widens the interval most is used.
    """
    value, rows = float(correct.mean()), len(correct)
    found = [Accuracy(value, *wilson_interval(correct.sum(), rows))]
    for name, codes in (clusters or {}).items():
        effective = rows / design_effect(correct, codes)
        z = float(stdtrit(codes.max(), 0.975))  # clusters - 1 degrees of freedom
        found.append(Accuracy(value, *wilson_interval(value * effective, effective, z), name))
    return max(found, key=lambda item: item.high - item.low)


def design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """How many rows are worth one independent row: 1 and more. `values` (rows,), `codes` (rows,) from 0 on."""
    rows, clusters = len(values), codes.max() + 1
    if not (spread := values.var()):  # all alike: no correlation can be measured, so the cautious bound
        return rows / clusters
    sums = np.bincount(codes, values - values.mean())
    return max(1.0, float(clusters / (clusters - 1) * (sums**2).sum() / (rows * spread)))


def score_with_interval(
    probabilities: np.ndarray, answers: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Letter scores of probabilities (rows, letters), with the number of rows and the accuracy's interval."""
    _, low, high, _ = accuracy(probabilities.argmax(1) == answers, clusters)
    return {"rows": len(answers), "low": low, "high": high} | accuracy_and_log_loss(probabilities, answers)
