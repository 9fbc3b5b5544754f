"""Is one better than the other? Told in some lines and one sentence."""

from collections.abc import Sequence

import numpy as np

from vqa.statistics import accuracy, annotator_losses, compare, row_losses
from vqa.truth import Truth


def tell_comparison(first: str, second: str, ids: Sequence[str], stack: np.ndarray, truth: Truth) -> None:
    """Compare probabilities `stack` (2, rows, letters) of the rows `ids`, named `first` and `second`."""
    answers, clusters, shares = truth.answers(ids), truth.clusters(ids), truth.shares(ids)
    for name, values in zip((first, second), stack):
        right = accuracy(values.argmax(1) == answers, clusters)
        print(f"{name}: accuracy {right}, log-loss {row_losses(values, answers).mean():.4f}")
        if shares is not None:
            print(f"{name}: cross-entropy to the annotators {annotator_losses(values, shares).mean():.4f}")
    found = compare(*stack, answers, clusters)
    print(
        f"right in {second} only: {found.only_second}, in {first} only: {found.only_first}; McNemar's exact test "
        f"p = {found.p_value:.3g}"
    )
    for name in ("accuracy", "log_loss"):
        gap = getattr(found, name)
        print(f"{name}: {gap.value:+.4f} (95 % interval {gap.low:+.4f} to {gap.high:+.4f}, paired bootstrap)")
    print(found.verdict(first, second))
