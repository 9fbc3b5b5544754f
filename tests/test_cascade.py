"""A cascade: which rows are sent to the second model, what that gains on planted answers, and the files."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, log_loss

from vqa.data.predictions import read_predictions
from vqa.evaluation import significance
from vqa.evaluation.cascade import SHARES, Cascade, CascadeReport
from vqa.evaluation.oof import group_models, load_oof
from vqa.inference import checkpoints, predictor


def opinion(random, answers, skill) -> np.ndarray:
    """Probabilities (rows, 4) of a model of that skill; 0: chance."""
    scores = random.normal(size=(len(answers), 4))
    scores[np.arange(len(answers)), answers] += skill
    return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)


@pytest.fixture
def normal_intervals(monkeypatch):
    """In place of the bootstrap, which takes longer."""

    def interval(first, second, clusters=None):
        gaps = second.astype(float) - first
        error = 1.96 * gaps.std() / np.sqrt(len(gaps))
        return significance.Difference(gaps.mean(), gaps.mean() - error, gaps.mean() + error)

    monkeypatch.setattr(significance, "paired_difference", interval)


@pytest.fixture
def planted():
    """The second model knows more; the first is sure of half of the rows and right in them, so that 0.5 is enough."""
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 600)
    first, second = opinion(random, answers, 0.5), opinion(random, answers, 3.0)
    first[:300] = 0.01 + 0.96 * np.eye(4)[answers[:300]]
    return first, second, answers


def test_the_least_sure_rows_are_sent_and_combined_row_by_row(planted):
    first, second, _ = planted
    for share, weight in ((0.1, 1.0), (0.3, 0.5), (1.0, 0.7)):
        cascade = Cascade(share, weight)
        gaps = [sorted(row)[-1] - sorted(row)[-2] for row in first.tolist()]
        sent = sorted(range(600), key=lambda i: gaps[i])[: round(share * 600)]
        assert sorted(np.flatnonzero(cascade.sent(first))) == sorted(sent)
        values = cascade.combine(first, second)
        for i in range(600):
            wanted = [weight * b + (1 - weight) * a for a, b in zip(first[i], second[i])] if i in sent else first[i]
            assert values[i] == pytest.approx(wanted, abs=1e-12)
    assert Cascade(0.001, 1.0).sent(first).sum() == 1, "at least one row"


def test_the_table_is_scikit_learns_and_the_share_that_is_enough_is_recommended(planted, normal_intervals):
    first, second, answers = planted
    report = CascadeReport(first, second, answers, {})
    lines = report.table()
    assert [line["rows"] for line in lines] == [0] + [round(600 * share) for share in SHARES] * 2
    for line in lines:
        values = Cascade(line["share"], line["weight"]).combine(first, second)
        assert line["accuracy"] == pytest.approx(accuracy_score(answers, values.argmax(1)))
        assert line["log_loss"] == pytest.approx(log_loss(answers, values, labels=range(4)))
    assert all(line["change"] == pytest.approx(line["accuracy"] - lines[0]["accuracy"]) for line in lines[1:])
    assert report.recommended().share == 0.5


def test_two_models_at_chance_gain_nothing(normal_intervals):
    """Five shares are tried; without the stricter test one pair in eighteen gains, with it one in fifty."""
    gains = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        answers = random.integers(0, 4, 250)
        first, second = (opinion(random, answers, 0.0) for _ in range(2))
        gains += CascadeReport(first, second, answers, {}).recommended() is not None
    assert gains <= 3


def test_files_of_a_cascade_have_all_rows_and_their_own_out_of_fold_files(script, trained, tmp_path, monkeypatch):
    """The second model is the EMA of the same folds."""
    monkeypatch.chdir(tmp_path)
    folds = [trained / "checkpoints" / f"fold{number}" for number in (0, 1)]
    cascade = ["--weights", "ema", "--cascade", *folds, "--cascade_share", "0.25", "--cascade_weight", "0.5"]
    plain = ["--check_generation", "0"]
    code, _, error = script("predict", *folds, *cascade)
    assert code == 2 and f"outputs/fold0.csv: no predictions of {trained / 'data' / 'test.csv'}. First run" in error
    assert script("predict", *folds, *plain)[0] == 0
    assert script("predict", *folds, *plain, "--weights", "ema", "--output_dir", "ema")[0] == 0
    scored, score = [], predictor.choice_probs
    monkeypatch.setattr(
        predictor,
        "choice_probs",
        lambda model, rows, *args, **kw: scored.append(len(rows)) or score(model, rows, *args, **kw),
    )
    code, output, error = script("predict", *folds, *cascade)
    assert code == 0 and scored == [6, 6] and "0.25 forwards a row" in output, error
    first = np.mean([read_predictions(f"outputs/fold{number}.csv")[1] for number in (0, 1)], axis=0)
    for number in (0, 1):
        ids, second = read_predictions(f"ema/fold{number}.csv")
        own_ids, own = read_predictions(f"outputs/cascade/fold{number}.csv")
        chosen = Cascade(0.25, 0.5)
        sent = chosen.sent(first)
        assert own_ids == ids and np.abs(own - chosen.combine(first, second)).max() < 1e-5
        assert np.abs(own[~sent] - first[~sent]).max() < 1e-15 and (own[sent] != first[sent]).any()
    scored.clear()
    assert "is finished" in script("predict", *folds, *cascade)[1] and not scored

    files = [f"outputs/cascade/fold{number}.csv" for number in (0, 1)]
    code, output, error = script("ensemble", *files)
    assert code == 0 and "no out-of-fold rows: " in output and "predicted by a cascade" in output, error
    monkeypatch.setattr(predictor, "load_base", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(checkpoints, "check_model_path", lambda *args: pytest.fail("a base model was looked for"))
    code, output, error = script("predict", *folds, *cascade, "--oof")
    assert code == 0 and "recommended: no cascade" in output, error
    report = json.loads((tmp_path / "outputs/cascade/oof/cascade.json").read_text())
    assert len(report["cascades"]) == 11 and len(pd.read_csv("outputs/cascade/oof/cascade.csv")) == 11
    best = [json.loads((fold / "metrics.json").read_text())["best"] for fold in folds]
    adapters = [fold if name == "raw" else fold / name for fold, name in zip(folds, best)]
    parts = [
        [read_predictions(folder / "oof.csv") for folder in own] for own in (adapters, [f / "ema" for f in folds])
    ]
    ids, first, second = (parts[0][0][0] + parts[0][1][0], *(np.concatenate([p[1] for p in own]) for own in parts))
    wanted = dict(zip(ids, Cascade(0.25, 0.5).combine(first, second)))
    oof = load_oof(group_models(files))
    assert np.abs(oof.stack[0] - [wanted[row_id][:4] for row_id in oof.ids]).max() < 1e-12
    assert script("ensemble", *files)[0] == 0


@pytest.mark.parametrize("flags", [["--flip"], ["--gate", "0.5"], ["--image_sizes", "56"], ["--cascade_share", "0"]])
def test_what_a_cascade_does_not_take_is_refused(script, flags):
    code, _, error = script("predict", "checkpoints/7b/fold0", "--cascade", "checkpoints/fold0", *flags)
    assert code == 2 and "--cascade takes folds in the plain view" in error
