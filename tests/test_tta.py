"""What the report on test-time augmentation says, on planted answers."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss

from vqa.evaluation.metrics import row_log_loss
from vqa.inference.tta import ViewPredictions
from vqa.inference.tta_report import TTAReport, concat_folds, flags

ROWS = 800


def opinion(random, answers, skill, bias=0.0):
    """Probabilities (rows, 10) of four letters by a model of that skill, which likes letter a by `bias`."""
    scores = random.normal(size=(len(answers), 4))
    scores[np.arange(len(answers)), answers] += skill
    scores[:, 0] += bias
    return np.pad(np.exp(scores) / np.exp(scores).sum(1, keepdims=True), ((0, 0), (0, 6)))


def report_of(answers, **views):
    shown = np.ones((len(views), len(answers)), dtype=bool)
    names = [name.replace("_", " ").replace("0 9", "0.9") for name in views]
    seconds = np.arange(1.0, len(views) + 1)
    return TTAReport(ViewPredictions(names, np.stack(list(views.values())), shown, seconds), answers, {})


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def planted(random):
    """The plain view is biased, the first rotation helps, the second is the plain view again, the scale is noise."""
    answers = random.integers(0, 4, ROWS)
    plain, noise = opinion(random, answers, 1.0, bias=1.0), opinion(random, answers, 0.0)
    return report_of(answers, plain=plain, rotation_1=opinion(random, answers, 1.5), rotation_2=plain, scale_0_9=noise)


def test_the_table_is_scikit_learns_and_scipys(planted):
    predictions, answers, table, before = planted.predictions, planted.answers, planted.table(), None
    assert [line["views"] for line in table] == ["plain", "+ rotation 1", "+ rotation 2", "+ scale 0.9"]
    for count, line in enumerate(table[:4], start=1):
        mean = predictions.probabilities[:count, :, :4].mean(0)
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
    """Three fifths of the rows have a wide margin and are right; the other view ruins them and corrects the rest."""
    answers = random.integers(0, 4, ROWS)
    sure = random.random(ROWS) < 0.6
    plain, other = np.zeros((2, ROWS, 10))
    letters = np.where(sure, answers, random.integers(0, 4, ROWS)), np.where(sure, (answers + 1) % 4, answers)
    tops = np.where(sure, random.uniform(0.7, 0.9, ROWS), random.uniform(0.26, 0.4, ROWS)), np.full(ROWS, 0.9)
    for values, letter, top in zip((plain, other), letters, tops):
        values[:, :4] = (1 - top[:, None]) / 3
        values[np.arange(ROWS), letter] = top
    return report_of(answers, plain=plain, rotation_1=other), sure


def test_a_gated_line_is_what_the_gate_gives(for_unsure_rows):
    planted, _ = for_unsure_rows
    predictions, line = planted.predictions, planted.table()[2]
    assert line["views"] == "the first 2, gated" and line["gate"] == planted.best_gate([0, 1])
    top = np.sort(predictions.probabilities[0])[:, ::-1]
    unsure = top[:, 0] - top[:, 1] < line["gate"]
    mean = np.where(unsure[:, None], predictions.probabilities[:2].mean(0), predictions.probabilities[0])[:, :4]
    assert line["log_loss"] == pytest.approx(log_loss(planted.answers, mean, labels=range(4)), abs=1e-12)
    assert line["forwards"] == pytest.approx(1 + unsure.mean()) and line["seconds"] == pytest.approx(
        1 + 2 * unsure.mean()
    )


def test_what_helps_is_recommended_and_nothing_else(planted):
    assert planted.helpful_views() == [0, 1]
    sentence = planted.recommendation()
    assert (
        sentence.startswith("recommended: --num_permutations 2")
        and "--scales" not in sentence
        and "at 800 rows" in sentence
    )
    assert f"{planted.forwards([0, 1], planted.best_gate([0, 1])):.2f} forwards a row" in sentence


def test_noise_and_copies_are_not_recommended(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    report = report_of(answers, plain=plain, rotation_1=plain, scale_0_9=opinion(random, answers, 0.0))
    assert report.helpful_views() == [0]
    assert report.recommendation() == (
        "recommended: no TTA; no view improves on the plain one beyond noise at 800 rows."
    )


def test_permutations_that_help_together_are_taken_from_the_first_on(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    report = report_of(answers, plain=plain, latin_1=plain, latin_2=opinion(random, answers, 1.5))
    assert (
        report.helpful_views() == [0, 1, 2]
        and "--num_permutations 3 --permutation_set latin" in report.recommendation()
    )


def test_permutations_that_do_not_help_are_not_counted_with_paraphrases_that_do(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    other, better = opinion(random, answers, 1.5), {"rotation_1": plain, "paraphrase_1": plain}
    report = report_of(answers, plain=plain, **better, paraphrase_2=other)
    assert report.helpful_views() == [0, 2, 3] and "recommended: --num_paraphrases 3" in report.recommendation()


def test_the_gate_is_found_where_the_views_stop_helping(for_unsure_rows):
    report, sure = for_unsure_rows
    gate = report.best_gate([0, 1])
    assert report.predictions.margins()[~sure].max() < 0.2 and report.predictions.margins()[sure].min() > 0.6
    assert report.predictions.below_gate(gate).mean() == pytest.approx((~sure).mean(), abs=0.1)
    gated, all_of_it = (row_log_loss(report.predictions.mean([0, 1], g), report.answers).mean() for g in (gate, None))
    assert gated < all_of_it


def test_the_gate_leaves_every_row_to_the_plain_view_where_views_change_nothing(random):
    answers = random.integers(0, 4, ROWS)
    plain = opinion(random, answers, 1.0)
    report = report_of(answers, plain=plain, rotation_1=plain)
    assert report.predictions.below_gate(report.best_gate([0, 1])).mean() <= 0.11


def test_position_bias_before_and_after(planted):
    bias = planted.position_bias()
    assert [line["letter"] for line in bias] == list("abcd")
    for i, line in enumerate(bias):
        assert line["right"] == pytest.approx((planted.answers == i).mean())
        assert line["plain"] == pytest.approx((planted.predictions.probabilities[0].argmax(1) == i).mean())
        assert line["all views"] == pytest.approx((planted.predictions.probabilities.mean(0).argmax(1) == i).mean())
    assert bias[0]["plain"] > 1.3 * bias[0]["right"] and bias[0]["all views"] < bias[0]["plain"]


def test_folds_are_concatenated_by_the_names_of_their_views(random):
    parts = [random.dirichlet(np.ones(10), (2, 3)), random.dirichlet(np.ones(10), (2, 5))]
    shown = [np.ones((2, 3), dtype=bool), np.ones((2, 5), dtype=bool)]
    both = concat_folds(
        [
            ViewPredictions(["plain", "x"], parts[0], shown[0], np.array([1.0, 2.0])),
            ViewPredictions(["plain", "y"], parts[1], shown[1], np.array([3.0, 4.0])),
        ]
    )
    assert both.names == ["plain", "x", "y"] and both.shown.sum(1).tolist() == [8, 3, 5]
    assert both.seconds.tolist() == [4, 2, 4]
    assert both.mean()[:3] == pytest.approx(parts[0].mean(0)) and both.mean()[3:] == pytest.approx(parts[1].mean(0))


def test_flags_ask_for_the_views_that_they_name():
    names = ["plain", "latin 1", "latin 2", "paraphrase 1", "scale 0.9", "scale 1.1", "flip"]
    expected = (
        "--num_permutations 3 --permutation_set latin --num_paraphrases 2 --scales 1.0 0.9 1.1 --flip --gate 0.25"
    )
    assert flags(names, 0.25) == expected
    assert (
        flags(["plain", "rotation 1"], None) == "--num_permutations 2"
        and flags(["plain", "scale 0.9"], None) == "--scales 1.0 0.9"
    )
