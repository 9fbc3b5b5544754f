"""analyze.py on planted models: it finds what was planted, and refuses what cannot be trusted."""

import json
import os
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import HEADER, write_csv
from parsed import Parsed, needs_nothing
from PIL import Image
from sklearn.metrics import jaccard_score, log_loss

from vqa.evaluation.labels import Labels
from vqa.reports.results import read_fold

ROWS, FOLDS = 306, 3
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
QUESTIONS = {"colour": "무슨 색인가요?", "count": "몇 개 있나요?", "place": "Where is it?"}


class Contest:
    """A folder with data/, and models below checkpoints/ whose out-of-fold probabilities are drawn."""

    def __init__(self, folder):
        self.folder, self.random = folder, np.random.default_rng(0)
        (folder / "data").mkdir()
        self.ids = [f"row_{number:03d}" for number in range(ROWS)]
        self.types = np.array(list(QUESTIONS) * (ROWS // 3))
        self.answers = self.random.integers(0, 4, ROWS)
        self.folds = np.arange(ROWS) // 3 % FOLDS  # types go by threes
        self.labels = self.answers.copy()
        self.labels[123] = (self.labels[123] + 1) % 4
        rows = []
        for number, row_id in enumerate(self.ids):
            size = (60 + number % 5 * 20, 40)
            Image.new("RGB", size, tuple(map(int, self.random.integers(0, 255, 3)))).save(
                folder / f"data/{number}.png"
            )
            words = [f"{word}{number}" for word in ("빨강", "x", "노랑", "초록")]
            question = f"{QUESTIONS[self.types[number]]} {number}"
            rows.append([row_id, f"{number}.png", question, *words, "abcd"[self.labels[number]]])
        rows[123][2], rows[123][5] = f"{QUESTIONS['colour']} {EVIL}", EVIL
        self.csv = write_csv(folder / "data" / "train.csv", rows, HEADER)
        write_csv(folder / "data" / "folds.csv", list(zip(self.ids, self.folds)), ["id", "fold"])

    def probabilities(self, skill, scores=None):
        scores = self.random.normal(size=(ROWS, 4)) if scores is None else scores.copy()
        scores[np.arange(ROWS), self.answers] += np.where(self.types == "count", 0.2, skill)
        scores[123, self.answers[123]] += 3
        return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    def model(self, name, weights, best, validations=3):
        """Write the folds of a model; `weights`: raw, ema, swa -> probabilities of all rows."""
        folders = []
        for fold in range(FOLDS):
            folder, own = self.folder / "checkpoints" / name / f"fold{fold}", np.flatnonzero(self.folds == fold)
            scores, history = {}, [{"step": 10 * (n + 1)} for n in range(validations)]
            for kind, values in weights.items():
                table = pd.DataFrame(values[own], columns=[f"p_{letter}" for letter in "abcd"])
                table.insert(0, "id", np.array(self.ids)[own])
                table.insert(1, "answer", ["abcd"[i] for i in values[own].argmax(1)])
                place = folder / ("" if kind == "raw" else kind)
                place.mkdir(parents=True, exist_ok=True)
                table.to_csv(place / "oof.csv", index=False, float_format="%.17g")
                loss = log_loss(self.labels[own], values[own], labels=range(4))
                right = float((values[own].argmax(1) == self.labels[own]).mean())
                scores[kind] = {"accuracy": right, "log_loss": loss, "step": 30, "epoch": 3.0}
                prefix = "eval" if kind == "raw" else f"eval_{kind}"
                for number, logs in enumerate(history):
                    logs |= {f"{prefix}_log_loss": loss + 0.3 / (number + 1), f"{prefix}_accuracy": right}
            args = {"fold": fold, "train_csv": str(self.csv), "image_root": None, "folds_csv": None}
            for file, content in (
                ("args.json", args),
                ("metrics.json", {"best": best, "weights": scores}),
                ("history.json", history),
            ):
                (folder / file).write_text(json.dumps(content))
            folders.append(folder)
        return folders


@pytest.fixture
def contest(tmp_path):
    return Contest(tmp_path)


@pytest.fixture
def analyze(script, contest):
    """Run analyze.py with warnings as errors: matplotlib warns of a glyph that its font lacks."""

    def call(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            code, said, error = script("analyze", *args, "--output_dir", contest.folder / "page")
        page = contest.folder / "page" / "index.html"
        return code, said, error, page.read_text(encoding="utf-8") if page.is_file() else ""

    return call


def trio(contest, skill=2.0, averaged=3.0):
    scores = contest.random.normal(size=(ROWS, 4))
    return {
        "raw": contest.probabilities(skill, scores),
        "ema": contest.probabilities(averaged, scores),
        "swa": contest.probabilities(skill, scores + contest.random.normal(size=(ROWS, 4)) * 0.01),
    }


@pytest.mark.slow
def test_the_highlights_name_the_worst_type_the_better_weights_and_a_wrong_label(contest, analyze):
    weights = trio(contest)
    folders = contest.model("base", weights, best="ema")
    (contest.folder / "checkpoints" / "tiny").mkdir()
    every = shutil.copytree(folders[0], contest.folder / "checkpoints" / "all_rows")
    change(every / "args.json", fold=None)
    code, said, error, html = analyze(*folders, contest.folder / "checkpoints" / "tiny", every)
    assert code == 0, error
    right = weights["ema"].argmax(1) == contest.labels
    loss = log_loss(contest.labels, weights["ema"], labels=range(4))
    assert (
        f"accuracy {right.mean():.4f} (95 % interval" in said and f"log-loss {loss:.4f}, 306 out-of-fold rows" in said
    )
    counts = right[contest.types == "count"]
    assert f"Worst question type: count, accuracy {counts.mean():.4f}" in said and "on 102 rows, below the" in said
    assert "EMA is better than raw, in accuracy and in log-loss, at 306 rows." in said
    assert "SWA is within noise of raw at 306 rows." in said
    assert "in mislabelled.csv: row_123" in said

    page = needs_nothing(html)
    highlights = page.text[: page.text.index("Accuracy by group")]
    for line in said.splitlines():
        assert not line.startswith("- ") or line[2:] in highlights
    assert f"folders without a finished fold: {contest.folder}/checkpoints/tiny, {every}" in page.text
    assert page.text.count(EVIL) >= 4, "question and choice, among the label issues and the largest errors"
    assert page.tags.count("img") >= 24 + 3

    table = pd.read_csv(contest.folder / "page" / "mislabelled.csv")
    assert table.loc[0, "id"] == "row_123" and table.loc[0, "suggested"] == "abcd"[contest.answers[123]]
    assert table.loc[0, "answer"] == "abcd"[contest.labels[123]] and table.loc[0, "question"].endswith(EVIL)
    mean = np.mean([values[123, contest.answers[123]] for values in weights.values()])
    assert table.loc[0, "p_suggested"] == pytest.approx(mean, abs=1e-4)
    for name in ("M1_log_loss", "M1_accuracy", "M1_reliability"):
        assert np.asarray(Image.open(contest.folder / "page" / f"{name}.png").convert("L")).std() > 5


@pytest.mark.slow
def test_models_stand_side_by_side_whatever_their_names(contest, analyze):
    first = contest.model("모델", trio(contest), best="raw")
    second = contest.model("B", trio(contest, skill=4.0), best="raw", validations=1)
    code, said, error, html = analyze(*first, *second)
    assert code == 0, error
    assert f"- M1: {contest.folder}/checkpoints/B/fold*: accuracy" in said
    assert f"- M2: {contest.folder}/checkpoints/모델/fold*: accuracy" in said
    assert "- M2 is worse than M1, in accuracy and in log-loss, at 306 rows." in said
    text = Parsed(html).text
    assert "No learning curves" in text and "Model comparison" in text
    labels = ["abcd"[answer] for answer in contest.labels]
    files = [[pd.read_csv(folder / "oof.csv", index_col="id") for folder in folds] for folds in (first, second)]
    wrong = [pd.concat(tables).loc[contest.ids, "answer"].to_numpy() != labels for tables in files]
    assert (
        f"- Least alike: M1 and M2, Jaccard index of their errors {jaccard_score(*wrong):.2f}, other letters" in said
    )
    assert np.asarray(Image.open(contest.folder / "page" / "error_overlap.png").convert("L")).std() > 5
    assert (contest.folder / "page" / "M2_log_loss.png").is_file()
    assert not (contest.folder / "page" / "M1_log_loss.png").is_file()
    assert needs_nothing(html)
    assert analyze(*map(os.path.relpath, first), *second)[0] == 0, "relative and absolute paths together"


@pytest.mark.slow
def test_models_are_compared_on_the_rows_that_they_share(contest, analyze):
    first, second = (contest.model(name, trio(contest), best="raw") for name in ("A", "B"))
    code, said, error, html = analyze(*first, *second[:1])
    assert code == 0 and "102 rows, 4 folds" in said, error
    assert "204 rows are left out because not every model" in html
    code, _, error, _ = analyze(first[0], second[1])
    assert (code, error.count("\n")) == (2, 1) and "no validation row in common" in error


def test_a_model_that_is_not_above_the_text_is_reported_first_and_flags_no_label(contest, analyze):
    folders = contest.model("A", trio(contest), best="ema")
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        for scores in metrics["weights"].values():
            scores["text_only"] = 0.97
        change(folder / "metrics.json", weights=metrics["weights"])
    code, said, error, html = analyze(*folders)
    assert code == 0, error
    assert said.splitlines()[0].startswith(f"- warning: {contest.folder}/checkpoints/A/fold*: its accuracy ")
    assert "is not above that of a classifier that sees no image, 0.9700" in said
    assert "(chance 0.2500, text-only 0.9700)" in said and "- No label is doubted" in said
    assert len(pd.read_csv(contest.folder / "page" / "mislabelled.csv")) == 0
    assert 'class="warning"' in html


def test_one_fold_without_averages_or_history_is_enough(contest, analyze):
    folder = contest.model("A", {"raw": contest.probabilities(1.0)}, best="raw")[1]
    (folder / "history.json").unlink()
    code, said, error, html = analyze(folder)
    assert code == 0 and "102 rows, 1 fold" in said, error
    assert "EMA" not in said and "No learning curves" in html


def test_a_learning_curve_is_of_its_own_weights(contest):
    folder = contest.model("A", trio(contest), best="ema")[1]
    fold, history = read_fold(folder, Labels(contest.csv)), json.loads((folder / "history.json").read_text())
    for weights, key in (("raw", "eval_accuracy"), ("ema", "eval_ema_accuracy"), ("swa", "eval_swa_accuracy")):
        assert fold.curve(weights, "accuracy").tolist() == [[logs["step"], logs[key]] for logs in history]
        assert fold.curve(weights, "log_loss")[-1, 1] == pytest.approx(fold.scores[weights]["log_loss"] + 0.1)
    assert fold.scores["ema"]["log_loss"] < fold.scores["raw"]["log_loss"] - 0.01
    del fold.history[0]["eval_swa_accuracy"]
    assert fold.curve("swa", "accuracy")[:, 0].tolist() == [20, 30], "SWA begins later"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_trusted_is_refused_in_one_line(contest, analyze):
    folders = contest.model("A", trio(contest), best="ema")
    copies = {name: shutil.copytree(folders[0], contest.folder / "checkpoints" / f"{name}0") for name in "uvwxyz"}
    table = pd.read_csv(copies["u"] / "ema" / "oof.csv")
    table.assign(id=table["id"][::-1].to_numpy()).to_csv(copies["u"] / "ema" / "oof.csv", index=False)
    shutil.copy(folders[1] / "oof.csv", copies["v"] / "oof.csv")
    change(copies["w"] / "args.json", fold=None)
    (copies["x"] / "metrics.json").unlink()
    (copies["y"] / "ema" / "oof.csv").unlink()
    change(copies["z"] / "args.json", train_csv="elsewhere.csv")
    for name, told in {
        "u": "were exchanged or the answers changed",
        "v": "rows are not of fold 0, so its model was trained on them",
        "w": "no finished fold",
        "x": "no finished fold",
        "y": "ema weights is missing",
    }.items():
        code, _, error, html = analyze(copies[name])
        assert (code, error.count("\n"), html) == (2, 1, "") and told in error, name
    code, _, error, _ = analyze(folders[0], copies["z"])
    assert (code, error.count("\n")) == (2, 1) and "different data (" in error
