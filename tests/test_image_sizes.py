"""predict.py --image_sizes: the same scores as transformers' own passes at each size, a recommendation, its cost."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from peft import PeftModel
from sklearn.metrics import accuracy_score, log_loss
from transformers import AutoModelForImageTextToText

from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.data.predictions import read_card, read_predictions
from vqa.data.rows import read_rows
from vqa.evaluation.oof import group_models, load_oof
from vqa.evaluation.significance import first_unbeaten
from vqa.inference import predictor
from vqa.inference.checkpoints import fold_checkpoint
from vqa.training.image_sizes import training_costs


@pytest.fixture(scope="module")
def folds(trained):
    return [trained / "checkpoints" / name for name in ("fold0", "fold1")]


def probabilities_at(size, model, rows, processor, ids) -> np.ndarray:
    """By PEFT's and transformers' own forward pass."""
    batch = Collator(processor, size)(rows)
    kept = {key: batch[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        logits = model(**kept, **images).logits[:, -1]
    return logits[:, ids[:4]].softmax(-1).numpy()


def test_each_size_is_scored_as_transformers_does_and_used_for_prediction_when_it_is_the_only_one(
    script, folds, trained, processor, ids, tmp_path, monkeypatch
):
    rows = {row["id"]: row for row in read_rows(trained / "data" / "train.csv", with_answer=True)}
    largest = max(max(size) for size in oriented_sizes(all_images(rows.values())).values())
    scored = []
    score = predictor.choice_probs
    monkeypatch.setattr(
        predictor,
        "choice_probs",
        lambda model, rows, *args, **kw: scored.append(len(rows)) or score(model, rows, *args, **kw),
    )
    flags = ["--weights", "raw", "--output_dir", tmp_path, "--check_generation", "0"]
    sizes = [56, 140, 2 * largest, 4 * largest]
    code, output, error = script("predict", *folds, *flags, "--oof", "--image_sizes", *sizes)
    assert code == 0, error
    assert f"image size {4 * largest}: every image has the same grid as at {2 * largest}, so it is left out" in output
    assert "training on a T4 is not estimated: the model runs in float32" in output and "recommended: " in output
    report = json.loads((tmp_path / "oof" / "image_sizes.json").read_text())
    assert [line["image_size"] for line in report["sizes"]] == sizes[:3] and report["rows"] == 24
    own = [[rows[i] for i in read_predictions(fold / "oof.csv")[0]] for fold in folds]
    answers = [row["answer"] for fold in own for row in fold]
    base, *bases = [AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32) for _ in range(3)]
    models = [PeftModel.from_pretrained(*pair).eval() for pair in zip(bases, folds)]
    for line in report["sizes"]:
        stack = [probabilities_at(line["image_size"], *pair, processor, ids) for pair in zip(models, own)]
        values = np.concatenate(stack)
        assert line["accuracy"] == pytest.approx(accuracy_score(answers, values.argmax(1)))
        assert line["log_loss"] == pytest.approx(log_loss(answers, values, labels=range(4)), abs=1e-5)
    assert pd.read_csv(tmp_path / "oof" / "image_sizes.csv")["image_size"].tolist() == sizes[:3]

    flags_of_base = ["--base", trained / "args" / "fold0.json", "--oof", "--image_sizes", "56", "140"]
    assert script("predict", *flags_of_base, "--output_dir", tmp_path)[0] == 0
    report = json.loads((tmp_path / "base" / "oof" / "image_sizes.json").read_text())
    values, everything = probabilities_at(56, base.eval(), [*rows.values()], processor, ids), rows.values()
    assert report["sizes"][0]["log_loss"] == pytest.approx(
        log_loss([row["answer"] for row in everything], values, labels=range(4)), abs=1e-5
    )

    before, _ = len(scored), scored.clear()
    assert before and script("predict", *folds, *flags, "--oof", "--image_sizes", *sizes)[0] == 0 and not scored
    assert script("predict", *folds, *flags, "--image_sizes", 56)[0] == 0
    files = [str(tmp_path / f"{fold.name}.csv") for fold in folds]
    code, output, error = script("ensemble", *files)
    assert code == 0 and "no out-of-fold rows: " in output and "predicted at image size 56" in output, error
    assert script("predict", *folds, *flags, "--oof", "--image_sizes", 56)[0] == 0
    oof = load_oof(group_models(files))
    by_id = dict(
        zip(
            [row["id"] for fold in own for row in fold],
            np.concatenate([probabilities_at(56, *pair, processor, ids) for pair in zip(models, own)]),
        )
    )
    assert np.abs(oof.stack[0] - [by_id[i] for i in oof.ids]).max() < 1e-5
    assert read_card(files[0])["validation"] is None and "image_size" not in read_card(folds[0] / "oof.csv")


def test_fewer_rows_go_through_the_model_at_once_at_a_larger_size(folds):
    checkpoint = fold_checkpoint(folds[0])  # trained at 112, with batches of 16
    assert [checkpoint.at_image_size(size).batch_size for size in (56, 112, 224, 1120)] == [16, 16, 4, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_sizes", "56", "112"], "Add --oof, or give one size."),
        (["--oof", "--image_sizes", "56", "112", "--flip"], "Leave out the flags of other views."),
        (["--image_sizes", "20"], "--image_sizes must be at least 28."),
        (["--oof", "--image_sizes", "4000", "5000"], "all of them give every image the same grid"),
    ],
)
def test_sizes_that_cannot_be_compared_are_refused_before_a_model_is_loaded(
    script, folds, monkeypatch, flags, message
):
    monkeypatch.setattr(predictor, "load_base", lambda *args: pytest.fail("a model was loaded"))
    code, _, error = script("predict", folds[0], *flags)
    assert (code, error.count("\n")) == (2, 1) and message in error


def opinion(random, answers, rate):
    """Probabilities (rows, 4) of a model that is right at that rate, in answers that do not depend on others'."""
    letters = np.where(
        random.random(len(answers)) < rate, answers, (answers + random.integers(1, 4, len(answers))) % 4
    )
    return np.full((len(answers), 4), 0.1) + 0.6 * np.eye(4)[letters]


