"""Ensembles by the command line on planted out-of-fold files: what is tuned, what is refused, what is printed."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import HEADER, write_csv

from vqa.evaluation.ensembling import METHODS, fit
from vqa.evaluation.metrics import row_log_loss

TRAIN, TEST, FOLDS = 600, 300, 3


def write(path, ids, values):
    table = pd.DataFrame(values, columns=[f"p_{letter}" for letter in "abcd"])
    table.insert(0, "id", ids)
    table.insert(1, "answer", ["abcd"[i] for i in values.argmax(1)])
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.17g")


class Planted:
    """A contest in a folder, and models on it whose folds have predictions, cards, args and out-of-fold files."""

    def __init__(self, folder):
        self.folder, self.random = folder, np.random.default_rng(0)
        self.answers = self.random.integers(0, 4, TRAIN + TEST)
        self.ids = np.array([f"r{i:04d}" for i in range(TRAIN + TEST)])
        self.folds = np.arange(TRAIN) % FOLDS
        cells = [[row_id, "x.jpg", f"q{i}", *"wxyz"] for i, row_id in enumerate(self.ids)]
        rows = [[*row, "abcd"[answer]] for row, answer in zip(cells, self.answers)]
        write_csv(folder / "train.csv", rows[:TRAIN])
        write_csv(folder / "test.csv", cells[TRAIN:], HEADER[:-1])
        write_csv(folder / "folds.csv", [[a, str(b)] for a, b in zip(self.ids, self.folds)], ["id", "fold"])
        write_csv(folder / "sample_submission.csv", [[a, "a"] for a in self.ids[TRAIN:][::-1]], ["id", "answer"])

    def probabilities(self, skill):
        """A model's opinion of all rows (rows, 4); the larger the skill, the better."""
        scores = self.random.normal(size=(TRAIN + TEST, 4))
        scores[np.arange(TRAIN + TEST), self.answers] += skill
        return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    def model(self, name, values):
        """Write a model's folds, and give back its prediction files."""
        files = []
        for fold in range(FOLDS):
            run, own = self.folder / "checkpoints" / name / f"fold{fold}", np.flatnonzero(self.folds == fold)
            write(run / "oof.csv", self.ids[own], values[own])
            args = {"fold": fold, "train_csv": str(self.folder / "train.csv"), "folds_csv": None}
            (run / "args.json").write_text(json.dumps(args))
            files.append(self.folder / "outputs" / name / f"fold{fold}.csv")
            write(files[-1], self.ids[TRAIN:], values[TRAIN:])
            scores = {
                "log_loss": row_log_loss(values[own], self.answers[own]).mean(),
                "accuracy": (values[own].argmax(1) == self.answers[own]).mean(),
            }
            card = {"adapter": str(run), "validation": scores, "test_csv": str(self.folder / "test.csv")}
            files[-1].with_suffix(".json").write_text(json.dumps(card))
        return files

    def oof(self, file):
        return self.folder / "checkpoints" / file.parent.name / file.stem / "oof.csv"


@pytest.fixture
def planted(tmp_path):
    return Planted(tmp_path)


def test_auto_gives_noise_no_weight_says_so_and_says_what_it_gains(planted, script):
    good, other = planted.probabilities(1.5), planted.probabilities(1.0)
    noise = planted.random.dirichlet(np.ones(4), TRAIN + TEST)
    models = {"good": good, "copy": good, "other": other, "noise": noise}
    files = [file for name, values in models.items() for file in planted.model(name, values)]
    output = planted.folder / "submission.csv"
    code, said, error = script("ensemble", *files, "--output", output)
    assert code == 0, error
    assert "stack is chosen: its log-loss is" in said and "beyond noise at 600 rows" in said
    assert f"{planted.folder}/outputs/noise/fold*.csv gets no weight" in said
    assert f"{planted.folder}/outputs/other/fold*.csv (weight 0.000)" not in said
    for method in METHODS:
        assert f"\n{method.rjust(9)}" in said
    submission = pd.read_csv(output)
    assert list(submission["id"]) == list(pd.read_csv(planted.folder / "sample_submission.csv")["id"])
    stack = np.stack([models[name] for name in sorted(models)])
    best = fit("stack", stack[:, :TRAIN], planted.answers[:TRAIN])(stack[:, TRAIN:])
    assert list(submission["answer"][::-1]) == ["abcd"[i] for i in best.argmax(1)]
    first = output.read_bytes()
    code, said, _ = script("ensemble", *files[::-1], "--output", output)
    assert code == 0 and output.read_bytes() == first and "0 of 300 answers differ" in said


