"""What is wrong with a model or its data: label issues, letter bias, calibration."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, chisquare

from vqa.evaluation.metrics import NOISE

BINS = 10


def find_label_issues(stack: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose label is probably wrong, the choice that is predicted there), both int (issues,), worst first.

    `stack` (members, rows, letters) are out-of-fold probabilities of several sets of weights. All members must predict
    the same other choice, each with at least the mean probability of the labels: the threshold of confident learning
    (Northcutt et al. 2021), with one threshold for all letters, since letters are not classes.
    """
    predictions = stack.argmax(2)
    label_probs = stack[:, np.arange(len(answers)), answers]
    disagrees = (predictions == predictions[0]).all(0) & (predictions[0] != answers)
    rows = np.flatnonzero(disagrees & (stack.max(2).min(0) >= label_probs.mean()))
    margin = (stack.max(2) - label_probs).mean(0)
    rows = rows[np.argsort(-margin[rows], kind="stable")]
    return rows, predictions[0][rows]


class UniformityTest(NamedTuple):
    """By letter: rows in which it is right, and how many are expected; the p-value of counts this uneven."""

    counts: np.ndarray
    expected: np.ndarray
    p_value: float


def uniformity_test(answers: np.ndarray, num_choices: np.ndarray) -> UniformityTest:
    """Chi-squared test of the answers' indices (rows,) against a uniform draw from `num_choices` (rows,) choices."""
    width = num_choices.max()
    counts = np.bincount(answers, minlength=width)
    expected = np.array([(1 / num_choices[num_choices > i]).sum() for i in range(width)])
    return UniformityTest(counts, expected, float(chisquare(counts, expected).pvalue))


def letter_bias(counts: np.ndarray) -> np.ndarray:
    """1, -1 or 0 for each letter of a confusion matrix (right, predicted): too often, too rarely, or within noise.

    McNemar's exact test of the rows where the letter is predicted and wrong against those where it is right and not
    predicted, with a Bonferroni correction for the number of letters.
    """
    hits = counts.diagonal()
    false_positives, misses = counts.sum(0) - hits, counts.sum(1) - hits
    p_values = [binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in zip(false_positives, misses)]
    return np.sign(false_positives - misses) * (np.array(p_values) < NOISE / len(counts))


class Reliability(NamedTuple):
    """By non-empty bin of confidence: mean confidence, accuracy and number of rows; and two errors over all rows.

    error: the expected calibration error, the mean distance of confidence and accuracy over bins, weighted by rows.
    gap: mean confidence minus accuracy; above 0 the model is overconfident.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    rows: np.ndarray
    error: float
    gap: float


def reliability(probs: np.ndarray, answers: np.ndarray) -> Reliability:
    """Calibration of probabilities (rows, letters) against the answers' indices (rows,), in bins of equal width."""
    confidences, correct = probs.max(1), probs.argmax(1) == answers
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    rows = np.bincount(bins, minlength=BINS)
    filled = rows > 0
    confidence, accuracy = (
        np.bincount(bins, values, BINS)[filled] / rows[filled] for values in (confidences, correct)
    )
    error = float((rows[filled] * abs(confidence - accuracy)).sum() / len(answers))
    return Reliability(confidence, accuracy, rows[filled], error, float(confidences.mean() - correct.mean()))
