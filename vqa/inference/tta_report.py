"""What test-time augmentation gains on out-of-fold rows: each view, the gate, the position bias, a recommendation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.io import write_json
from vqa.data.prompt import LETTERS
from vqa.data.table import write_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.significance import Comparison, compare
from vqa.inference.tta import PERMUTATION_SETS, ViewPredictions

COUNTED = {*PERMUTATION_SETS.values(), "paraphrase"}  # a flag takes the first N views of such a kind
GATE_QUANTILES = np.arange(0.1, 1, 0.1)  # candidates for the gate: these quantiles of the margins


@dataclass(frozen=True)
class TTAReport:
    """Predictions of out-of-fold rows in several views, with the indices of their answers (rows,)."""

    predictions: ViewPredictions
    answers: np.ndarray
    clusters: Mapping[str, np.ndarray]

    def compare(self, before: np.ndarray, after: np.ndarray) -> Comparison:
        return compare(before, after, self.answers, self.clusters)

    def forwards(self, views: Sequence[int], gate: float | None = None) -> float:
        """Forward passes a row, on average."""
        return float(self.predictions.used(views, gate).sum(0).mean())

    def table(self) -> list[dict]:
        """A line for each view, added to those before it, and a line for each of these sets with its gate.

        `p` and `verdict` compare a line with the one above it, and a gated one with the same set without a gate.
        """
        mean, names = self.predictions.mean, self.predictions.names
        sets = [list(range(count)) for count in range(1, len(names) + 1)]
        lines = [self._line("plain", sets[0])]
        lines += [self._line(f"+ {names[views[-1]]}", views, None, mean(views[:-1])) for views in sets[1:]]
        for views in sets[1:]:
            if (gate := self.best_gate(views)) is not None:
                lines.append(self._line(f"the first {len(views)}, gated", views, gate, mean(views)))
        return lines

    def _line(
        self, name: str, views: list[int], gate: float | None = None, before: np.ndarray | None = None
    ) -> dict[str, str | float | None]:
        values, used = self.predictions.mean(views, gate), self.predictions.used(views, gate)
        correct = accuracy(values.argmax(1) == self.answers, self.clusters)
        used_share = used.sum(1) / self.predictions.shown[views].sum(1)
        comparison = None if before is None else self.compare(before, values)
        return {
            "views": name,
            "gate": gate,
            "forwards": self.forwards(views, gate),
            "seconds": float(used_share @ self.predictions.seconds[views]),
            "accuracy": correct.value,
            "low": correct.low,
            "high": correct.high,
            "log_loss": float(row_log_loss(values, self.answers).mean()),
            "p": comparison and comparison.p_value,
            "verdict": comparison.words if comparison else "",
        }

    def best_gate(self, views: Sequence[int]) -> float | None:
        """The margin from which the plain view is enough; None where every row gains from the other views.

        By the one-standard-error rule: the lowest gate whose log-loss is within one standard error of the best, so
        that the choice does not follow luck.
        """
        gates = [*np.unique(np.quantile(self.predictions.margins(), GATE_QUANTILES).round(3)), None]
        losses = np.stack([row_log_loss(self.predictions.mean(views, gate), self.answers) for gate in gates])
        gaps = losses - losses[losses.mean(1).argmin()]
        near = gaps.mean(1) <= gaps.std(1) / np.sqrt(gaps.shape[1])
        return next(gate if gate is None else float(gate) for gate, good in zip(gates, near) if good)

    def helpful_views(self) -> list[int]:
        """The views to use: each, or several of a kind together, improves on those chosen before beyond noise."""
        chosen: list[int] = [0]
        waiting: list[int] = []
        kinds = [name.split()[0] for name in self.predictions.names]
        for view in range(1, len(kinds)):
            if kinds[view] != kinds[view - 1] or kinds[view] not in COUNTED:
                waiting = []
            waiting.append(view)
            candidates = [*chosen, *waiting]
            if self.compare(self.predictions.mean(chosen), self.predictions.mean(candidates)).better:
                chosen, waiting = candidates, []
        return chosen

    def recommendation(self) -> str:
        """One sentence with the flags for the helpful views."""
        rows, views = len(self.answers), self.helpful_views()
        if len(views) == 1:
            return f"recommended: no TTA; no view improves on the plain one beyond noise at {rows} rows."
        gate, values = self.best_gate(views), self.predictions.mean(views)
        if gate is not None and min(self.compare(values, self.predictions.mean(views, gate)).signs) < 0:
            gate = None
        return (
            f"recommended: {flags([self.predictions.names[view] for view in views], gate)}; better than the plain "
            f"view beyond noise at {rows} rows, with {self.forwards(views, gate):.2f} forwards a row."
        )

    def position_bias(self) -> list[dict[str, str | float]]:
        """How often each letter is right, and how often the plain view and the mean of all views choose it."""
        letters = {
            "right": self.answers,
            "plain": self.predictions.probabilities[0].argmax(1),
            "all views": self.predictions.mean().argmax(1),
        }
        width = int(np.flatnonzero(self.predictions.probabilities.any((0, 1)))[-1]) + 1
        rates = {name: np.bincount(values, minlength=width) / len(values) for name, values in letters.items()}
        return [{"letter": LETTERS[i]} | {name: float(rate[i]) for name, rate in rates.items()} for i in range(width)]


def write_tta_report(folder: Path, labels: Labels, ids: Sequence[str], folds: Sequence[ViewPredictions]) -> None:
    """Print the report on the predictions of all `folds` and write it to tta.json and tta.csv.

    `ids` are those of their rows, fold after fold; `labels` has their answers.
    """
    report = TTAReport(concat_folds(folds), labels.answers(ids), labels.clusters(ids))
    views, bias, recommendation = report.table(), report.position_bias(), report.recommendation()
    print(f"\neach view added to those above it, on {len(ids)} out-of-fold rows of {labels.path}:")
    print(pd.DataFrame(views).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    print("\nhow often each letter is right, and is chosen:")
    print(pd.DataFrame(bias).to_string(index=False, float_format="{:.3f}".format))
    print(f"\n{recommendation}")
    values = {"rows": len(ids), "views": views, "position_bias": bias, "recommendation": recommendation}
    write_json(folder / "tta.json", values)
    write_table(folder / "tta.csv", pd.DataFrame(views))


def concat_folds(folds: Sequence[ViewPredictions]) -> ViewPredictions:
    """The predictions of several folds as one. Where a fold lacks a view, that view has none of its rows."""
    names = list(dict.fromkeys(name for fold in folds for name in fold.names))
    rows = sum(fold.shown.shape[1] for fold in folds)
    values = np.zeros((len(names), rows, folds[0].probabilities.shape[2]))
    shown, seconds, start = np.zeros((len(names), rows), dtype=bool), np.zeros(len(names)), 0
    for fold in folds:
        views, own = [names.index(name) for name in fold.names], slice(start, start + fold.shown.shape[1])
        values[views, own], shown[views, own] = fold.probabilities, fold.shown
        seconds[views] += fold.seconds
        start = own.stop
    return ViewPredictions(names, values, shown, seconds)


def flags(names: Sequence[str], gate: float | None) -> str:
    """predict.py's flags for the views of these names."""
    kinds = [name.split() for name in names]
    counts = {kind: sum(own[0] == kind for own in kinds) for kind in COUNTED}
    result = []
    for permutation_set, kind in PERMUTATION_SETS.items():
        if counts[kind]:
            result.append(f"--num_permutations {counts[kind] + 1}")
            result += [f"--permutation_set {permutation_set}"] if permutation_set != "cyclic" else []
    if counts["paraphrase"]:
        result.append(f"--num_paraphrases {counts['paraphrase'] + 1}")
    if scales := [kind[1] for kind in kinds if kind[0] == "scale"]:
        result.append(f"--scales 1.0 {' '.join(scales)}")
    result += [f"--{kind}" for kind in ("flip", "crops") if [kind] in kinds]
    result += [f"--gate {gate:g}"] if gate is not None else []
    return " ".join(result)
