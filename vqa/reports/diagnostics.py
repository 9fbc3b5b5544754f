"""What is wrong with a model or its data: label issues, letter bias, calibration."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, chisquare

from vqa.evaluation.metrics import NOISE


def find_label_issues(stack: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows that look mislabelled, the choice that is answered there instead), both int (suspects,), worst first.

    `stack` (members, rows, letters) are out-of-fold probabilities, a member for each of the weights of each model. All
    members have to agree on the other choice, and each has to give it at least what the labels get on average: the
    threshold of confident learning (Northcutt et al. 2021), with one for all letters, since letters are no classes.
    """
    said = stack.argmax(2)
    given = stack[:, np.arange(len(answers)), answers]
    wrong = (said == said[0]).all(0) & (said[0] != answers)
    rows = np.flatnonzero(wrong & (stack.max(2).min(0) >= given.mean()))
    margin = (stack.max(2) - given).mean(0)
    rows = rows[np.argsort(-margin[rows], kind="stable")]
    return rows, said[0][rows]


class UniformityTest(NamedTuple):
    """By letter: rows in which it is right, and how many a fair draw gives; p_value of so uneven a draw."""

    counts: np.ndarray
    fair: np.ndarray
    p_value: float


def uniformity_test(answers: np.ndarray, offered: np.ndarray) -> UniformityTest:
    """Of the answers' indices (rows,) where `offered` choices (rows,) stand to choose from."""
    width = offered.max()
    counts = np.bincount(answers, minlength=width)
    fair = np.array([(1 / offered[offered > i]).sum() for i in range(width)])
    return UniformityTest(counts, fair, float(chisquare(counts, fair).pvalue))


def confusion_matrix(said: np.ndarray, answers: np.ndarray, width: int) -> np.ndarray:
    """Rows by right letter and answered letter, int (width, width), from indices (rows,)."""
    counts = np.zeros((width, width), dtype=int)
    np.add.at(counts, (answers, said), 1)
    return counts


def letter_bias(counts: np.ndarray) -> np.ndarray:
    """-1, 0 or 1 for each letter: answered too seldom, neither beyond noise, too often; of a confusion's counts.

    McNemar's exact test of rows where the letter is answered and wrong against those where it is right and not
    answered; among so many letters one is off by chance the more easily (Bonferroni).
    """
    hits = counts.diagonal()
    too_often, missed = counts.sum(0) - hits, counts.sum(1) - hits
    p_values = [binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in zip(too_often, missed)]
    return np.sign(too_often - missed) * (np.array(p_values) < NOISE / len(counts))


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
