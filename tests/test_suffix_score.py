"""Choices scored as suffixes of the question, against a forward pass of transformers for each choice."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from vqa.core.errors import UserError, run_main
from vqa.inference.checkpoints import fold_checkpoint
from vqa.inference.scoring import choice_probs, score_rows
from vqa.modeling.loading import add_adapter, load_base
from vqa.modeling.suffix_score import HEAD_FILE, SuffixCollator, add_score_head, load_score_head, suffix_scores
from vqa.training.checkpointing import COMPLETE, TimeLimitCallback
from vqa.training.loss import choice_loss


@pytest.fixture(scope="module")
def adapted():
    """The tiny model with an adapter and a head of random weights."""
    model = add_adapter(load_base(TINY, False, torch.float32), 4, 8, 0.0).eval()
    generator = torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    torch.nn.init.normal_(add_score_head(model).weight, generator=generator)
    return model


def ragged(rows: list[dict]) -> list[dict]:
    """Two, three and ten choices of one to many tokens; a row without an image, one with two, a shuffled one."""
    first, second, third, fourth = rows[:4]
    return [
        {**first, "choices": ["a big red circle <|im_end|>", "two"], "answer": 1},
        {
            **second,
            "choices": ["왼쪽", " left of the square", "0"],
            "answer": 0,
            "images": [],
            "permutation": [2, 0, 1],
        },
        {**third, "choices": [f"{'very ' * n}large" for n in range(10)], "answer": 7},
        {**fourth, "images": fourth["images"] * 2, "question": fourth["question"] * 2},
    ]


def separate_scores(model, collate: SuffixCollator, row: dict) -> torch.Tensor:
    """(choices,) in the order shown: one pass for each choice as the answer of the chat, cut before the turn's end."""
    scores, end = [], len(collate.processor.tokenizer("<|im_end|>\n").input_ids)
    for choice in row.get("permutation", range(len(row["choices"]))):
        text = row["choices"][choice].strip().replace("<|im_end|>", "<\u200b|im_end|>")
        batch = collate.encode([row], [text])
        inputs = {k: v for k, v in batch.items() if k not in ("ids", "num_images", "offered")}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, :-end]
        assert collate.processor.tokenizer.decode(inputs["input_ids"][0]).endswith(f"assistant\n{text}")
        hidden = model.get_base_model().model(**inputs).last_hidden_state
        scores.append((hidden[0, -1] * model.score_head.weight[0]).sum())
    return torch.stack(scores)


def test_scores_and_gradients_are_those_of_a_pass_for_each_choice(adapted, processor, rows):
    collate, losses, gradients = SuffixCollator(processor, 140, with_answer=True), [], []
    rows = ragged(rows)
    rows[3]["target"] = [0.1, 0.2, 0.3, 0.4]
    batch = collate(rows)
    together = suffix_scores(adapted, batch)
    separate = [separate_scores(adapted, collate, row) for row in rows]
    for row, scores, alone in zip(rows, together, separate):
        count = len(row["choices"])
        torch.testing.assert_close(scores[:count], alone, rtol=1e-5, atol=1e-5)
        assert (scores[count:] == -torch.inf).all()
    losses.append(choice_loss(together, batch["answer"], batch["target"]).mean())
    shown = [torch.tensor(1), torch.tensor(1), torch.tensor(7), torch.tensor(rows[3]["target"])]
    losses.append(torch.stack([cross_entropy(scores, label) for scores, label in zip(separate, shown)]).mean())
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    for loss in losses:
        adapted.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert "score_head.weight" in gradients[0]
    for name, gradient in gradients[0].items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5 * size, msg=name)


def test_the_order_of_the_choices_changes_nothing(adapted, processor, rows):
    collate = SuffixCollator(processor, 140)
    generator = np.random.default_rng(0)
    plain = score_rows(adapted, rows[:6], collate, [], batch_size=6)
    assert plain.sum(1) == pytest.approx(1) and plain.max() > 0.5 and (plain[:, 4:] == 0).all()
    for _ in range(3):
        orders = [generator.permutation(4).tolist() for _ in rows[:6]]
        written = [{**row, "choices": [row["choices"][i] for i in order]} for row, order in zip(rows, orders)]
        probs = choice_probs(adapted, written, collate, [], batch_size=6)
        for order, values, wanted in zip(orders, probs, plain):
            assert values[:4] == pytest.approx(wanted[order], abs=1e-12)
        shown = [{**row, "permutation": order} for row, order in zip(rows, orders)]
        assert score_rows(adapted, shown, collate, [], batch_size=6) == pytest.approx(plain, abs=1e-12)


def test_a_head_of_another_size_does_not_fit(adapted, tmp_path):
    save_file({"weight": torch.zeros(1, 8)}, tmp_path / HEAD_FILE)
    with pytest.raises(UserError, match=f"{HEAD_FILE} does not fit this base model"):
        load_score_head(adapted, tmp_path)


