"""The scripts by their command lines: the whole job, and what each refuses."""

import importlib
import json
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HEADER, TINY, command, write_csv
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from vqa.core.hashing import fingerprint
from vqa.data.collator import Collator
from vqa.data.prompt import LETTERS
from vqa.data.rows import read_rows
from vqa.inference.scoring import score_rows
from vqa.modeling.families import lora_pattern
from vqa.modeling.loading import load_base


def test_a_folds_folder_holds_what_the_design_says(trained):
    fold = trained / "checkpoints" / "fold0"
    for name in ("", "ema", "swa"):
        assert (fold / name / "adapter_model.safetensors").is_file() and (
            fold / name / "adapter_config.json"
        ).is_file()
        assert (fold / name / "oof.csv").read_text().startswith("id,answer,p_a,p_b,p_c,p_d\n")
    metrics = json.loads((fold / "metrics.json").read_text())
    assert set(metrics["weights"]) == {"raw", "ema", "swa"}
    assert metrics["best"] == min(metrics["weights"], key=lambda name: metrics["weights"][name]["log_loss"])
    assert (metrics["train_rows"], metrics["valid_rows"]) == (12, 12)
    assert json.loads((fold / "args.json").read_text())["fold"] == 0


@pytest.mark.parametrize("weights", ["", "ema", "swa"])
def test_an_adapter_loads_with_peft_alone_and_reproduces_its_out_of_fold_file(trained, processor, ids, weights):
    fold = trained / "checkpoints" / "fold0"
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, fold / weights).eval()
    oof = pd.read_csv(fold / weights / "oof.csv")
    rows = {row["id"]: row for row in read_rows(trained / "data" / "train.csv", with_answer=True)}
    valid = [rows[row_id] for row_id in oof["id"]]
    got = score_rows(model, valid, Collator(processor, 112), ids, 16)[:, :4]
    assert np.abs(got - oof[["p_a", "p_b", "p_c", "p_d"]].to_numpy()).max() < 1e-6
    accuracy = np.mean([LETTERS[row["answer"]] == letter for row, letter in zip(valid, oof["answer"])])
    logged = json.loads((fold / "metrics.json").read_text())["weights"][weights or "raw"]["accuracy"]
    assert accuracy == pytest.approx(logged)


def test_the_out_of_fold_rows_are_the_fold_and_no_others(trained):
    folds = pd.read_csv(trained / "data" / "folds.csv")
    for fold in (0, 1):
        oof = pd.read_csv(trained / "checkpoints" / f"fold{fold}" / "oof.csv")
        assert sorted(oof["id"]) == sorted(folds["id"][folds["fold"] == fold])


def test_every_fold_starts_from_the_same_untouched_base(trained):
    """By the fingerprints that each fold noted, and by one made here of the model folder."""
    noted = [
        json.loads((trained / "checkpoints" / f"fold{fold}" / "metrics.json").read_text())["fingerprints"]
        for fold in (0, 1)
    ]
    assert all(noted[0][name] == noted[1][name] for name in ("base", "initial_adapter"))
    assert noted[0]["rows"] != noted[1]["rows"]
    base = load_base(TINY, False, torch.float32)
    names = {f"base_model.model.{name}": p for name, p in base.named_parameters()}
    targets = [name for name, m in base.named_modules() if re.fullmatch(lora_pattern(base), name)]
    for name in targets:
        for part in ("weight", "bias"):
            if (key := f"base_model.model.{name}.{part}") in names:
                names[f"base_model.model.{name}.base_layer.{part}"] = names.pop(key)
    assert fingerprint(names.items()) == noted[0]["base"]
    changed = {name: p + 1e-3 if name.endswith("embed_tokens.weight") else p for name, p in names.items()}
    assert fingerprint(changed.items()) != noted[0]["base"]


