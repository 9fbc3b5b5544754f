"""Reference lines for an accuracy: chance and the text alone. Warnings about models that are not above them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqa.data.rows import LETTERS
from vqa.evaluation.metrics import accuracy

# A letter counts as never or nearly always predicted only where chance does not explain it.
NEVER_RIGHT_RATE, NEVER_RIGHT_ROWS = 0.03, 10  # least share and number of rows in which it is right
ALWAYS_RATE = 0.95
REMEDY = "Check the images with explore.py, train longer, or lower the learning rate."


class Reference(NamedTuple):
    """The accuracy of a draw among the choices, and of a classifier that reads the text only; None: not measured."""

    chance: float
    text_only: float | None = None

    @property
    def best(self) -> float:
        return max(self.chance, self.text_only or 0.0)

    def is_below(self, low: float) -> bool:
        """Whether both lines are below `low`, the lower end of an accuracy's 95 % interval."""
        return low > self.best

    def __str__(self) -> str:
        text = "not measured" if self.text_only is None else f"{self.text_only:.4f}"
        return f"chance {self.chance:.4f}, text-only {text}"


def pooled_reference(scores: Sequence[Mapping], chance: float) -> Reference:
    """The reference of several folds, from the scores that training wrote for each; rows count alike."""
    folds = [(fold.get("text_only"), fold.get("rows", 0)) for fold in scores]
    if not folds or any(accuracy is None for accuracy, _ in folds):
        return Reference(chance)
    accuracies, rows = zip(*folds)
    return Reference(chance, float(np.average(accuracies, weights=rows)))


def collapsed_letters(predictions: np.ndarray, answers: np.ndarray) -> str | None:
    """What is wrong where a letter is never predicted though often right, or nearly always predicted; else None.

    `predictions` and `answers` are indices of letters (rows,).
    """
    width = 1 + max(predictions.max(), answers.max())
    predicted, right = (np.bincount(letters, minlength=width) / len(answers) for letters in (predictions, answers))
    top = int(predicted.argmax())
    if predicted[top] >= ALWAYS_RATE and right[top] < ALWAYS_RATE - 0.2:
        return f"{LETTERS[top]} is the prediction in {predicted[top]:.1%} of the rows, and right in {right[top]:.1%}"
    often = (right >= NEVER_RIGHT_RATE) & (right * len(answers) >= NEVER_RIGHT_ROWS)
    never = np.flatnonzero((predicted == 0) & often)
    if len(never):
        return f"{LETTERS[never[0]]} is never the prediction, and right in {right[never[0]]:.1%} of the rows"
    return None


def model_warning(
    name: str | Path,
    probabilities: np.ndarray,
    answers: np.ndarray,
    reference: Reference,
    clusters: Mapping[str, np.ndarray] | None = None,
) -> str | None:
    """One line about a model that is not above its reference or whose letters have collapsed; None where all is well.

    `probabilities` (rows, letters) and the answers' indices (rows,) are of out-of-fold rows; `clusters` of `accuracy`.
    """
    score = accuracy(probabilities.argmax(1) == answers, clusters)
    problems = []
    if not reference.is_below(score.low):
        line = "chance" if reference.best == reference.chance else "a classifier that sees no image"
        problems.append(f"its accuracy {score} is not above that of {line}, {reference.best:.4f}")
    if collapse := collapsed_letters(probabilities.argmax(1), answers):
        problems.append(f"its letters have collapsed: {collapse}")
    if not problems:
        return None
    return f"warning: {name}: {', and '.join(problems)}. {REMEDY}"
