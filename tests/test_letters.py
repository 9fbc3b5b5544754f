"""Letters: how often each is right and predicted."""

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.metrics import confusion_matrix

from vqa.reports.diagnostics import letter_bias, uniformity_test


def test_the_uniformity_test_takes_the_number_of_choices_into_account():
    """Six rows of two choices and three of three: a and b are expected 6 / 2 + 3 / 3 = 4 times each, c once."""
    found = uniformity_test(np.array([0, 0, 0, 1, 1, 1, 0, 1, 2]), np.array([2] * 6 + [3] * 3))
    assert found.expected.tolist() == [4, 4, 1] and found.counts.tolist() == [4, 4, 1] and found.p_value == 1
    found = uniformity_test(np.array([0] * 30 + [1] * 10), np.full(40, 2))
    assert found.p_value == pytest.approx(chi2.sf(10, df=1)), "(30 - 20)² / 20 + (10 - 20)² / 20 = 10"


def test_a_letter_bias_is_found_where_it_is_beyond_noise():
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 400)
    predictions = np.where(random.random(400) < 0.7, answers, random.integers(0, 4, 400))
    assert letter_bias(confusion_matrix(answers, predictions)).tolist() == [0, 0, 0, 0]
    biased = np.where((predictions != answers) & (random.random(400) < 0.7), 2, predictions)
    found = letter_bias(confusion_matrix(answers, biased))
    assert found[2] == 1 and set(found[[0, 1, 3]]) <= {0, -1}
    avoiding = np.where(predictions == 1, 3, predictions)
    assert letter_bias(confusion_matrix(answers, avoiding))[[1, 3]].tolist() == [-1, 1]


def test_a_letter_bias_must_be_clearer_among_more_letters():
    """9 against 1 discordant rows: p = 2 * (1 + 10) / 2 ** 10 = 0.0215, below 0.05 / 2 and not below 0.05 / 4."""
    counts = np.array([[5, 1], [9, 5]])
    assert letter_bias(counts).tolist() == [1, -1]
    assert letter_bias(np.pad(counts, (0, 2))).tolist() == [0, 0, 0, 0]