def test_folds_of_different_bases_are_not_predicted_together(trained, script, tmp_path):
    folds = [tmp_path / "fold0", tmp_path / "fold1"]
    for fold in folds:
        shutil.copytree(trained / "checkpoints" / fold.name, fold, ignore=shutil.ignore_patterns("checkpoint-*"))
    metrics = json.loads((folds[1] / "metrics.json").read_text())
    metrics["fingerprints"]["files"] = "0" * 16
    (folds[1] / "metrics.json").write_text(json.dumps(metrics))
    code, _, error = script("predict", *folds, "--output_dir", tmp_path / "outputs")
    assert (code, error.count("\n")) == (2, 1) and "fold1: not trained on the base weights" in error


def test_training_refuses_a_leak_between_the_halves_of_a_fold(trained, script, tmp_path):
    """A folds file that parts two copies of one image."""
    table = pd.read_csv(trained / "data" / "train.csv", dtype=str)
    folds = pd.read_csv(trained / "data" / "folds.csv")
    first, second = folds.index[folds["fold"] == 0][0], folds.index[folds["fold"] == 1][0]
    table.loc[second, "path"] = table.loc[first, "path"]
    csv = write_csv(trained / "data" / "leak.csv", table.values.tolist(), HEADER)
    flags = ["--train_csv", csv, "--folds_csv", trained / "data" / "folds.csv", "--output_dir", tmp_path / "out"]
    code, _, error = script("train_fold", trained / "args" / "fold0.json", *flags)
    last = error.splitlines()[-1]  # below the bar of loading the model
    assert code == 2 and last.startswith("error: ") and "have the image of a training row" in last


def test_training_changes_the_language_model_and_nothing_of_the_vision_tower(trained):
    from safetensors.torch import load_file

    weights = load_file(trained / "checkpoints" / "fold0" / "adapter_model.safetensors")
    assert all("language_model" in name for name in weights) and not any("visual" in name for name in weights)
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_predict_and_ensemble_by_their_command_lines(trained):
    outputs = trained / "outputs"
    folds = [trained / "checkpoints" / "fold0", trained / "checkpoints" / "fold1"]
    extra = ["--scales", "0.8", "1.0", "--num_permutations", "2", "--output_dir", outputs]
    done = command(sys.executable, "predict.py", *folds, "--base", trained / "args" / "fold0.json", *extra)
    assert done.returncode == 0, done.stderr
    test_ids = list(pd.read_csv(trained / "data" / "test.csv")["id"])
    for name in ("base/base", "fold0", "fold1", "plain/fold0"):
        table = pd.read_csv(outputs / f"{name}.csv")
        assert list(table["id"]) == test_ids
        assert table[["p_a", "p_b", "p_c", "p_d"]].sum(axis=1).to_numpy() == pytest.approx(np.ones(24))
    assert not (pd.read_csv(outputs / "fold0.csv")["p_a"] == pd.read_csv(outputs / "fold1.csv")["p_a"]).all()
    card = json.loads((outputs / "fold0.json").read_text())
    assert card["views"] == ["plain", "rotation 1", "scale 0.8"] and card["validation"]["log_loss"] > 0

    (outputs / "seconds.txt").write_text("stage,seconds\ntrain,7\n")
    labels = trained / "data" / "train.csv"
    done = command(sys.executable, "summarize.py", outputs, "--labels", labels)
    assert done.returncode == 0 and "fold1 + TTA" in done.stdout, done.stderr
    scores = {line["step"]: line for line in json.loads((outputs / "scores.json").read_text())["scores"]}
    right = pd.read_csv(outputs / "fold0.csv").merge(pd.read_csv(labels), on="id", suffixes=("", "_true"))
    assert scores["fold0 + TTA"]["accuracy"] == (right["answer"] == right["answer_true"]).mean()
    assert {"base model, untrained", "mean", "majority", "weighted + TTA"} <= set(scores)
    assert all(line["low"] <= line["accuracy"] <= line["high"] for line in scores.values())
    done = command(sys.executable, "summarize.py", outputs)
    assert done.returncode == 0 and "fold0" in done.stdout and "train 7" in done.stdout, done.stderr

    files = sorted(str(path) for path in outputs.glob("fold*.csv"))
    for method in ("mean", "majority", "weighted"):
        done = command(sys.executable, "ensemble.py", *files, "--method", method)
        assert done.returncode == 0, done.stderr
        submission = pd.read_csv(outputs / "submission.csv")
        assert list(submission["id"]) == list(pd.read_csv(trained / "data" / "sample_submission.csv")["id"])
        assert set(submission["answer"]) <= set("abcd")
    first = (outputs / "submission.csv").read_bytes()
    again = sorted(str(path) for path in outputs.glob("*.csv"))
    assert any("submission" in name for name in again)
    done = command(sys.executable, "ensemble.py", *again, "--method", "weighted")
    assert f"ignored, because they have no probabilities: {outputs / 'submission.csv'}" in done.stdout
    assert done.returncode == 0 and (outputs / "submission.csv").read_bytes() == first


