"""Letters: how often each is right and answered."""

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from vqa.reports.diagnostics import confusion_matrix, letter_bias, uniformity_test


def test_a_fair_draw_takes_the_offered_choices_into_account():
    """Six rows of two choices and three of three: a and b are due 6 / 2 + 3 / 3 = 4 times each, c once."""
    found = uniformity_test(np.array([0, 0, 0, 1, 1, 1, 0, 1, 2]), np.array([2] * 6 + [3] * 3))
    assert found.fair.tolist() == [4, 4, 1] and found.counts.tolist() == [4, 4, 1] and found.p_value == 1
    found = uniformity_test(np.array([0] * 30 + [1] * 10), np.full(40, 2))
    assert found.p_value == pytest.approx(chi2.sf(10, df=1)), "(30 - 20)² / 20 + (10 - 20)² / 20 = 10"


def test_confusion_is_scikit_learns():
    random = np.random.default_rng(0)
    said, answers = random.integers(0, 4, 100), random.integers(0, 5, 100)
    assert (confusion_matrix(said, answers, 5) == sklearn_confusion_matrix(answers, said, labels=range(5))).all()


def test_a_leaning_is_found_where_it_is_beyond_noise():
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 400)
    said = np.where(random.random(400) < 0.7, answers, random.integers(0, 4, 400))
    assert letter_bias(confusion_matrix(said, answers, 4)).tolist() == [0, 0, 0, 0]
    leaning = np.where((said != answers) & (random.random(400) < 0.7), 2, said)
    found = letter_bias(confusion_matrix(leaning, answers, 4))
    assert found[2] == 1 and set(found[[0, 1, 3]]) <= {0, -1}
    avoiding = np.where(said == 1, 3, said)
    assert letter_bias(confusion_matrix(avoiding, answers, 4))[[1, 3]].tolist() == [-1, 1]


def test_a_leaning_has_to_be_clearer_among_more_letters():
    """9 against 1 discordant rows: p = 2 * (1 + 10) / 2 ** 10 = 0.0215, below 0.05 / 2 and not below 0.05 / 4."""
    counts = np.array([[5, 1], [9, 5]])
    assert letter_bias(counts).tolist() == [1, -1]
    assert letter_bias(np.pad(counts, (0, 2))).tolist() == [0, 0, 0, 0]
