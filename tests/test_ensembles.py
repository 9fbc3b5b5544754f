"""Ensemble methods against scipy and scikit-learn, and what tuning may not do."""

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import gmean
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from vqa.evaluation.ensembling import METHODS, ensemble, fit, nested
from vqa.evaluation.metrics import row_log_loss
from vqa.evaluation.significance import paired_difference
from vqa.evaluation.stacking import _fit_types


def contest(skills, rows=400, letters=4, seed=0, ragged=False):
    """(stack of a model a skill, answers): log-odds of the answer are the skill plus noise of size 1."""
    generator = np.random.default_rng(seed)
    offered = generator.integers(2, letters + 1, rows) if ragged else np.full(rows, letters)
    answers = generator.integers(0, offered)
    scores = generator.normal(size=(len(skills), rows, letters))
    scores[:, np.arange(rows), answers] += np.array(skills)[:, None]
    stack = np.exp(np.where(np.arange(letters) < offered[:, None], scores, -np.inf))
    return stack / stack.sum(-1, keepdims=True), answers


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


def test_geometric_is_scipys_mean_of_logarithms(stack):
    pooled = gmean(stack, axis=0)
    assert ensemble(stack, "geometric") == pytest.approx(pooled / pooled.sum(1, keepdims=True), abs=1e-12)


def test_a_letter_that_a_row_does_not_offer_stays_at_zero(stack):
    stack[:, :20, 3] = 0
    stack /= stack.sum(-1, keepdims=True)
    for method in METHODS:
        values = ensemble(stack, method, [0.5, 0.3, 0.2])
        assert (values[:20, 3] == 0).all() and values.sum(1) == pytest.approx(np.ones(50), abs=1e-12), method


def test_stack_is_scikit_learns_logistic_regression_where_there_are_two_letters():
    stack, answers = contest([1.5, 0.8], rows=500, letters=2)
    odds = np.log(stack[..., 1] / stack[..., 0]).T
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-14, max_iter=1000, solver="newton-cholesky")
    oracle.fit(odds, answers)
    found = fit("stack", stack, answers)
    assert found.weights == pytest.approx(oracle.coef_[0], abs=1e-9)
    assert found(stack) == pytest.approx(oracle.predict_proba(odds), abs=1e-9)
    assert ensemble(stack, "stack", oracle.coef_[0]) == pytest.approx(oracle.predict_proba(odds), abs=1e-12)


@pytest.mark.slow
def test_stack_is_the_best_of_its_kind_where_rows_offer_two_to_five_letters():
    """Against the likelihood written out row by row and minimised without derivatives."""
    stack, answers = contest([1.5, 0.8, 1.0], rows=300, letters=5, ragged=True)

    def loss(coefficients):
        total = 0.0
        for row, answer in enumerate(answers):
            offered = [i for i in range(5) if stack[0, row, i] > 0]
            score = {i: sum(c * np.log(p[row, i]) for c, p in zip(coefficients, stack)) for i in offered}
            total -= score[answer] - np.log(sum(np.exp(value) for value in score.values()))
        return total

    found = fit("stack", stack, answers)
    oracle = minimize(loss, np.ones(3) / 3, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
    assert (found.weights > 0).all()
    assert found.weights == pytest.approx(oracle.x, abs=1e-4)


def test_temperature_is_the_one_that_scipy_finds():
    stack, answers = contest([1.0, 1.0], rows=400)
    hot = stack**3 / (stack**3).sum(-1, keepdims=True)  # three times too sure

    def loss(temperature):
        scaled = hot[0] ** (1 / temperature)
        return log_loss(answers, scaled / scaled.sum(1, keepdims=True), labels=range(4))

    oracle = minimize_scalar(loss, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-9})
    assert 1 / fit("mean", hot, answers, temperature=True).inverse_temperature[0] == pytest.approx(oracle.x, rel=1e-5)
    assert fit("mean", hot, answers, temperature=True)(hot).sum(1) == pytest.approx(np.ones(400), abs=1e-12)


def test_greedy_is_selection_with_replacement_written_out():
    stack, answers = contest([1.5, 0.8, 0.3], rows=200)
    picked, losses = [], []
    for _ in range(50):
        trial = [log_loss(answers, stack[[*picked, m]].mean(0), labels=range(4)) for m in range(3)]
        picked.append(int(np.argmin(trial)))
        losses.append(min(trial))
    best = picked[: int(np.argmin(losses)) + 1]
    weights = fit("greedy", stack, answers).weights
    assert weights == pytest.approx([best.count(m) / len(best) for m in range(3)], abs=1e-12)
    assert log_loss(answers, ensemble(stack, "greedy", weights), labels=range(4)) == pytest.approx(min(losses))


