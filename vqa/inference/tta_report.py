"""What test-time augmentation is worth, on out-of-fold rows: each view, the confidence gate, the position bias."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vqa.data.prompt import LETTERS
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.significance import Comparison, compare
from vqa.inference.tta import PERMUTATION_SETS, ViewPredictions

COUNTED = {*PERMUTATION_SETS.values(), "wording"}  # views of which a flag takes so many, from the first on


GATES = np.arange(0.1, 1, 0.1)  # candidates: these quantiles of the margins


@dataclass(frozen=True)
class Trial:
    """Out-of-fold rows with their answers' indices (rows,), in views that took `seconds` (views,) in all."""

    seen: ViewPredictions
    answers: np.ndarray
    clusters: Mapping[str, np.ndarray]
    seconds: np.ndarray

    def compare(self, before: np.ndarray, after: np.ndarray) -> Comparison:
        return compare(before, after, self.answers, self.clusters)

    def forwards(self, views: Sequence[int], gate: float | None = None) -> float:
        """Forward passes a row, on the average."""
        return float(self.seen.asked(views, gate).sum(0).mean())

    def table(self) -> list[dict]:
        """A line for each view, added to those before it, and one for each such set with its gate.

        `verdict` judges a line against the one before it, a gated one against the same set without a gate.
        """
        sets = [list(range(count)) for count in range(1, len(self.seen.names) + 1)]
        lines, before = [self._line("plain", sets[0], None, None)], self.seen.mean(sets[0])
        for views in sets[1:]:
            lines.append(self._line(f"+ {self.seen.names[views[-1]]}", views, None, before))
            before = self.seen.mean(views)
        for views in sets[1:]:
            if (gate := self.gate(views)) is not None:
                lines.append(self._line(f"the first {len(views)}, gated", views, gate, self.seen.mean(views)))
        return lines

    def _line(self, name: str, views: list[int], gate: float | None, before: np.ndarray | None) -> dict:
        values, asked = self.seen.mean(views, gate), self.seen.asked(views, gate)
        right = accuracy(values.argmax(1) == self.answers, self.clusters)
        share = asked.sum(1) / self.seen.shown[views].sum(1)
        line = {
            "views": name,
            "gate": gate,
            "forwards": self.forwards(views, gate),
            "seconds": float(share @ self.seconds[views]),
            "accuracy": right.value,
            "low": right.low,
            "high": right.high,
            "log_loss": float(row_log_loss(values, self.answers).mean()),
            "p": None,
            "verdict": "",
        }
        if before is None:
            return line
        found = self.compare(before, values)
        return line | {"p": found.p_value, "verdict": found.words}

    def gate(self, views: Sequence[int]) -> float | None:
        """The lowest margin above which the plain view will do; None where no row can do without the other views.

        By the rule of one standard error: the fewest rows asked again whose log-loss is within one standard error of
        the lowest, so what is chosen is not the luckiest.
        """
        gates = [*np.unique(np.quantile(self.seen.margins(), GATES).round(3)), None]
        losses = np.stack([row_log_loss(self.seen.mean(views, gate), self.answers) for gate in gates])
        gaps = losses - losses[losses.mean(1).argmin()]
        near = gaps.mean(1) <= gaps.std(1) / np.sqrt(gaps.shape[1])
        return next(gate if gate is None else float(gate) for gate, fine in zip(gates, near) if fine)

    def worth_it(self) -> list[int]:
        """The views that pay: each, or some of a kind together, makes those chosen before it better beyond noise."""
        chosen, waiting = [0], []
        kinds = [name.split()[0] for name in self.seen.names]
        for view in range(1, len(kinds)):
            if kinds[view] != kinds[view - 1] or kinds[view] not in COUNTED:
                waiting = []
            waiting.append(view)
            tried = [*chosen, *waiting]
            if self.compare(self.seen.mean(chosen), self.seen.mean(tried)).better:
                chosen, waiting = tried, []
        return chosen

    def recommendation(self) -> str:
        """One sentence, with the flags that ask for the views that pay."""
        rows, chosen = len(self.answers), self.worth_it()
        if len(chosen) == 1:
            return f"recommended: no TTA; no view makes the plain one better beyond noise at {rows} rows."
        gate, values = self.gate(chosen), self.seen.mean(chosen)
        if gate is not None and min(self.compare(values, self.seen.mean(chosen, gate)).signs) < 0:
            gate = None
        return (
            f"recommended: {flags([self.seen.names[view] for view in chosen], gate)}; better than the plain view "
            f"beyond noise at {rows} rows, with {self.forwards(chosen, gate):.2f} forwards a row."
        )

    def position_bias(self) -> list[dict]:
        """How often each letter is right, and how often it is chosen in the plain view and by all views together."""
        width = int(np.flatnonzero(self.seen.probabilities.any((0, 1)))[-1]) + 1
        picked = {
            "right": self.answers,
            "plain": self.seen.probabilities[0].argmax(1),
            "all views": self.seen.mean().argmax(1),
        }
        shares = {name: np.bincount(values, minlength=width) / len(values) for name, values in picked.items()}
        return [
            {"letter": LETTERS[i]} | {name: float(share[i]) for name, share in shares.items()} for i in range(width)
        ]


def pooled(parts: Sequence[ViewPredictions]) -> ViewPredictions:
    """The answers of several folds to their rows as one; where a fold lacks a view, it shows none of its rows."""
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    rows = sum(part.shown.shape[1] for part in parts)
    values = np.zeros((len(names), rows, parts[0].probabilities.shape[2]))
    shown, start = np.zeros((len(names), rows), dtype=bool), 0
    for part in parts:
        places, own = [names.index(name) for name in part.names], slice(start, start + part.shown.shape[1])
        values[places, own], shown[places, own] = part.probabilities, part.shown
        start = own.stop
    return ViewPredictions(names, values, shown)


def flags(names: Sequence[str], gate: float | None) -> str:
    """predict.py's flags for views of these names."""
    kinds = [name.split() for name in names]
    said = []
    for permutation_set, called in PERMUTATION_SETS.items():
        if count := sum(kind[0] == called for kind in kinds):
            said.append(
                f"--num_permutations {count + 1}"
                + (f" --permutation_set {permutation_set}" if permutation_set != "cyclic" else "")
            )
    if count := sum(kind[0] == "wording" for kind in kinds):
        said.append(f"--num_paraphrases {count + 1}")
    if scales := [kind[1] for kind in kinds if kind[0] == "scale"]:
        said.append(f"--scales 1.0 {' '.join(scales)}")
    said += ["--flip"] if ["flip"] in kinds else []
    said += [f"--gate {gate:g}"] if gate is not None else []
    return " ".join(said)