def test_prediction_gives_what_validation_logged(trained, script):
    """predict.py on the validation rows of the fold, with the weights that validated best."""
    fold = trained / "checkpoints" / "fold1"
    best = json.loads((fold / "metrics.json").read_text())["best"]
    oof = pd.read_csv(fold / ("" if best == "raw" else best) / "oof.csv")
    train = pd.read_csv(trained / "data" / "train.csv").set_index("id").loc[oof["id"]].reset_index()
    train.to_csv(trained / "data" / "valid.csv", index=False)
    code, _, error = script(
        "predict", fold, "--csv", trained / "data" / "valid.csv", "--output_dir", trained / "again"
    )
    assert code == 0, error
    got = pd.read_csv(trained / "again" / "fold1.csv")
    assert list(got["id"]) == list(oof["id"]) and list(got["answer"]) == list(oof["answer"])
    columns = ["p_a", "p_b", "p_c", "p_d"]
    assert np.abs(got[columns].to_numpy() - oof[columns].to_numpy()).max() < 1e-6


def test_resuming_ends_with_the_bytes_of_the_uninterrupted_run(trained, script):
    whole, part = trained / "checkpoints" / "fold0", trained / "resumed"
    shutil.copytree(whole / "checkpoint-2", part / "checkpoint-2")
    code, _, error = script(
        "train_fold", trained / "args" / "fold0.json", "--output_dir", part, "--resume_from_checkpoint", "auto"
    )
    assert code == 0, error
    for name in ("adapter_model.safetensors", "ema.safetensors", "swa.safetensors"):
        assert (part / "checkpoint-4" / name).read_bytes() == (whole / "checkpoint-4" / name).read_bytes(), name
    history = json.loads((whole / "history.json").read_text())
    assert [logs["step"] for logs in history] == [2, 4] and (part / "history.json").read_bytes() == (
        whole / "history.json"
    ).read_bytes()
    best = json.loads((whole / "best.json").read_text())
    for name, scores in best.items():
        prefix = "eval" if name == "raw" else f"eval_{name}"
        logged = {logs["step"]: logs.get(f"{prefix}_log_loss") for logs in history}
        assert logged[scores["step"]] == scores["log_loss"] == min(filter(None, logged.values())), name
    assert best["swa"]["step"] == 4, "SWA begins after half of the run"
    for name in (name for name in best if best[name]["step"] == 4):
        for file in ("adapter_model.safetensors", "oof.csv"):
            place = file if name == "raw" else f"{name}/{file}"
            assert (part / place).read_bytes() == (whole / place).read_bytes(), place


def test_another_run_is_not_written_over_and_a_finished_one_is_not_trained_again(trained, script):
    args = trained / "args" / "fold0.json"
    before = (trained / "checkpoints" / "fold0" / "metrics.json").read_bytes()
    code, _, error = script("train_fold", args)
    assert code == 2 and "already contains this run" in error
    code, _, error = script("train_fold", args, "--learning_rate", "0.5", "--resume_from_checkpoint", "auto")
    assert code == 2 and "a run with a different learning_rate" in error
    code, output, _ = script("train_fold", args, "--resume_from_checkpoint", "auto")
    assert code == 0 and "is finished" in output
    assert (trained / "checkpoints" / "fold0" / "metrics.json").read_bytes() == before