def exchange(planted, file, everywhere=True):
    """Give the rows of an out-of-fold file each other's ids."""
    table = pd.read_csv(planted.oof(file))
    rows = slice(None) if everywhere else slice(0, 2)
    table.loc[table.index[rows], "id"] = table["id"][rows].to_numpy()[::-1].copy()
    table.to_csv(planted.oof(file), index=False, float_format="%.17g")


@pytest.mark.parametrize("everywhere", [True, False])
def test_exchanged_ids_are_refused_by_what_training_measured(planted, script, everywhere):
    files = planted.model("good", planted.probabilities(1.5)) + planted.model("swapped", planted.probabilities(1.5))
    exchange(planted, files[4], everywhere)
    code, said, error = script("ensemble", *files)
    assert (code, error.count("\n")) == (2, 1) and "swapped/fold1/oof.csv: its log-loss" in error
    assert not list(planted.folder.rglob("submission.csv"))


def test_exchanged_ids_are_refused_without_cards_by_agreement(planted, script):
    files = planted.model("good", planted.probabilities(1.5)) + planted.model("swapped", planted.probabilities(1.5))
    for file in files:
        file.with_suffix(".json").unlink()
    given = ["--oof", *(planted.oof(file) for file in files), "--labels", planted.folder / "train.csv"]
    assert script("ensemble", *files, *given)[0] == 0
    (planted.folder / "outputs" / "good" / "submission.csv").unlink()
    for file in files[3:]:
        exchange(planted, file)
    code, _, error = script("ensemble", *files, *given)
    assert (code, error.count("\n")) == (2, 1), error
    assert "swapped/fold*.csv: its probabilities correlate with" in error and "were exchanged" in error
    assert not list(planted.folder.rglob("submission.csv"))


def test_out_of_fold_files_in_the_same_views_are_taken_and_checked(planted, script):
    """Those that predict.py --oof wrote beside the predictions, where their cards name the same weights and views."""
    values, with_tta = planted.probabilities(1.0), planted.probabilities(2.0)
    files = planted.model("good", values)
    for fold, file in enumerate(files):
        own, same = np.flatnonzero(planted.folds == fold), file.parent / "oof" / file.name
        write(same, planted.ids[own], with_tta[own])
        card = json.loads(file.with_suffix(".json").read_text())
        card |= {"model": f"m{fold}", "views": ["plain", "rotation 1"], "gate": None}
        file.with_suffix(".json").write_text(json.dumps(card))
        scores = {"log_loss": row_log_loss(with_tta[own], planted.answers[own]).mean()}
        same.with_suffix(".json").write_text(json.dumps(card | {"scores": scores}))
    losses = [row_log_loss(v[:TRAIN], planted.answers[:TRAIN]).mean() for v in (with_tta, values)]
    code, said, error = script("ensemble", *files)
    assert code == 0 and f"log-loss {losses[0]:.4f}, 600 rows" in said and "without" not in said, error
    swapped = files[1].parent / "oof" / files[1].name
    before = swapped.read_text()
    table = pd.read_csv(swapped)
    table["id"] = table["id"].to_numpy()[::-1]
    table.to_csv(swapped, index=False, float_format="%.17g")
    code, _, error = script("ensemble", *files)
    assert (code, error.count("\n")) == (2, 1) and "oof/fold1.csv: its log-loss" in error
    swapped.write_text(before)
    for key, other in (("model", "another"), ("views", ["plain"]), ("gate", 0.5)):
        card = json.loads(swapped.with_suffix(".json").read_text())
        swapped.with_suffix(".json").write_text(json.dumps(card | {key: other}))
        code, said, error = script("ensemble", *files)
        assert code == 0 and f"{files[1]}: predicted with TTA, but the out-of-fold rows without" in said, error
        swapped.with_suffix(".json").write_text(json.dumps(card))


def test_rows_that_a_fold_was_trained_on_are_refused(planted, script):
    files = planted.model("good", planted.probabilities(1.5))
    planted.oof(files[0]).write_bytes(planted.oof(files[1]).read_bytes())
    code, _, error = script("ensemble", *files)
    assert (code, error.count("\n")) == (2, 1)
    assert "200 rows are not of fold 0, so its model was trained on them: r0001, r0004, r0007" in error
    args = planted.oof(files[0]).with_name("args.json")
    args.write_text(args.read_text().replace('"fold": 0', '"fold": null'))
    assert "was trained on every row" in script("ensemble", *files)[2]