def run(name: str, *args) -> tuple[int, object]:
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            run_main(__import__(name).main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """A fold that scores suffixes. Not to be changed."""
    folder = tmp_path_factory.mktemp("suffix") / "fold0"
    assert run("train_fold", *flags(trained, folder)) == 0
    return folder


def flags(trained: Path, folder: Path) -> list:
    options = ["--score", "suffix", "--learning_rate", "1e-2", "--logging_steps", "1", "--lora_dropout", "0"]
    return [trained / "args" / "fold0.json", "--output_dir", folder, *options, "--resume_from_checkpoint", "auto"]


def test_training_begins_at_chance_and_lowers_the_loss(folder):
    logs = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert losses[0] == pytest.approx(math.log(4), abs=1e-6) and losses[-1] < losses[0] - 0.05
    for name in ("", "ema", "swa"):
        assert load_file(folder / name / HEAD_FILE)["weight"].abs().sum() > 0, name


def test_a_stopped_fold_ends_with_the_bytes_of_one_that_was_not(trained, folder, script, monkeypatch, tmp_path):
    part = tmp_path / "fold0"
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimitCallback, "is_late", lambda self: self.longest_step > 0)
        assert script("train_fold", *flags(trained, part), "--max_hours", "11")[0] == 3
    assert (part / "checkpoint-1" / COMPLETE).is_file()
    code, _, error = script("train_fold", *flags(trained, part))
    assert code == 0, error
    saved = ["checkpoint-4/adapter_model.safetensors", f"checkpoint-4/{HEAD_FILE}", "checkpoint-4/ema.safetensors"]
    for name in (*saved, HEAD_FILE, f"ema/{HEAD_FILE}", f"swa/{HEAD_FILE}", "oof.csv", "swa/oof.csv"):
        assert (part / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_predict_gives_the_probabilities_of_training(folder, script, tmp_path, weights):
    flags = ["--oof", "--weights", weights, "--num_permutations", 3, "--scales", 0.7, "--output_dir", tmp_path]
    code, said, error = script("predict", folder, *flags)
    assert code == 0 and "does not depend on the choices' order: --num_permutations adds no view" in said, error
    assert "scale 0.7" in said and "`generate` agrees" not in said and "offered letters" not in said
    card = json.loads((tmp_path / "oof" / "fold0.json").read_text())
    assert card["views"] == ["plain", "scale 0.7"] and card["letter_mass"] is None
    measured = pd.read_csv((folder if weights == "raw" else folder / weights) / "oof.csv", index_col="id")
    again = pd.read_csv(tmp_path / "oof" / "plain" / "fold0.csv", index_col="id").loc[measured.index]
    columns = [f"p_{letter}" for letter in "abcd"]
    assert np.abs(again[columns] - measured[columns]).max().max() < 1e-6


def test_other_attention_rules_are_refused_and_the_doctor_knows_the_score(trained, processor, script, tmp_path):
    args = trained / "args" / "fold0.json"
    code, said, error = script("doctor", args, "--score", "suffix")
    assert code == 0 and "score suffix: each choice is scored as the answer" in said, error
    model = make_family("qwen3_5", processor, tmp_path / "qwen3_5")
    flags = ["--score", "suffix", "--model", model]
    code, _, error = script("train_fold", args, *flags, "--output_dir", tmp_path / "fold0")
    assert (code, error.count("\n")) == (2, 1) and "score suffix: the attention of" in error
    assert "score suffix: the attention of" in script("doctor", args, *flags)[1]


def test_members_of_both_kinds_make_one_ensemble(trained, folder, script, tmp_path):
    files = []
    for name, fold in (("letter", trained / "checkpoints" / "fold0"), ("suffix", folder)):
        code, _, error = script("predict", fold, "--output_dir", tmp_path / name)
        assert code == 0, error
        files.append(tmp_path / name / "fold0.csv")
    code, said, error = script("ensemble", *files, "--output", tmp_path / "submission.csv")
    assert code == 0 and len(pd.read_csv(tmp_path / "submission.csv")) == 24, error


def test_peft_alone_loads_the_adapter(folder):
    base = AutoModelForImageTextToText.from_pretrained(TINY)
    model = PeftModel.from_pretrained(base, folder)
    loaded, stored = model.state_dict(), load_file(folder / "adapter_model.safetensors")
    assert stored and not any("score" in name for name in stored)
    for name, values in stored.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], values)


def test_a_head_that_is_missing_or_not_wanted_is_one_line(trained, folder, script, tmp_path):
    copy = tmp_path / "fold0"
    shutil.copytree(folder, copy)
    fingerprint = fold_checkpoint(copy, "raw").fingerprint("base")
    shutil.copy(folder / "ema" / HEAD_FILE, copy / HEAD_FILE)
    assert (
        fold_checkpoint(copy, "raw").fingerprint("base")
        != fingerprint
        == fold_checkpoint(folder, "raw").fingerprint("base")
    )
    (copy / HEAD_FILE).unlink()
    cases = [
        ([copy, "--weights", "raw"], f"score is suffix but {HEAD_FILE} is missing"),
        (["--base", folder / "args.json"], "--base: score suffix needs a trained head"),
        ([folder, trained / "checkpoints" / "fold1"], "fold0 has score suffix, fold1 letter"),
        ([adapter_of(folder, tmp_path), "--args", trained / "args" / "fold0.json"], "but score is letter"),
    ]
    for words, problem in cases:
        code, _, error = script("predict", *words, "--output_dir", tmp_path / "out")
        assert (code, error.count("\n")) == (2, 1) and problem in error


def adapter_of(folder: Path, tmp_path: Path) -> Path:
    """The exported files alone, as of another program."""
    (tmp_path / "alone").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", HEAD_FILE):
        shutil.copy(folder / name, tmp_path / "alone")
    return tmp_path / "alone"
