"""The experiment log: what finished runs write, that nothing is lost in it, and what experiments.py makes of it."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import binomtest
from sklearn.metrics import log_loss
from test_oof import Planted

from vqa.evaluation.ensembling import fit, nested
from vqa.evaluation.experiment_log import COLUMNS, git_revision, log_path, log_run, read_log


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERIMENTS_LOG", str(tmp_path / "kept" / "log.csv"))
    return tmp_path / "kept" / "log.csv"


def right_of(truth, oof):
    joined = pd.read_csv(oof, dtype={"id": str}).merge(pd.read_csv(truth, dtype=str), on="id", suffixes=("", "_true"))
    return joined, (joined["answer"] == joined["answer_true"]).to_numpy()


def test_a_training_is_logged_with_what_differs_its_scores_and_their_interval(trained):
    fold = trained / "checkpoints" / "fold1"
    metrics = json.loads((fold / "metrics.json").read_text())
    (row,) = read_log(log_path()).query("output == @name", local_dict={"name": str(fold)}).to_dict("records")
    assert row["id"] == metrics["run"] and row["kind"] == "training" and row["data"] == metrics["fingerprints"]["rows"]
    args = json.loads(row["args"])
    given = json.loads((trained / "args" / "base.json").read_text())
    given |= {"fold": 1, "loss": "letter", "effective_batch_size": 4}  # 4 x 1 rows in the args file
    usual = {
        "save_strategy": "steps",
        "effective_batch_size": 4,
    }  # these are no defaults
    assert usual.items() <= args.items() and args.items() <= given.items() and args["loss"] == "letter"
    oof = fold / ("" if metrics["best"] == "raw" else metrics["best"]) / "oof.csv"
    joined, right = right_of(trained / "data" / "train.csv", oof)
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    assert (int(row["rows"]), float(row["accuracy"])) == (12, right.mean())
    assert (float(row["low"]), float(row["high"])) == pytest.approx((interval.low, interval.high))
    columns = ["p_a", "p_b", "p_c", "p_d"]
    assert float(row["log_loss"]) == pytest.approx(
        log_loss(joined["answer_true"], joined[columns], labels=list("abcd"))
    )
    assert float(row["seconds"]) > 0 and 0.1 < float(row["peak_gib"]) < 100
    kept = pd.read_csv(log_path().with_name(f"{row['id']}.csv"))
    pd.testing.assert_frame_equal(kept, pd.read_csv(oof), check_exact=True)
    assert {name: metrics["weights"][metrics["best"]][name] for name in ("rows", "low")} == {
        "rows": 12,
        "low": pytest.approx(interval.low),
    }


@pytest.mark.slow
def test_runs_that_finish_side_by_side_are_all_logged(log):
    code = (
        "from vqa.evaluation.experiment_log import log_run\n"
        "for i in range(8): print(log_run('training', f'out{i}', {'i': i}))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    ids = [name for run in runs for name in run.communicate()[0].split()]
    table = read_log(log)
    assert len(ids) == 24 and set(ids) == set(table["id"]) and list(table["id"]) == sorted(ids)
    assert all(len(name) == 8 for name in ids)


def test_a_log_of_other_columns_keeps_every_cell(log):
    log.parent.mkdir()
    log.write_text('id,kind,note,accuracy\nold1,training,"a, ""b""\n무엇",0.5\n', encoding="utf-8")
    log_run("training", "체크/fold0", {"x": "값"}, scores={"accuracy": 0.25})
    table = pd.read_csv(log, dtype=str, keep_default_na=False)
    assert list(table["note"]) == ['a, "b"\n무엇', ""] and list(table["accuracy"]) == ["0.5", "0.25"]
    assert list(table["output"]) == ["", "체크/fold0"] and json.loads(table["args"][1]) == {"x": "값"}
    assert set(COLUMNS) | {"note"} == set(table.columns)


def test_a_log_of_an_older_release_keeps_the_file_of_its_labels(log):
    log.parent.mkdir()
    log.write_text("id,kind,truth\nold1,training,old.csv\n")
    log_run("training", "out", {}, labels="new.csv")
    table = pd.read_csv(log, dtype=str)
    assert list(table["labels"]) == ["old.csv", "new.csv"] and "truth" not in table
    log.write_text("id,kind,truth,labels\nold1,training,old.csv,\nnew1,training,,new.csv\n")
    assert list(read_log(log)["labels"]) == ["old.csv", "new.csv"], "both releases wrote to it"


def test_a_log_that_cannot_be_read_is_left_as_it_is_and_stops_nothing(log, capsys):
    log.parent.mkdir()
    log.write_text("id,kind\nonly one cell\n")
    assert log_run("training", "out", {}) == ""
    assert log.read_text() == "id,kind\nonly one cell\n"
    assert "not in the experiment log" in capsys.readouterr().err


def test_the_revision_is_gits_and_blank_outside_git(monkeypatch, tmp_path):
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert git_revision().removesuffix("-dirty") == git.stdout.strip()
    monkeypatch.setattr("vqa.evaluation.experiment_log.PROJECT", tmp_path)
    assert git_revision() == ""


@pytest.fixture
def ensembles(log, tmp_path, script):
    """Two logged ensembles, of a weak model alone and of it with a strong one: what they read, and the log."""
    planted = Planted(tmp_path)
    weak, strong = planted.probabilities(0.8), planted.probabilities(1.2)
    files = [planted.model("weak", weak), planted.model("strong", strong)]
    for number, file in enumerate([file for both in files for file in both]):
        card = json.loads(file.with_suffix(".json").read_text())
        file.with_suffix(".json").write_text(json.dumps(card | {"run": f"run{number}", "data": "rows"}))
    for chosen, method in ((files[0], "auto"), (files[0] + files[1], "greedy")):
        code, said, error = script(
            "ensemble", *chosen, "--method", method, "--output", tmp_path / f"{method}" / "submission.csv"
        )
        assert code == 0, error
    table = read_log(log)
    assert said.endswith(f"; {table['id'].iloc[-1]} in the experiment log\n")
    return planted, weak, strong, table


def test_an_ensemble_is_logged_with_its_parents_and_what_it_scores_out_of_fold(ensembles):
    planted, weak, strong, table = ensembles
    first, second = table.to_dict("records")
    assert (first["parents"], second["parents"]) == ("run0 run1 run2", "run3 run4 run5 run0 run1 run2")
    assert first["kind"] == "ensemble" and first["data"] == "rows" and json.loads(second["args"])["method"] == "greedy"
    right = weak[:600].argmax(1) == planted.answers[:600]
    assert (int(first["rows"]), float(first["accuracy"])) == (600, pytest.approx(right.mean()))
    assert float(first["log_loss"]) == pytest.approx(log_loss(planted.answers[:600], weak[:600]))
    stack = np.stack([strong[:600], weak[:600]])[:, np.argsort(np.arange(600) % 3, kind="stable")]
    answers = planted.answers[:600][np.argsort(np.arange(600) % 3, kind="stable")]
    unseen = nested("greedy", stack, answers)  # rows by fold, as the out-of-fold files hold them
    assert float(second["log_loss"]) == pytest.approx(log_loss(answers, unseen), abs=1e-9)
    fitted = fit("greedy", stack, answers)(stack)
    assert float(second["log_loss"]) != pytest.approx(log_loss(answers, fitted), abs=1e-9)


def test_two_runs_are_compared_by_their_args_and_on_the_rows_that_both_scored(ensembles, script, log):
    planted, weak, _, table = ensembles
    first, second = table["id"]
    kept = pd.read_csv(log.with_name(f"{second}.csv"))
    kept.iloc[100:].to_csv(log.with_name(f"{second}.csv"), index=False)  # as if it had scored fewer rows
    code, said, error = script("experiments", "--compare", first, second)
    assert code == 0, error
    assert "greedy" in said and "(default)" in said and "on the 500 rows that both scored" in said
    assert f"{second} is better than {first}, in accuracy and in log-loss, at 500 rows." in said
    rows = kept["id"][100:].str[1:].astype(int)
    mine = weak[rows].argmax(1) == planted.answers[rows]
    other = kept["answer"][100:].map("abcd".index).to_numpy() == planted.answers[rows]
    gained, lost = int((other & ~mine).sum()), int((mine & ~other).sum())
    p = binomtest(gained, gained + lost).pvalue
    assert f"right in {second} only: {gained}, in {first} only: {lost}; McNemar's exact test p = {p:.3g}" in said


def test_runs_of_different_folds_have_nothing_to_compare(trained, script):
    ids = [json.loads((trained / f"checkpoints/fold{fold}/metrics.json").read_text())["run"] for fold in (0, 1)]
    code, said, error = script("experiments", "--compare", *ids)
    assert code == 2 and "have no scored row in common" in error and error.count("\n") == 1
    assert "loss" in said and "learning_rate" not in said


def test_the_leaderboards_word_is_kept_shown_and_drawn(ensembles, script, log):
    *_, table = ensembles
    first, second = table["id"]
    accuracy = float(table["accuracy"].iloc[1])
    for args, place in (([0.1234], "below"), ([accuracy], "within"), ([0.99, first], "above")):
        code, said, error = script("experiments", "--public_score", *args)
        assert code == 0 and f"{place} the 95 % interval of validation" in said, error
    code, said, _ = script("experiments")
    lines = [line.split() for line in said.splitlines()]
    public = lines[0].index("public") + 1  # the time is two words
    assert [(line[0], line[public]) for line in lines[1:]] == [(first, "0.9900"), (second, f"{accuracy:.4f}")]
    assert "method=greedy" in said and "warning: " not in said
    assert {"chance", "text_only"} < set(lines[0]) and lines[1][lines[0].index("chance") + 1] == "0.2500"
    log_run("training", "blind", {}, scores={"accuracy": 0.4, "low": 0.38, "chance": 0.25, "text_only": 0.41})
    blind = read_log(log)["id"].iloc[-1]
    assert f"warning: {blind}: the accuracy is not above chance and text_only" in script("experiments")[1]
    code, said, error = script("experiments", "--plot")
    assert code == 0 and "2 runs with both scores" in said, error
    assert log.with_name("leaderboard.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_log_cannot_answer_is_one_line(log, script):
    for args, message in (([], "no such file"), (["--public_score", "82.71"], "0.8271"), (["x"], "an id alone")):
        code, _, error = script("experiments", *args)
        assert (code, error.count("\n")) == (2, 1) and message in error
    log_run("training", "out", {})
    for args, message in (
        (["--public_score", "0.5"], "no ensemble"),
        (["--compare", "x", "y"], "no run 'x'"),
        (["--plot"], "no run has an out-of-fold and a public score"),
    ):
        code, _, error = script("experiments", *args)
        assert (code, error.count("\n")) == (2, 1) and message in error


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "does not exist"), ("neptune", "pip install neptune")])
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_loaded(trained, script, name, message):
    code, _, error = script("train_fold", trained / "args" / "fold0.json", "--report_to", name)
    assert (code, error.count("\n")) == (2, 1) and message in error


def test_tensorboard_gets_the_validation_of_every_kind_of_weights(trained, script, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = ["--report_to", "tensorboard", "--output_dir", tmp_path / "out", "--save_strategy", "no"]
    code, _, error = script("train_fold", trained / "args" / "fold0.json", *args)
    assert code == 0, error
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name, tag in (("raw", "eval/log_loss"), ("ema", "eval/ema_log_loss"), ("swa", "eval/swa_log_loss")):
        best = min(event.value for event in events.Scalars(tag))
        assert best == pytest.approx(metrics["weights"][name]["log_loss"], rel=1e-6), np.nan
