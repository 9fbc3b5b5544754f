"""Ensemble methods against scipy and scikit-learn, and what tuning may not do."""

import numpy as np
import pytest

from vqa.ensembles import ensemble


@pytest.fixture
def stack():
    return np.random.default_rng(0).dirichlet(np.ones(4), (3, 50))


def test_mean_and_weighted_are_numpys_averages(stack):
    assert ensemble(stack, "mean") == pytest.approx(sum(stack) / 3, abs=1e-15)
    weights = [0.5, 0.3, 0.2]
    by_hand = sum(weight * part for weight, part in zip(weights, stack))
    assert ensemble(stack, "weighted", weights) == pytest.approx(by_hand, abs=1e-15)


def test_majority_counts_votes_and_breaks_ties_by_the_mean_probability():
    vote = ensemble(np.array([[[0.4, 0.3, 0.3]], [[0.4, 0.3, 0.3]], [[0.0, 0.1, 0.9]]]), "majority")
    assert vote.argmax() == 0, "two votes beat one, however sure that one is"
    tie = ensemble(np.array([[[0.4, 0.3, 0.3]], [[0.0, 0.1, 0.9]]]), "majority")
    assert tie.argmax() == 2
    assert vote.sum() == pytest.approx(1) and tie.sum() == pytest.approx(1)


def test_majority_agrees_with_scipys_mode_where_there_is_one(stack):
    from scipy.stats import mode

    votes, counts = mode(stack.argmax(-1), axis=0)
    clear = counts >= 2
    assert clear.sum() > 10
    assert (ensemble(stack, "majority").argmax(1)[clear] == votes[clear]).all()