def test_weighted_goes_by_the_inverse_of_the_log_loss():
    stack, answers = contest([1.5, 0.8])
    inverse = [1 / log_loss(answers, member, labels=range(4)) for member in stack]
    assert fit("weighted", stack, answers).weights == pytest.approx(np.array(inverse) / sum(inverse), abs=1e-12)


def test_nested_scores_owe_nothing_to_the_rows_they_score():
    """Twenty models of noise on 60 rows: fitted and scored on the same rows a stack gains, nested it cannot."""
    generator = np.random.default_rng(0)
    stack, answers = generator.dirichlet(np.ones(4), (20, 60)), generator.integers(0, 4, 60)
    inside = row_log_loss(fit("greedy", stack, answers)(stack), answers).mean()
    outside = row_log_loss(nested("greedy", stack, answers), answers).mean()
    assert inside < np.log(4) < outside


def test_rows_of_one_image_are_never_fitted_on_and_scored_at_once(monkeypatch):
    """Each image has 5 rows; what `fit` is given is compared with what is held out."""
    stack, answers = contest([1.0, 1.0], rows=200)
    stack[0, :, 0], images = np.repeat(np.arange(40), 5) + 2, np.repeat(np.arange(40), 5)
    held, seen = [], []

    def spy(method, stack, *rest):
        seen.append(set(stack[0, :, 0]))
        return lambda stack, types: held.append(set(stack[0, :, 0])) or stack.mean(0)

    monkeypatch.setattr("vqa.evaluation.ensembling.fit", spy)
    nested("mean", stack, answers, {"image": images})
    assert len(seen) == 5 and all(not a & b for a, b in zip(seen, held)) and len(set.union(*held)) == 40


def test_a_copy_and_noise_get_no_weight():
    for seed in range(5):
        stack, answers = contest([1.5, 1.0], rows=600, seed=seed)
        noise = np.random.default_rng(seed).dirichlet(np.ones(4), 600)
        planted = np.stack([stack[0], stack[0], stack[1], noise])
        weights = fit("stack", planted, answers).weights
        assert weights[3] == 0 and sorted(weights[:2])[0] == 0 and weights[2] > 0.1, weights
        assert fit("greedy", planted, answers).weights[3] <= 0.01


def test_the_weights_of_a_type_are_scikit_learns_ridge_where_there_are_two_letters():
    stack, answers = contest([1.5, 0.8], rows=400, letters=2)
    types, odds = np.array(["count", "colour"] * 200), np.log(stack[..., 1] / stack[..., 0]).T
    found = _fit_types(stack, answers, types, np.zeros(2), strength=20.0)
    for name, weights in found.items():
        oracle = LogisticRegression(C=1 / 20, fit_intercept=False, tol=1e-12).fit(
            odds[types == name], answers[types == name]
        )
        assert weights == pytest.approx(oracle.coef_[0], abs=1e-4)
    tight = _fit_types(stack, answers, types, np.array([0.9, 0.1]), strength=1e9)
    assert tight["count"] == pytest.approx([0.9, 0.1], abs=1e-4)


def gain_by_type(stack, answers, types):
    """The nested log-loss of stack_by_type minus that of stack, with its interval."""
    losses = [row_log_loss(nested(m, stack, answers, types=types), answers) for m in ("stack", "stack_by_type")]
    return paired_difference(*losses)


def test_weights_by_type_find_models_that_are_good_at_different_questions():
    stack, answers = contest([1.8, 0.3], rows=400)
    types = np.random.default_rng(1).choice(["colour", "count"], 400)
    stack[:, types == "count"] = stack[::-1, types == "count"]
    assert gain_by_type(stack, answers, types).high < -0.05
    chosen = fit("stack_by_type", stack, answers, types=types)
    assert chosen.by_type["colour"][0] > 3 * chosen.by_type["colour"][1]
    assert chosen.by_type["count"][1] > 3 * chosen.by_type["count"][0]
    unknown = chosen(stack, np.array(["never seen"] * 400))
    assert unknown == pytest.approx(ensemble(stack, "stack", chosen.weights), abs=1e-15)


@pytest.mark.parametrize("skills", [[1.5, 0.8], [1.2, 1.2]])
def test_weights_by_type_gain_nothing_where_types_mean_nothing(skills):
    """Three draws for each pair of skills; the types are random."""
    gaps = []
    for seed in range(3):
        stack, answers = contest(skills, rows=150, seed=seed)
        types = np.random.default_rng(100 + seed).choice(["colour", "count", "place"], 150)
        gaps.append(gain_by_type(stack, answers, types))
    assert not any(gap.high < 0 for gap in gaps), "no draw gains beyond noise"
    assert -0.002 < np.mean([gap.value for gap in gaps]) < 0.01, "and they lose little"
