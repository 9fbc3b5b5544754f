"""Intervals and paired tests, against scipy, scikit-learn and simulation."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import accuracy_score, hamming_loss, jaccard_score, log_loss

from vqa.evaluation.metrics import accuracy, accuracy_and_log_loss, row_log_loss, wilson_interval
from vqa.evaluation.significance import compare, error_overlap, mean_loss, paired_difference


def make(rows=400, seed=0, letters=4):
    """(probabilities of two models, answers)."""
    generator = np.random.default_rng(seed)
    answers = generator.integers(0, letters, rows)
    models = generator.dirichlet(np.ones(letters), (2, rows))
    models[:, np.arange(rows), answers] += generator.random((2, rows))
    return *(models / models.sum(-1, keepdims=True)), answers


def test_scores_are_scikit_learns_to_twelve_digits():
    probabilities, _, answers = make()
    got = accuracy_and_log_loss(np.pad(probabilities, ((0, 0), (0, 6))), answers)
    assert got["accuracy"] == accuracy_score(answers, probabilities.argmax(1))
    assert got["log_loss"] == pytest.approx(log_loss(answers, probabilities, labels=range(4)), abs=1e-12)
    assert row_log_loss(probabilities[:, :2], np.array([3] * 400)) == pytest.approx(-np.log(np.finfo(float).eps))


@pytest.mark.parametrize(("right", "rows"), [(80, 100), (0, 30), (30, 30), (1, 7), (123_456, 200_000)])
def test_the_interval_is_wilsons_by_scipy(right, rows):
    interval = binomtest(right, rows).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, rows) == pytest.approx((interval.low, interval.high), abs=1e-12)
    found = accuracy(np.arange(rows) < right)
    assert (found.low, found.high, found.by) == (*wilson_interval(right, rows), None)


def test_rows_of_one_image_that_are_right_together_count_once():
    """Ten copies of each row say no more than the row; that the rows were copies is all that `clusters` tells."""
    correct = np.random.default_rng(1).random(200) < 0.7
    once, tenfold = accuracy(correct), accuracy(np.repeat(correct, 10), {"image": np.repeat(np.arange(200), 10)})
    assert tenfold.by == "image"
    assert tenfold.high - tenfold.low == pytest.approx(once.high - once.low, rel=0.02)
    assert accuracy(np.ones(2000, bool), {"image": np.arange(2000) // 10}).low == pytest.approx(
        accuracy(np.ones(200, bool)).low, abs=2e-3
    )


def test_the_clustered_interval_holds_the_truth_as_often_as_it_says():
    """5 rows an image whose difficulty they share: 95 % of intervals hold 0.7, and of unclustered ones far fewer."""
    generator, images = np.random.default_rng(2), np.repeat(np.arange(100), 5)
    held = {"clustered": 0, "plain": 0}
    for _ in range(1000):
        correct = generator.random(500) < generator.beta(0.7, 0.3, 100)[images]
        for name, clusters in (("clustered", {"image": images}), ("plain", None)):
            found = accuracy(correct, clusters)
            held[name] += found.low <= 0.7 <= found.high
    low, high = binom.ppf([0.001, 0.999], 1000, 0.95)
    assert low <= held["clustered"] <= high + 10 and held["plain"] < 800, held


def test_mcnemar_counts_only_the_rows_on_which_two_models_differ():
    first, second, answers = make()
    found = compare(first, second, answers)
    right = first.argmax(1) == answers, second.argmax(1) == answers
    assert found.only_first == (right[0] & ~right[1]).sum() and found.only_second == (~right[0] & right[1]).sum()
    smaller, differing = min(found.only_first, found.only_second), found.only_first + found.only_second
    assert found.p_value == pytest.approx(min(1, 2 * binom.cdf(smaller, differing, 0.5)), abs=1e-12)
    assert compare(first, first, answers).p_value == 1


def test_the_paired_bootstrap_is_seeded_and_near_the_normal_interval():
    first, second, answers = make(2000)
    losses = row_log_loss(first, answers), row_log_loss(second, answers)
    found = paired_difference(*losses)
    assert found == paired_difference(*losses)
    gaps = losses[1] - losses[0]
    spread = norm.ppf(0.975) * gaps.std(ddof=1) / np.sqrt(2000)
    assert (found.low, found.high) == pytest.approx((gaps.mean() - spread, gaps.mean() + spread), abs=0.05 * spread)
    alone = paired_difference(*losses, {"image": np.arange(2000) // 1})
    assert (alone.low, alone.high) == pytest.approx((found.low, found.high), abs=0.05 * spread)
    copied = paired_difference(*(np.repeat(loss, 9) for loss in losses), {"image": np.repeat(np.arange(2000), 9)})
    assert (copied.low, copied.high) == pytest.approx((found.low, found.high), abs=0.05 * spread)


def test_a_cluster_is_drawn_with_all_its_rows():
    """Every row gains exactly 1: however large the images are, no draw of images can say anything else."""
    images = np.repeat(np.arange(50), np.arange(50) % 7 + 1)
    found = paired_difference(np.zeros(len(images)), np.ones(len(images)), {"image": images})
    assert tuple(found) == (1, 1, 1)


def test_the_verdict_is_better_worse_or_within_noise():
    first, second, answers = make(300)
    assert "b is within noise of a at 300 rows" in compare(first, second, answers).verdict("a", "b")
    good = 0.5 * first + 0.5 * np.eye(4)[answers]
    assert compare(first, good, answers).verdict("a", "b") == (
        "b is better than a, in accuracy and in log-loss, at 300 rows."
    )
    assert "b is worse than a" in compare(good, first, answers).verdict("a", "b")
    unsure = 0.3 * good + 0.7 / 4  # the same answers, said less surely
    assert compare(unsure, good, answers).verdict("a", "b") == (
        "b against a at 300 rows: within noise in accuracy, better in log-loss."
    )
    assert compare(first, first, answers).verdict("a", "b").startswith("b is within noise")


@pytest.mark.slow
def test_chance_alone_is_called_a_difference_no_oftener_than_it_says():
    calls = 0
    for seed in range(60):
        found = compare(*make(100, seed=seed))
        calls += found.accuracy.beyond_noise and found.p_value < 0.05
    assert calls <= binom.ppf(0.999, 60, 0.05)


def test_the_interval_of_a_mean_loss_is_the_normal_one_where_rows_are_many():
    losses = row_log_loss(make(2000)[0], make(2000)[2])
    found, error = mean_loss(losses), norm.ppf(0.975) * losses.std(ddof=1) / np.sqrt(2000)
    assert found.value == losses.mean()
    assert found.low == pytest.approx(losses.mean() - error, rel=0.02)
    assert found.high == pytest.approx(losses.mean() + error, rel=0.02)
    copies = mean_loss(np.tile(losses[:500], 4), {"image": np.tile(np.arange(500), 4)})
    assert copies.high - copies.low == pytest.approx(4 * error, rel=0.1), "four copies of 500 rows count as 500"
    assert np.isnan(mean_loss(losses[:1])[1:]).all() and mean_loss(losses[:1]).value == losses[0]


def test_error_overlap_is_scikit_learns_jaccard_score_and_names_the_models_least_alike():
    generator = np.random.default_rng(0)
    answers = generator.integers(0, 4, 300)
    predictions = np.stack([np.where(generator.random(300) < skill, answers, 3) for skill in (0.5, 0.6, 0.9)])
    overlap = error_overlap(predictions, answers)
    wrong = predictions != answers
    for i, j in np.ndindex(3, 3):
        assert overlap.jaccard[i, j] == pytest.approx(jaccard_score(wrong[i], wrong[j]))
        assert overlap.disagreement[i, j] == pytest.approx(hamming_loss(predictions[i], predictions[j]))
    pairs = {
        overlap.jaccard[i, j]: f"Least alike: {a} and {b},"
        for i, a, j, b in [(0, "A", 1, "B"), (0, "A", 2, "C"), (1, "B", 2, "C")]
    }
    assert overlap.describe("ABC").startswith(pairs[min(pairs)])
