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
WORDS = {1: "better", -1: "worse", 0: "within noise"}


class Accuracy(NamedTuple):
    """An accuracy in [0, 1], the bounds of its 95 % interval, and what the rows are clustered by, if anything."""

    value: float
    low: float
    high: float
    by: str | None = None

    def __str__(self) -> str:
        by = f", clustered by {self.by}" if self.by else ""
        return f"{self.value:.4f} (95 % interval {self.low:.4f} to {self.high:.4f}{by})"


def row_losses(probabilities: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Log-loss of each row, in nats (rows,), of probabilities (rows, letters) against the answers' indices (rows,)."""
    width = probabilities.shape[1]
    offered = answers < width
    right = np.where(offered, probabilities[np.arange(len(answers)), np.where(offered, answers, 0)], 0.0)
    return -np.log(np.maximum(right, EPS))


def annotator_losses(probabilities: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Cross-entropy, in nats (rows,), of probabilities (rows, letters) to annotators' shares (rows, 10)."""
    probabilities = np.pad(probabilities, ((0, 0), (0, shares.shape[1] - probabilities.shape[1])))
    return -(shares * np.log(np.maximum(probabilities, EPS))).sum(1)


def letter_scores(probabilities: np.ndarray, answers: Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    answers = np.asarray(answers)
    return {
        "accuracy": float((probabilities.argmax(1) == answers).mean()),
        "log_loss": float(row_losses(probabilities, answers).mean()),
    }


def accuracy_interval(right: float, rows: float, z: float = float(ndtri(0.975))) -> tuple[float, float]:
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
    found = [Accuracy(value, *accuracy_interval(correct.sum(), rows))]
    for name, codes in (clusters or {}).items():
        effective = rows / design_effect(correct, codes)
        z = float(stdtrit(codes.max(), 0.975))  # clusters - 1 degrees of freedom
        found.append(Accuracy(value, *accuracy_interval(value * effective, effective, z), name))
    return max(found, key=lambda item: item.high - item.low)


def design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """How many rows are worth one independent row: 1 and more. `values` (rows,), `codes` (rows,) from 0 on."""
    rows, clusters = len(values), codes.max() + 1
    if not (spread := values.var()):  # all alike: no correlation can be measured, so the cautious bound
        return rows / clusters
    sums = np.bincount(codes, values - values.mean())
    return max(1.0, float(clusters / (clusters - 1) * (sums**2).sum() / (rows * spread)))


def scored(
    probabilities: np.ndarray, answers: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Letter scores of probabilities (rows, letters), with the number of rows and the accuracy's interval."""
    _, low, high, _ = accuracy(probabilities.argmax(1) == answers, clusters)
    return {"rows": len(answers), "low": low, "high": high} | letter_scores(probabilities, answers)


class Difference(NamedTuple):
    """A paired difference of means and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(
    first: np.ndarray, second: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> Difference:
    """Mean of `second - first`, both (rows,), and its interval by a seeded paired bootstrap over rows or clusters."""
    from scipy.stats import bootstrap  # takes half a second to import

    gaps = second.astype(float) - first.astype(float)
    if not gaps.any():
        return Difference(0.0, 0.0, 0.0)
    sums, sizes = gaps, np.ones(len(gaps))
    if clusters:
        codes = max(clusters.values(), key=lambda codes: design_effect(gaps, codes))
        sums, sizes = np.bincount(codes, gaps), np.bincount(codes).astype(float)
    draws = int(np.clip(2e7 // len(sums), 999, 9999))
    interval = bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        paired=True,
        n_resamples=draws,
        batch=max(1, 1_000_000 // len(sums)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(float(gaps.mean()), float(interval.low), float(interval.high))


def mean_loss(losses: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None) -> Difference:
    """Mean of the row losses (rows,) and its interval by that bootstrap; of a single row there is none (nan)."""
    if len(losses) < 2:
        return Difference(float(losses.mean()), np.nan, np.nan)
    return paired_difference(np.zeros(len(losses)), losses, clusters)


class Comparison(NamedTuple):
    """Two models on the same rows; differences are the second's minus the first's."""

    rows: int
    only_first: int
    only_second: int
    p_value: float
    accuracy: Difference
    log_loss: Difference

    @property
    def signs(self) -> tuple[int, int]:
        """Of the second, in accuracy and in log-loss: 1 better, -1 worse, 0 within noise."""
        by_accuracy = np.sign(self.accuracy.value) * (self.p_value < NOISE and self.accuracy.beyond_noise)
        return int(by_accuracy), int(-np.sign(self.log_loss.value) * self.log_loss.beyond_noise)

    @property
    def better(self) -> bool:
        """Whether the second is better beyond noise in one measure and not worse in the other."""
        return any(self.signs) and min(self.signs) >= 0

    @property
    def words(self) -> str:
        """better, worse or within noise, once where accuracy and log-loss agree."""
        by_accuracy, by_log_loss = (WORDS[sign] for sign in self.signs)
        if by_accuracy == by_log_loss:
            return by_accuracy
        return f"{by_accuracy} in accuracy, {by_log_loss} in log-loss"

    def verdict(self, first: str, second: str) -> str:
        """One sentence: better, worse, or within noise."""
        if self.signs == (0, 0):
            return f"{second} is within noise of {first} at {self.rows} rows."
        if self.signs[0] == self.signs[1]:
            return f"{second} is {self.words} than {first}, in accuracy and in log-loss, at {self.rows} rows."
        return f"{second} against {first} at {self.rows} rows: {self.words}."


def compare(
    first: np.ndarray, second: np.ndarray, answers: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> Comparison:
    """Compare probabilities (rows, letters) of two models: McNemar's exact test, paired bootstraps.

    McNemar's test takes rows as independent; the bootstrap of the accuracy, over clusters, does not.
    """
    from scipy.stats import binomtest

    right = [probabilities.argmax(1) == answers for probabilities in (first, second)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    differing = only_first + only_second
    return Comparison(
        len(answers),
        only_first,
        only_second,
        float(binomtest(only_second, differing).pvalue) if differing else 1.0,
        paired_difference(*right, clusters),
        paired_difference(row_losses(first, answers), row_losses(second, answers), clusters),
    )
