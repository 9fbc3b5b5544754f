"""Rows whose label is probably wrong: an example by hand, cleanlab, and planted label noise."""

import numpy as np
import pytest
from scipy.special import softmax

from vqa.reports.diagnostics import find_label_issues


def test_an_example_by_hand():
    """Letter a is the label of rows 0 to 3: its threshold is (0.9 + 0.7 + 0.1 + 0.3) / 4 = 0.5; b's is 0.8.

    Row 2 is predicted b at 0.9, which reaches 0.8: one issue. Row 3 is predicted b at 0.7, which does not. Row 2 has
    the lowest probability of its label.
    """
    first = np.array([0.9, 0.7, 0.1, 0.3, 0.2])
    rows, instead = find_label_issues(np.stack([first, 1 - first], 1), np.array([0, 0, 0, 0, 1]))
    assert rows.tolist() == [2] and instead.tolist() == [1]
    rows, _ = find_label_issues(np.stack([first, 1 - first], 1), np.array([0, 0, 0, 0, 0]))
    assert len(rows) == 0, "b is no label, so it has no threshold to reach"


def planted(noise, skill, seed=0, rows=4000):
    """(probabilities (rows, 4), labels, right answers): calibrated, as of models trained on labels with this noise."""
    random = np.random.default_rng(seed)
    scores = skill * random.normal(size=(rows, 4))
    answers = (softmax(scores, 1).cumsum(1) < random.random((rows, 1))).sum(1).clip(max=3)
    other = (answers + random.integers(1, 4, rows)) % 4
    labels = np.where(random.random(rows) < noise, other, answers)
    probs = softmax(scores + 0.3 * random.normal(size=(3, rows, 4)), 2).mean(0)  # three sets of weights
    return (1 - noise) * probs + noise * (1 - probs) / 3, labels, answers


@pytest.mark.parametrize(
    ("noise", "skill", "precision", "recall"),
    [
        *[(0.05, 2, 0.20, 0.75), (0.05, 4, 0.45, 0.80), (0.05, 8, 0.75, 0.83)],
        *[(0.20, 2, 0.48, 0.80), (0.20, 4, 0.70, 0.83), (0.20, 8, 0.87, 0.88)],
    ],
)
def test_planted_label_noise_is_found(noise, skill, precision, recall):
    probs, labels, answers = planted(noise, skill)
    wrong = labels != answers
    rows, instead = find_label_issues(probs, labels)
    found = wrong[rows].mean(), wrong[rows].sum() / wrong.sum(), wrong[rows[:50]].mean()
    accuracy = (probs.argmax(1) == answers).mean()
    print(f"{noise:.0%} wrong labels, accuracy {accuracy:.1%}: {len(rows)} rows, precision {found[0]:.1%}, recall "
          f"{found[1]:.1%}, precision of the first 50 {found[2]:.1%}")  # fmt: skip
    assert found[0] >= precision and found[1] >= recall
    right = instead[wrong[rows]] == answers[rows[wrong[rows]]]
    assert right.mean() > 0.7, "the suggestion is the right answer"


@pytest.mark.parametrize("skill", [1, 4])
def test_the_rows_are_those_of_cleanlab(skill):
    cleanlab = pytest.importorskip("cleanlab.filter")
    for noise in (0.05, 0.2):
        probs, labels, _ = planted(noise, skill, rows=500)
        theirs = cleanlab.find_label_issues(labels, probs, filter_by="low_self_confidence", n_jobs=1)
        rows, _ = find_label_issues(probs, labels)
        assert set(rows) == set(np.flatnonzero(theirs & (probs.argmax(1) != labels)))