def test_a_row_that_its_fold_lacks_is_named(planted, script):
    files = planted.model("good", planted.probabilities(1.5))
    pd.read_csv(planted.oof(files[2])).iloc[1:].to_csv(planted.oof(files[2]), index=False, float_format="%.17g")
    code, _, error = script("ensemble", *files)
    assert code == 2 and "1 rows of fold 2 are missing: r0002" in error


def test_one_model_is_averaged_and_the_reason_is_printed(planted, script):
    values = planted.probabilities(1.0)
    files = planted.model("good", values)
    code, said, error = script("ensemble", *files)
    assert code == 0, error
    assert "mean is used: the folds of one model have no out-of-fold rows in common" in said
    assert f"accuracy {(values.argmax(1) == planted.answers)[:TRAIN].mean():.4f} (95 % interval" in said
    for method in ("greedy", "stack"):
        code, _, error = script("ensemble", *files, "--method", method)
        assert (code, error.count("\n")) == (2, 1) and "needs two models" in error


def test_without_out_of_fold_files_mean_is_used_and_said_and_tuning_is_refused(planted, script):
    files = planted.model("good", planted.probabilities(1.5)) + planted.model("other", planted.probabilities(0.0))
    planted.oof(files[4]).unlink()
    code, said, error = script("ensemble", *files)
    assert code == 0 and "no out-of-fold rows: " in said and "mean is used: without out-of-fold rows" in said, error
    code, _, error = script("ensemble", *files, "--method", "stack")
    assert (code, error.count("\n")) == (2, 1) and "other/fold1/oof.csv: no such file" in error
    code, said, error = script("ensemble", *files, "--method", "weighted")
    assert code == 0 and "weighted of" in said, "the cards have each fold's score"


def test_models_validated_on_different_rows_are_not_tuned(planted, script):
    files = planted.model("good", planted.probabilities(1.5)) + planted.model("other", planted.probabilities(1.0))
    code, said, error = script("ensemble", *files[:5])
    assert code == 0 and "were validated on different rows: 200 are in only one of them: r0002" in said, error
    given = ["--oof", *(planted.oof(file) for file in files[:5])]
    code, _, error = script("ensemble", *files[:5], *given)
    assert code == 2 and "were validated on different rows" in error


def test_the_mean_of_two_models_is_not_the_mean_of_their_files(planted, script):
    """Three folds of one and one of the other: each model counts half."""
    good, other = planted.probabilities(1.0), planted.probabilities(1.0)
    files = [*planted.model("good", good), planted.model("other", other)[0]]
    output = planted.folder / "s.csv"
    assert script("ensemble", *files, "--method", "mean", "--output", output)[0] == 0
    expected = ["abcd"[i] for i in (good + other)[TRAIN:].argmax(1)]
    assert list(pd.read_csv(output)["answer"][::-1]) == expected
    assert expected != ["abcd"[i] for i in (3 * good + other)[TRAIN:].argmax(1)]


def test_temperature_corrects_an_overconfident_model(planted, script):
    values = planted.probabilities(1.0) ** 4
    files = planted.model("good", values / values.sum(1, keepdims=True))
    code, said, error = script("ensemble", *files, "--temperature")
    assert code == 0, error
    found = float(said.split("temperatures: ")[1].split(",")[0].split()[-1])
    assert found == pytest.approx(4, rel=0.15)


def test_letters_that_a_row_does_not_offer_are_refused(planted, script):
    files = planted.model("good", planted.probabilities(1.0))
    table = pd.read_csv(planted.folder / "test.csv", dtype=str)
    table.loc[5, "d"] = ""
    table.to_csv(planted.folder / "test.csv", index=False)
    code, _, error = script("ensemble", *files)
    assert (code, error.count("\n")) == (2, 1)
    assert "1 rows do not offer letters that were predicted: r0605" in error
    assert not list(planted.folder.rglob("submission.csv"))


