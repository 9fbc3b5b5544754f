"""What is wrong with a model or its data: label issues, letter bias, calibration."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, chisquare

from vqa.evaluation.metrics import NOISE

BINS = 10


def find_label_issues(probs: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose label is probably wrong, the letter that is predicted there), both int (issues,), worst first.

    `probs` (rows, letters) are out-of-fold probabilities, `answers` (rows,) the indices of the labels. The rule is
    that of confident learning (Northcutt et al. 2021, arxiv.org/abs/1911.00068), in the form of cleanlab's
    `find_label_issues(filter_by="low_self_confidence")`:

    - The threshold of a letter is its mean probability in the rows that have it as label.
    - The number of issues is that of the rows where another letter than the label is predicted, and the likeliest of
      the letters that reach their threshold is not the label either.
    - The issues are that many rows with the lowest probability of the label, less those where it is the prediction.

    The worst has the largest difference between the probabilities of prediction and label.
    """
    rows, predictions = np.arange(len(answers)), probs.argmax(1)
    labelled = answers[:, None] == np.arange(probs.shape[1])
    thresholds = (probs * labelled).sum(0) / np.maximum(labelled.sum(0), 1)
    confident = (probs >= thresholds) & labelled.any(0)
    likeliest = np.where(confident, probs, -1).argmax(1)
    number = int((confident.any(1) & (likeliest != answers) & (predictions != answers)).sum())
    label_probs = probs[rows, answers]
    lowest = np.argsort(label_probs, kind="stable")[:number]
    issues = lowest[predictions[lowest] != answers[lowest]]
    issues = issues[np.argsort((label_probs - probs.max(1))[issues], kind="stable")]
    return issues, predictions[issues]


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