def test_the_gain_ends_at_the_first_size_that_no_later_one_beats():
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 600)
    low, high = opinion(random, answers, 0.6), opinion(random, answers, 0.75)
    assert first_unbeaten([low, high, high, high], answers) == 1
    assert first_unbeaten([low, low, low], answers) == 0 and first_unbeaten([high, low], answers) == 0
    # Each step corrects 15 of 600 rows, and breaks 8: nothing alone, a gain in three steps.
    steps, wrong = [low], np.flatnonzero(low.argmax(1) != answers)
    for number in range(3):
        after = steps[-1].copy()
        fixed = wrong[15 * number : 15 * number + 15]
        broken = np.flatnonzero(low.argmax(1) == answers)[8 * number : 8 * number + 8]
        after[fixed] = 0.1 + 0.6 * np.eye(4)[answers[fixed]]
        after[broken] = 0.1 + 0.6 * np.eye(4)[(answers[broken] + 1) % 4]
        steps.append(after)
    assert first_unbeaten(steps[:2], answers) == 0 and first_unbeaten(steps, answers) > 0


def test_costs_are_counted_on_the_training_rows_and_rise_with_the_size(folds, trained, processor):
    rows = read_rows(trained / "data" / "train.csv", with_answer=True)
    validated = set(read_predictions(folds[0] / "oof.csv")[0])
    checkpoint = replace(fold_checkpoint(folds[0]), dtype=torch.float16)
    costs = training_costs(processor, checkpoint, [row for row in rows if row["id"] in validated], [56, 112])
    train = [row for row in rows if row["id"] not in validated]
    for size, cost in costs.items():
        counted = [Collator(processor, size, with_answer=True)([row])["input_ids"].shape[1] for row in train]
        assert cost["tokens"] == pytest.approx(np.mean(counted))
    assert 0 < costs[56]["t4_hours"] <= costs[112]["t4_hours"] and 0 < costs[56]["t4_gib"] < costs[112]["t4_gib"]
