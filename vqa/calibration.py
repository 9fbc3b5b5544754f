"""Whether a model is right as often as it is sure to be."""

from typing import NamedTuple

import numpy as np

BINS = 10


class Reliability(NamedTuple):
    """By bin of confidence, the empty ones left out: mean confidence, accuracy and rows; and the overall error.

    error: the expected calibration error, the mean gap between confidence and accuracy over bins, weighted by rows.
    gap: mean confidence minus accuracy; above 0 the model is too sure of itself.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray
    error: float
    gap: float


def reliability(probabilities: np.ndarray, answers: np.ndarray) -> Reliability:
    """Of probabilities (rows, letters) against the answers' indices (rows,), in bins of equal width."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == answers
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    rows = np.bincount(bins, minlength=BINS)
    held = rows > 0
    confidence, accuracy = (np.bincount(bins, values, BINS)[held] / rows[held] for values in (sure, right))
    error = float((rows[held] * abs(confidence - accuracy)).sum() / len(answers))
    return Reliability(confidence, accuracy, rows[held], error, float(sure.mean() - right.mean()))
