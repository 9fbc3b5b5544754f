"""Reference lines: chance, the text alone, and models that are not above them or answer one letter."""

import json

import numpy as np
import pytest
from test_analyze import Contest

from vqa.evaluation.experiment_log import log_path, read_log
from vqa.evaluation.metrics import chance_accuracy
from vqa.evaluation.reference import Reference, collapsed_letters, model_warning, pooled_reference
from vqa.evaluation.text_only_baseline import text_only_accuracy
from vqa.training.fold_run import log_training


def model(accuracy, rows=1000, seed=0):
    """(probabilities (rows, 4), answers) of a model that is right in `accuracy` of the rows and spreads its errors."""
    random = np.random.default_rng(seed)
    answers = random.integers(0, 4, rows)
    predictions = np.where(np.arange(rows) < accuracy * rows, answers, (answers + random.integers(1, 4, rows)) % 4)
    return np.full((rows, 4), 0.1) + 0.6 * np.eye(4)[predictions], answers


def warning(probabilities, answers, text_only=None):
    reference = Reference(chance_accuracy(probabilities), text_only)
    return model_warning("m", probabilities, answers, reference) or ""


def test_chance_counts_the_choices_that_each_row_offers():
    assert chance_accuracy(np.array([[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4]])) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_folds_are_pooled_by_their_rows():
    folds = [{"rows": 100, "text_only": 0.4}, {"rows": 300, "text_only": 0.2}]
    assert pooled_reference(folds, 0.25) == Reference(0.25, pytest.approx(0.25))
    assert pooled_reference([*folds, {"rows": 9}], 0.25).text_only is None, "a fold of an earlier release"


def test_a_model_must_be_above_chance_and_above_the_text_beyond_noise():
    """0.2498 of 1,297 rows is the accuracy of a real model that passed without a remark."""
    assert "is not above that of chance, 0.2500" in warning(*model(0.2498, 1297))
    assert "is not above that of a classifier that sees no image, 0.4300" in warning(*model(0.44), text_only=0.43)
    assert warning(*model(0.48), text_only=0.43) == "" and warning(*model(0.44)) == ""
    assert "not above" in warning(*model(0.40, rows=20)), "20 rows say little"
    assert warning(*model(0.2498)).count("\n") == 0


def test_collapsed_letters_are_reported_though_the_accuracy_is_fine():
    probabilities, answers = model(0.9)
    assert warning(probabilities, answers) == ""
    probabilities[probabilities.argmax(1) == 2] = [0.7, 0.1, 0.1, 0.1]
    assert "its letters have collapsed: c is never the prediction, and right in 2" in warning(probabilities, answers)
    answers = np.repeat([0, 1, 2, 3], 100)
    always = np.where(np.arange(400) < 4, answers, 1)
    assert collapsed_letters(always, answers).startswith("b is the prediction in 9")
    rare = np.repeat([0, 1], [396, 4])
    assert collapsed_letters(np.zeros(400, dtype=int), rare) is None, "b is right in 1 %: too rare to say"
    assert collapsed_letters(np.zeros(30, dtype=int), np.repeat([0, 1], [24, 6])) is None, "six rows are too few"


def test_text_only_accuracy_is_high_where_the_text_gives_the_answer_away():
    random, rows = np.random.default_rng(0), []
    for _ in range(240):
        answer = int(random.integers(4))
        choices = [f"{word}{random.integers(900)}" for word in "가나다라"]
        choices[answer] += " 정답"
        rows.append({"question": "무엇인가요?", "choices": choices, "answer": answer})
    assert text_only_accuracy(rows[:160], rows[160:]) > 0.95
    for row in rows:
        row["choices"] = [choice.removesuffix(" 정답") for choice in row["choices"]]
    assert text_only_accuracy(rows[:160], rows[160:]) < 0.4
    assert text_only_accuracy(rows[:40], rows[40:]) is None, "too few rows to learn from"


def test_training_writes_both_lines_beside_its_scores_and_warns(tmp_path):
    contest = Contest(tmp_path)
    (folder, *_) = contest.model("m", {"raw": contest.probabilities(1.0)}, best="raw")
    metrics = json.loads((folder / "metrics.json").read_text()) | {"seconds": 1.0, "fingerprints": {"rows": "x"}}
    for text_only, warned in ((0.2, False), (0.9, True)):
        run_id, said = log_training(folder, metrics, {"train_csv": str(contest.csv)}, text_only)
        assert metrics["weights"]["raw"]["chance"] == 0.25 and metrics["weights"]["raw"]["text_only"] == text_only
        assert bool(said) == warned and (not said or said.startswith(f"warning: {folder}: its accuracy "))
        logged = read_log(log_path()).set_index("id").loc[run_id]
        assert (float(logged["chance"]), float(logged["text_only"])) == (0.25, text_only)