def test_without_a_fold_every_row_is_trained_on_and_nothing_is_validated(trained, script):
    output = trained / "all"
    code, _, error = script("train_fold", trained / "args" / "fold0.json", "--fold", "null", "--output_dir", output)
    assert code == 0, error
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["train_rows"], metrics["valid_rows"], metrics["best"]) == (24, 0, "raw")
    assert (output / "adapter_model.safetensors").is_file() and not (output / "oof.csv").exists()


@pytest.mark.parametrize("name", ["train_fold", "make_folds", "predict", "ensemble", "summarize", "experiments"])
def test_help_teaches_and_ends_well(script, name):
    code, output, _ = script(name, "--help")
    assert code == 0 and f"python {name}.py" in output


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"answer": "e"}, [], "answer 'e' is not offered"),
        ({"path": "pictures/none.jpg"}, [], "1 of 24 images cannot be used"),
        ({"path": "../../x.jpg"}, [], "lead out of"),
        ({"id": "row_001"}, [], "ids occur twice"),
        ({}, ["--fold", "7"], "fold 7 is not in"),
        ({}, ["--fp16", "true"], "args/demo/fold0.json"),
        ({}, ["--load_in_4bit"], "args/demo/fold0.json"),
        ({}, ["--learning_rte", "1"], "Did you mean 'learning_rate'"),
        ({}, ["--model", "no/such/model"], "neither a model folder nor reachable"),
        ({}, ["--model", "Some/Model-3B"], "neither a model folder nor reachable"),
        ({}, ["--max_train_rows", "0"], "max_train_rows is 0"),
        ({}, ["--resume_from_checkpoint", "nowhere"], "not a checkpoint folder"),
    ],
)
def test_training_refuses_bad_input_in_one_line_with_exit_code_2(
    trained, script, tmp_path, monkeypatch, change, flags, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vqa.training.shared_base.load_base", lambda *args: pytest.fail("a model was loaded"))
    table = pd.read_csv(trained / "data" / "train.csv", dtype=str)
    for column, value in change.items():
        table.loc[2, column] = value
    csv = write_csv(trained / "data" / "bad.csv", table.values.tolist(), HEADER)
    folds = trained / "data" / "folds.csv"
    args = [
        trained / "args" / "fold0.json",
        "--train_csv",
        csv,
        "--folds_csv",
        folds,
        "--output_dir",
        tmp_path / "out",
    ]
    code, _, error = script("train_fold", *args, *flags)
    assert (code, error.startswith("error: "), error.count("\n")) == (2, True, 1) and message in error, error


def test_other_scripts_refuse_bad_input_too(trained, script, tmp_path):
    for name, args, message in (
        ("predict", [tmp_path], "no finished fold"),
        ("predict", [], "no folds given"),
        ("predict", [trained / "checkpoints" / "fold0", "--scales", "0"], "above 0"),
        ("ensemble", [tmp_path / "x.csv"], "no such file"),
        ("ensemble", [trained / "data" / "sample_submission.csv"], "none of the 1 files has probabilities"),
        ("ensemble", [trained / "data" / "train.csv"], "none of the 1 files has probabilities"),
        ("summarize", [tmp_path], "no fold"),
        ("make_folds", [tmp_path / "x.json"], "no such file"),
    ):
        code, _, error = script(name, *args)
        assert (code, error.count("\n")) == (2, 1) and message in error, error


@pytest.mark.parametrize(
    ("name", "old", "new", "value"),
    [
        ("predict", "--orders", "num_permutations", 3),
        ("predict", "--order_set", "permutation_set", "latin"),
        ("predict", "--wordings", "num_paraphrases", 2),
        ("ensemble", "--truth", "labels", "x.csv"),
        ("summarize", "--truth", "labels", "x.csv"),
    ],
)
def test_flags_of_an_older_release_are_accepted_and_not_shown(script, monkeypatch, name, old, new, value):
    assert old not in script(name, "--help")[1]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "checkpoints/fold0", old, str(value)])
    args = importlib.import_module(name).parse_args()
    assert getattr(args[0] if isinstance(args, tuple) else args, new) == value