def test_what_the_submission_changes_and_what_it_may_not_write_over(planted, script):
    values = planted.probabilities(1.0)
    files = planted.model("good", values)
    code, said, error = script("ensemble", *files)
    assert code == 0 and "previous submission" not in said, error
    trained = (planted.answers[:TRAIN] == 0).mean()
    count = (values[TRAIN:].argmax(1) == 0).sum()
    assert f"letters: a {count} ({count / TEST:.1%}, in training {trained:.1%})" in said
    output = planted.folder / "outputs" / "good" / "submission.csv"
    lines = output.read_text().splitlines()
    lines[3:5] = [line[:-1] + "abcd"["abcd".index(line[-1]) - 1] for line in lines[3:5]]
    output.write_text("\n".join(lines) + "\n")
    assert "2 of 300 answers differ from the previous submission" in script("ensemble", *files)[1]
    code, _, error = script("ensemble", *files, "--output", files[0])
    assert code == 2 and "exists and is not a submission" in error


def test_known_answers_replace_predictions_and_are_reported(planted, script):
    files, output = planted.model("m", planted.probabilities(1.0)), planted.folder / "submission.csv"
    assert script("ensemble", *files, "--output", output)[0] == 0
    before, known = pd.read_csv(output).set_index("id")["answer"], planted.folder / "known.csv"
    rows = [[name, "abcd"["abcd".index(answer) - i % 2]] for i, (name, answer) in enumerate(before[:9].items())]
    write_csv(known, rows, ["id", "answer"])
    code, said, error = script("ensemble", *files, "--output", output, "--known_answers", known)
    assert code == 0 and f"known answers: 9 rows are answered as in {known}, 4 of them not as predicted" in said, error
    after = pd.read_csv(output).set_index("id")["answer"]
    assert after.to_dict() == before.to_dict() | dict(rows) and (after != before).sum() == 4
    for wrong, message in (["other", "a"], "1 ids are not predicted"), ([before.index[0], "e"], "do not offer"):
        write_csv(known, [wrong], ["id", "answer"])
        code, _, error = script("ensemble", *files, "--known_answers", known)
        assert (code, error.count("\n")) == (2, 1) and message in error


def test_a_model_that_is_not_above_the_text_is_named_with_both_lines(planted, script):
    good, blind = planted.model("good", planted.probabilities(1.5)), planted.model("blind", planted.probabilities(0.6))
    for file in good + blind:
        card = json.loads(file.with_suffix(".json").read_text())
        card["validation"] |= {"text_only": 0.5, "rows": 200}
        file.with_suffix(".json").write_text(json.dumps(card))
    code, said, error = script("ensemble", *good, *blind)
    assert code == 0 and said.count("(chance 0.2500, text-only 0.5000)") == 2, error
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "blind/fold*.csv: its accuracy 0.3" in warnings[0]
    assert "is not above that of a classifier that sees no image, 0.5000" in warnings[0]


def test_comparison_ends_in_one_sentence(planted, script):
    files = planted.model("good", planted.probabilities(2.0)) + planted.model("bad", planted.probabilities(0.5))
    good, bad = (planted.oof(file) for file in (files[0], files[3]))
    code, said, error = script("ensemble", "--compare", bad, good, "--labels", planted.folder / "train.csv")
    assert code == 0, error
    last = said.splitlines()[-1]
    assert last == f"{good} is better than {bad}, in accuracy and in log-loss, at 200 rows."
    assert said.count("95 % interval") == 4 and "McNemar's exact test p = " in said
    code, _, error = script("ensemble", "--compare", bad, good)
    assert (code, error.count("\n")) == (2, 1) and "--labels" in error
    code, _, error = script(
        "ensemble", "--compare", bad, planted.oof(files[1]), "--labels", planted.folder / "train.csv"
    )
    assert (code, error.count("\n")) == (2, 1) and "are missing" in error


def test_an_ensembles_probabilities_are_the_mean_and_do_not_get_among_the_predictions(planted, script):
    values = planted.probabilities(1.0)
    files = planted.model("good", values)
    path = planted.folder / "pseudo" / "all.csv"
    code, _, error = script("ensemble", *files, "--probabilities", path)
    assert code == 0, error
    table = pd.read_csv(path)
    assert list(table["id"]) == list(planted.ids[TRAIN:])
    np.testing.assert_allclose(table[["p_a", "p_b", "p_c", "p_d"]], values[TRAIN:], atol=1e-15)
    among = files[0].with_name("all.csv")
    code, _, error = script("ensemble", *files, "--probabilities", among)
    assert (code, error.count("\n")) == (2, 1) and "is in the folder of the predictions" in error
    assert not among.exists()


