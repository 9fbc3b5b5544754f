"""Rows whose label is probably wrong."""

import numpy as np

from vqa.reports.diagnostics import find_label_issues


def test_an_example_by_hand():
    """Labels get (0.9 + 0.8 + 0.1 + 0.02 + 0.3 + 0.1) / 6 = 0.37 from the first and as much from the second."""
    first = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.1, 0.9, 0], [0.02, 0.98, 0], [0.3, 0.35, 0.35], [0.1, 0.9, 0]])
    second = first.copy()
    second[5] = [0.1, 0.3, 0.6]  # another wrong choice: not consistent
    rows, instead = find_label_issues(np.stack([first, second]), np.array([0, 1, 0, 0, 0, 0]))
    assert rows.tolist() == [3, 2] and instead.tolist() == [1, 1], "row 4 is wrong but not sure"
    rows, _ = find_label_issues(np.stack([first, first]), np.array([0, 1, 0, 0, 0, 0]))
    assert rows.tolist() == [3, 2, 5]


def test_planted_labels_are_found_and_few_others():
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 600)
    scores = random.normal(size=(600, 4))
    scores[np.arange(600), answers] += 4
    stack = np.stack([scores + random.normal(size=(600, 4)) * 0.3 for _ in range(3)])
    stack = np.exp(stack) / np.exp(stack).sum(2, keepdims=True)
    planted = random.choice(600, 12, replace=False)
    labels = answers.copy()
    labels[planted] = (labels[planted] + random.integers(1, 4, 12)) % 4
    rows, instead = find_label_issues(stack, labels)
    assert len(set(rows) & set(planted)) >= 7 and len(rows) <= 12
    hits = np.isin(rows, planted)
    assert (instead[hits] == answers[rows[hits]]).all()
