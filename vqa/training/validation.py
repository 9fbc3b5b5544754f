"""Accuracy and log-loss of the letters as an `evaluate` metric."""

from collections.abc import Sequence

import evaluate
import numpy as np
from datasets import Features, List, Value

from vqa.evaluation.metrics import accuracy_and_log_loss


class LetterScore(evaluate.Metric):
    """Letter accuracy, in [0, 1], and letter log-loss, in nats. Needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": List(Value("float64")), "references": Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return accuracy_and_log_loss(np.asarray(predictions), references)


def letter_metrics(probabilities: np.ndarray, answers: Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    return LetterScore(keep_in_memory=True).compute(predictions=probabilities, references=answers)