def test_weights_by_type_read_the_questions_of_both_files(planted, script):
    """The first model is right about colours, the second one counts."""
    count = np.arange(TRAIN + TEST) % 2 == 1
    for name in ("train.csv", "test.csv"):
        table = pd.read_csv(planted.folder / name, dtype=str)
        odd = table["id"].str[1:].astype(int) % 2 == 1
        table["question"] = np.where(odd, "How many are there?", "What colour is it?")
        table.to_csv(planted.folder / name, index=False)
    good, bad = planted.probabilities(2.0), planted.probabilities(0.2)
    stack = np.stack([np.where(count[:, None], bad, good), np.where(count[:, None], good, bad)])
    files = planted.model("a", stack[0]) + planted.model("b", stack[1])
    output = planted.folder / "s.csv"
    code, said, error = script("ensemble", *files, "--method", "stack_by_type", "--output", output)
    assert code == 0, error
    assert "log-loss of stack_by_type minus that of stack: -0." in said and "beyond noise at 600 rows" in said
    types = np.where(count, "count", "colour")
    best = fit("stack_by_type", stack[:, :TRAIN], planted.answers[:TRAIN], types=types[:TRAIN])
    for name, (first, second) in best.by_type.items():
        assert f"\n{name}: weights {first:.3f}, {second:.3f}\n" in said
    expected = best(stack[:, TRAIN:], types[TRAIN:]).argmax(1)
    assert list(pd.read_csv(output)["answer"][::-1]) == ["abcd"[i] for i in expected]
    (planted.folder / "test.csv").unlink()
    code, _, error = script("ensemble", *files, "--method", "stack_by_type", "--output", output)
    assert (code, error.count("\n")) == (2, 1) and "reads the questions of the test CSV" in error
    code, _, error = script("ensemble", *files[:3], "--method", "stack_by_type", "--output", output)
    assert (code, error.count("\n")) == (2, 1) and "needs two models" in error


def test_models_of_all_rows_get_the_score_of_the_folds_with_the_same_settings(planted, script):
    values = planted.probabilities(1.0)
    files, parent = planted.model("m", values), planted.folder / "checkpoints" / "m"
    for file in files:
        loss = json.loads(file.with_suffix(".json").read_text())["validation"]["log_loss"]
        metrics = {"best": "raw", "weights": {"raw": {"log_loss": loss}}}
        planted.oof(file).with_name("metrics.json").write_text(json.dumps(metrics))
    args, own = json.loads((parent / "fold0" / "args.json").read_text()), []
    for seed in (42, 43):
        run, file = parent / "all_rows" / f"seed{seed}", planted.folder / "outputs" / "all_rows" / f"seed{seed}.csv"
        run.mkdir(parents=True)
        (run / "args.json").write_text(json.dumps(args | {"fold": None, "seed": seed}))
        own.append(write(file, planted.ids[TRAIN:], values[TRAIN:]) or file)
        card = {"adapter": str(run), "validation": None, "test_csv": str(planted.folder / "test.csv")}
        file.with_suffix(".json").write_text(json.dumps(card))
    right = (values.argmax(1) == planted.answers)[:TRAIN].mean()
    told = f"{parent}/all_rows: estimate from the folds {parent}/fold*: accuracy {right:.4f} (95 % interval"
    code, said, error = script("ensemble", *own)
    assert code == 0 and told in said and "those of all rows have no validation rows" in said, error
    assert "mean is used" in said and "its model was trained on all rows" in said
    code, said, error = script("summarize", own[0].parent)
    assert code == 0 and told in said, error
    labels = write_csv(planted.folder / "labels.csv", [[i, "a"] for i in planted.ids[TRAIN:]], ["id", "answer"])
    code, said, error = script("summarize", own[0].parent, "--labels", labels)
    assert code == 0 and told in said and "majority" in said and "weighted" not in said, error
    (parent / "fold2" / "args.json").write_text(json.dumps(args | {"fold": 2, "learning_rate": 1e-3}))
    said = script("ensemble", *own)[1]
    assert "fold2 was trained with a different learning_rate than seed42" in said and "estimate from" not in said
    for fold in range(FOLDS):
        (parent / f"fold{fold}" / "metrics.json").unlink()
    assert f"no estimate, because {parent} has no folds with the same settings" in script("ensemble", *own)[1]
