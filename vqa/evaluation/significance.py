"""Models on the same rows: is one better than the other or is it noise, and how many errors do they share?"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import NOISE, accuracy, design_effect, row_log_loss, soft_label_log_loss

WORDS = {1: "better", -1: "worse", 0: "within noise"}


class Difference(NamedTuple):
    """A paired difference of two means and the bounds of its 95 % interval."""

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
    """Mean of the row losses (rows,) and its bootstrap interval, which is nan for a single row."""
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
        """Of the second model, in accuracy and in log-loss: 1 better, -1 worse, 0 within noise."""
        by_accuracy = np.sign(self.accuracy.value) * (self.p_value < NOISE and self.accuracy.beyond_noise)
        return int(by_accuracy), int(-np.sign(self.log_loss.value) * self.log_loss.beyond_noise)

    @property
    def better(self) -> bool:
        """Whether the second model is better beyond noise in one measure and not worse in the other."""
        return any(self.signs) and min(self.signs) >= 0

    @property
    def words(self) -> str:
        """ "better", "worse" or "within noise"; both words where accuracy and log-loss disagree."""
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

    McNemar's test takes rows as independent; the bootstrap resamples clusters.
    """
    from scipy.stats import binomtest

    right, right_too = (probabilities.argmax(1) == answers for probabilities in (first, second))
    only_first, only_second = int((right & ~right_too).sum()), int((right_too & ~right).sum())
    differing = only_first + only_second
    return Comparison(
        len(answers),
        only_first,
        only_second,
        float(binomtest(only_second, differing).pvalue) if differing else 1.0,
        paired_difference(right, right_too, clusters),
        paired_difference(row_log_loss(first, answers), row_log_loss(second, answers), clusters),
    )


def first_unbeaten(
    options: Sequence[np.ndarray] | np.ndarray, answers: np.ndarray, clusters: Mapping[str, np.ndarray] | None = None
) -> int:
    """Index of the first of `options`, each (rows, letters), that no later one beats beyond noise.

    With options in the order of their cost it is the cheapest that is good enough. Each is compared with all later
    ones, since several small steps may be a gain together.
    """
    last = len(options) - 1
    return next(
        i
        for i in range(last + 1)
        if not any(compare(options[i], options[j], answers, clusters).better for j in range(last, i, -1))
    )


class ErrorOverlap(NamedTuple):
    """How alike models are, each (models, models).

    jaccard: rows that both models get wrong, divided by the rows that at least one of them gets wrong; 0 without any.
    disagreement: the share of rows on which they predict different letters.
    """

    jaccard: np.ndarray
    disagreement: np.ndarray

    def describe(self, names: Sequence[str]) -> str:
        """One sentence about the two models whose errors are least alike."""
        first, second = min(itertools.combinations(range(len(names)), 2), key=self.jaccard.__getitem__)
        return (
            f"Least alike: {names[first]} and {names[second]}, Jaccard index of their errors "
            f"{self.jaccard[first, second]:.2f}, other letters in {self.disagreement[first, second]:.1%} of the rows"
        )


def error_overlap(predictions: np.ndarray, answers: np.ndarray) -> ErrorOverlap:
    """The overlap of models by their predicted letters (models, rows) and the answers (rows,), all indices."""
    wrong = (predictions != answers).astype(float)
    both, errors = wrong @ wrong.T, wrong.sum(1)
    either = errors[:, None] + errors - both
    return ErrorOverlap(both / np.maximum(either, 1), np.stack([(predictions != own).mean(1) for own in predictions]))


def print_comparison(first: str, second: str, ids: Sequence[str], stack: np.ndarray, labels: Labels) -> None:
    """Print how `second` compares with `first`, by probabilities `stack` (2, rows, letters) of the rows `ids`."""
    answers, clusters, soft_labels = labels.answers(ids), labels.clusters(ids), labels.soft_labels(ids)
    for name, values in zip((first, second), stack):
        right = accuracy(values.argmax(1) == answers, clusters)
        print(f"{name}: accuracy {right}, log-loss {row_log_loss(values, answers).mean():.4f}")
        if soft_labels is not None:
            print(f"{name}: cross-entropy to the annotators {soft_label_log_loss(values, soft_labels).mean():.4f}")
    result = compare(stack[0], stack[1], answers, clusters)
    print(
        f"right in {second} only: {result.only_second}, in {first} only: {result.only_first}; McNemar's exact test "
        f"p = {result.p_value:.3g}"
    )
    for name in ("accuracy", "log_loss"):
        gap = getattr(result, name)
        print(f"{name}: {gap.value:+.4f} (95 % interval {gap.low:+.4f} to {gap.high:+.4f}, paired bootstrap)")
    print(result.verdict(first, second))
