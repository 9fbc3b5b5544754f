"""A cascade: rows of which a first model is unsure go through a second, larger one; the others keep their answer.

Arithmetic on the probabilities (rows, letters) of both models, in the same order of rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vqa.evaluation.metrics import NOISE, accuracy, margins, row_log_loss
from vqa.evaluation.significance import Comparison, compare

SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)  # of the rows, to compare
WEIGHTS = (0.5, 1.0)  # of the second model, to compare


@dataclass(frozen=True)
class Cascade:
    """`share` of the rows are sent to the second model, which has that `weight` in them; the first has the rest."""

    share: float
    weight: float

    def sent(self, first: np.ndarray) -> np.ndarray:
        """The rows to send, bool (rows,): those whose two likeliest letters are closest together."""
        chosen = np.zeros(len(first), dtype=bool)
        count = max(int(self.share > 0), round(self.share * len(first)))
        chosen[np.argsort(margins(first), kind="stable")[:count]] = True
        return chosen

    def combine(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The probabilities of the cascade. Rows of `second` that are not sent do not count."""
        mean = self.weight * second + (1 - self.weight) * first
        return np.where(self.sent(first)[:, None], mean, first)


@dataclass(frozen=True)
class CascadeReport:
    """What cascades of two models gain on out-of-fold rows with these answers, their indices (rows,)."""

    first: np.ndarray
    second: np.ndarray
    answers: np.ndarray
    clusters: Mapping[str, np.ndarray]

    @cached_property
    def comparisons(self) -> dict[Cascade, Comparison]:
        """Each cascade against the first model alone."""
        cascades = [Cascade(share, weight) for weight in WEIGHTS for share in SHARES]
        return {cascade: self._compare(self.first, cascade.combine(self.first, self.second)) for cascade in cascades}

    def _compare(self, before: np.ndarray, after: np.ndarray) -> Comparison:
        return compare(before, after, self.answers, self.clusters)

    def table(self) -> list[dict]:
        """A line for the first model and one for each cascade; `change`, `p` and `verdict` are against the first.

        `rows` go through the second model: the cost.
        """
        lines = [self._line(Cascade(0.0, 0.0))]
        for cascade, result in self.comparisons.items():
            test = {"change": result.accuracy.value, "p": result.p_value, "verdict": result.words}
            lines.append(self._line(cascade) | test)
        return lines

    def _line(self, cascade: Cascade) -> dict:
        values = cascade.combine(self.first, self.second)
        correct = accuracy(values.argmax(1) == self.answers, self.clusters)
        line = {"share": cascade.share, "weight": cascade.weight, "rows": int(cascade.sent(self.first).sum())}
        line |= {"accuracy": correct.value, "low": correct.low, "high": correct.high}
        return line | {"log_loss": float(row_log_loss(values, self.answers).mean()), "verdict": ""}

    def recommended(self) -> Cascade | None:
        """The cheapest cascade that is good enough; None where none gains accuracy beyond noise.

        The weight is that with the lower log-loss where every row is sent. Of the shares that gain, it is the smallest
        that the best of them does not beat beyond noise. Since several shares are tried, a gain has to pass a stricter
        test (Bonferroni).
        """
        everything = {weight: Cascade(1.0, weight).combine(self.first, self.second) for weight in WEIGHTS}
        weight = min(WEIGHTS, key=lambda weight: row_log_loss(everything[weight], self.answers).mean())
        gains = [
            cascade
            for cascade, result in self.comparisons.items()
            if cascade.weight == weight and result.signs[0] > 0 and result.p_value < NOISE / len(SHARES)
        ]
        if not gains:
            return None
        best = max(gains, key=lambda cascade: self.comparisons[cascade].accuracy.value)
        best_values = best.combine(self.first, self.second)
        return next(
            cascade
            for cascade in gains
            if self._compare(cascade.combine(self.first, self.second), best_values).signs[0] <= 0
        )
