"""Reliability against scikit-learn's calibration curve and an example by hand."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from vqa.reports.diagnostics import reliability


@pytest.mark.parametrize("inverse_temperature", [0.3, 1.0, 3.0])
def test_bins_are_scikit_learns(inverse_temperature):
    random = np.random.default_rng(0)
    scores = random.normal(size=(500, 4)) * inverse_temperature
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    answers = random.integers(0, 4, 500)
    found = reliability(probabilities, answers)
    right = probabilities.argmax(1) == answers
    accuracy, confidence = calibration_curve(right, probabilities.max(1), n_bins=10)
    assert found.confidence == pytest.approx(confidence) and found.accuracy == pytest.approx(accuracy)
    assert found.rows.sum() == 500 and found.gap == pytest.approx(probabilities.max(1).mean() - right.mean())


def test_the_expected_calibration_error_of_an_example_by_hand():
    """Three rows at 0.9, two of them right, and one at 0.55, right: (3 * |0.9 - 2/3| + 1 * |0.55 - 1|) / 4."""
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.55, 0.45]])
    found = reliability(probabilities, np.array([0, 1, 1, 0]))
    assert found.error == pytest.approx((3 * (0.9 - 2 / 3) + 0.45) / 4)
    assert found.rows.tolist() == [1, 3] and found.gap == pytest.approx((3 * 0.9 + 0.55) / 4 - 3 / 4)


def test_full_certainty_stays_in_the_last_bin():
    found = reliability(np.array([[1.0, 0.0], [0.95, 0.05]]), np.array([0, 1]))
    assert found.rows.tolist() == [2] and found.error == pytest.approx(0.975 - 0.5)
