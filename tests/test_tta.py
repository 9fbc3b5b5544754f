"""What the report on test-time augmentation says, on planted answers."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss

from vqa.evaluation.metrics import row_log_loss
from vqa.inference.tta import ViewPredictions
from vqa.inference.tta_report import Trial, flags, pooled

ROWS = 800


def opinion(random, answers, skill, bias=0.0):
    """Probabilities (rows, 10) of four letters by a model of that skill, which likes letter a by `bias`."""
    scores = random.normal(size=(len(answers), 4))
    scores[np.arange(len(answers)), answers] += skill
    scores[:, 0] += bias
    return np.pad(np.exp(scores) / np.exp(scores).sum(1, keepdims=True), ((0, 0), (0, 6)))


def trial_of(answers, **views):
    shown = np.ones((len(views), len(answers)), dtype=bool)
    names = [name.replace("_", " ").replace("0 9", "0.9") for name in views]
    return Trial(
        ViewPredictions(names, np.stack(list(views.values())), shown), answers, {}, np.arange(1.0, len(views) + 1)
    )


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def planted(random):
    """The plain view is biased, the first order helps, the second is the plain view again, the scale is noise."""
    answers = random.integers(0, 4, ROWS)
    plain, noise = opinion(random, answers, 1.0, bias=1.0), opinion(random, answers, 0.0)
    return trial_of(answers, plain=plain, rotation_1=opinion(random, answers, 1.5), rotation_2=plain, scale_0_9=noise)


def test_the_table_is_scikit_learns_and_scipys(planted):
    seen, answers, table, before = planted.seen, planted.answers, planted.table(), None
    assert [line["views"] for line in table] == ["plain", "+ rotation 1", "+ rotation 2", "+ scale 0.9"]
    for count, line in enumerate(table[:4], start=1):
        mean = seen.probabilities[:count, :, :4].mean(0)
        assert line["accuracy"] == pytest.approx(accuracy_score(answers, mean.argmax(1)), abs=1e-12)
        assert line["log_loss"] == pytest.approx(log_loss(answers, mean, labels=range(4)), abs=1e-12)
        assert line["low"] < line["accuracy"] < line["high"] and line["gate"] is None
        assert (line["forwards"], line["seconds"]) == (count, sum(range(1, count + 1)))
        right = (mean.argmax(1) == answers).astype(int)
        if before is not None:
            differing = right - before
            wanted = binomtest(int((differing > 0).sum()), int((differing != 0).sum())).pvalue
            assert line["p"] == pytest.approx(wanted)
        before = right
    assert [line["verdict"] for line in table[:2]] == ["", "better"] and table[3]["verdict"] == "worse"


@pytest.fixture
def for_unsure_rows(random):
    """Three fifths of the rows have a wide margin and are right, and the other view ruins them; it mends the rest."""
    answers = random.integers(0, 4, ROWS)
    sure = random.random(ROWS) < 0.6
    plain, other = np.zeros((2, ROWS, 10))
    letters = np.where(sure, answers, random.integers(0, 4, ROWS)), np.where(sure, (answers + 1) % 4, answers)
    tops = np.where(sure, random.uniform(0.7, 0.9, ROWS), random.uniform(0.26, 0.4, ROWS)), np.full(ROWS, 0.9)
    for values, letter, top in zip((plain, other), letters, tops):
        values[:, :4] = (1 - top[:, None]) / 3
        values[np.arange(ROWS), letter] = top
    return trial_of(answers, plain=plain, rotation_1=other), sure


def test_a_gated_line_is_what_the_gate_gives(for_unsure_rows):
    planted, _ = for_unsure_rows
    seen, line = planted.seen, planted.table()[2]
    assert line["views"] == "the first 2, gated" and line["gate"] == planted.gate([0, 1])
    top = np.sort(seen.probabilities[0])[:, ::-1]
    unsure = top[:, 0] - top[:, 1] < line["gate"]
    mean = np.where(unsure[:, None], seen.probabilities[:2].mean(0), seen.probabilities[0])[:, :4]
    assert line["log_loss"] == pytest.approx(log_loss(planted.answers, mean, labels=range(4)), abs=1e-12)
    assert line["forwards"] == pytest.approx(1 + unsure.mean()) and line["seconds"] == pytest.approx(
        1 + 2 * unsure.mean()
    )


def test_what_pays_is_recommended_and_nothing_else(planted):
    assert planted.worth_it() == [0, 1]
    said = planted.recommendation()
    assert said.startswith("recommended: --num_permutations 2") and "--scales" not in said and "at 800 rows" in said
    assert f"{planted.forwards([0, 1], planted.gate([0, 1])):.2f} forwards a row" in said


def test_noise_and_copies_are_not_recommended(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    trial = trial_of(answers, plain=plain, rotation_1=plain, scale_0_9=opinion(random, answers, 0.0))
    assert trial.worth_it() == [0]
    assert trial.recommendation() == (
        "recommended: no TTA; no view makes the plain one better beyond noise at 800 rows."
    )


def test_orders_that_pay_together_are_taken_from_the_first_on(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    trial = trial_of(answers, plain=plain, latin_1=plain, latin_2=opinion(random, answers, 1.5))
    assert trial.worth_it() == [0, 1, 2] and "--num_permutations 3 --permutation_set latin" in trial.recommendation()


def test_orders_that_do_not_pay_are_not_counted_with_wordings_that_do(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    other, better = opinion(random, answers, 1.5), {"rotation_1": plain, "wording_1": plain}
    trial = trial_of(answers, plain=plain, **better, wording_2=other)
    assert trial.worth_it() == [0, 2, 3] and "recommended: --num_paraphrases 3" in trial.recommendation()


def test_the_gate_is_found_where_the_views_stop_helping(for_unsure_rows):
    trial, sure = for_unsure_rows
    gate = trial.gate([0, 1])
    assert trial.seen.margins()[~sure].max() < 0.2 and trial.seen.margins()[sure].min() > 0.6
    assert trial.seen.unsure(gate).mean() == pytest.approx((~sure).mean(), abs=0.1)
    gated, all_of_it = (row_log_loss(trial.seen.mean([0, 1], g), trial.answers).mean() for g in (gate, None))
    assert gated < all_of_it


def test_the_gate_asks_no_row_again_where_views_change_nothing(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    trial = trial_of(answers, plain=plain, rotation_1=plain)
    assert trial.seen.unsure(trial.gate([0, 1])).mean() <= 0.11


def test_position_bias_before_and_after(planted):
    bias = planted.position_bias()
    assert [line["letter"] for line in bias] == list("abcd")
    for i, line in enumerate(bias):
        assert line["right"] == pytest.approx((planted.answers == i).mean())
        assert line["plain"] == pytest.approx((planted.seen.probabilities[0].argmax(1) == i).mean())
        assert line["all views"] == pytest.approx((planted.seen.probabilities.mean(0).argmax(1) == i).mean())
    assert bias[0]["plain"] > 1.3 * bias[0]["right"] and bias[0]["all views"] < bias[0]["plain"]


def test_folds_are_pooled_by_the_names_of_their_views(random):
    parts = [random.dirichlet(np.ones(10), (2, 3)), random.dirichlet(np.ones(10), (2, 5))]
    shown = [np.ones((2, 3), dtype=bool), np.ones((2, 5), dtype=bool)]
    both = pooled(
        [ViewPredictions(["plain", "x"], parts[0], shown[0]), ViewPredictions(["plain", "y"], parts[1], shown[1])]
    )
    assert both.names == ["plain", "x", "y"] and both.shown.sum(1).tolist() == [8, 3, 5]
    assert both.mean()[:3] == pytest.approx(parts[0].mean(0)) and both.mean()[3:] == pytest.approx(parts[1].mean(0))


def test_flags_ask_for_the_views_that_they_name():
    names = ["plain", "latin 1", "latin 2", "wording 1", "scale 0.9", "scale 1.1", "flip"]
    told = "--num_permutations 3 --permutation_set latin --num_paraphrases 2 --scales 1.0 0.9 1.1 --flip --gate 0.25"
    assert flags(names, 0.25) == told
    assert (
        flags(["plain", "rotation 1"], None) == "--num_permutations 2"
        and flags(["plain", "scale 0.9"], None) == "--scales 1.0 0.9"
    )
