"""Choices scored as suffixes, in fp16 and 4 bits: training, validation and prediction."""

import gc
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import read_rows
from safetensors.torch import load_file

from vqa.inference.checkpoints import fold_checkpoint
from vqa.inference.predictor import Predictor
from vqa.inference.scoring import score_rows
from vqa.modeling.suffix_score import HEAD_FILE

from .conftest import HAS_CUDA, IN_4BIT, call

pytestmark = pytest.mark.gpu
PROBABILITIES = ["p_a", "p_b", "p_c", "p_d"]


@pytest.mark.parametrize("in_4bit", [False, True], ids=["16bit", "4bit"])
def test_a_fold_learns_and_predict_gives_its_probabilities_in_any_order_of_the_choices(job, in_4bit):
    if in_4bit and not IN_4BIT:
        pytest.skip("4 bits need CUDA")
    folder = job / "runs" / f"suffix_{in_4bit}"
    gc.collect()
    flags = ["--score", "suffix", "--load_in_4bit", in_4bit, "--gradient_checkpointing", in_4bit]
    call("train_fold", job / "args.json", "--output_dir", folder, *flags)
    history = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    losses = [logs["loss"] for logs in history if "loss" in logs]
    assert np.isfinite(losses).all() and losses[0] == pytest.approx(np.log(4), abs=1e-3)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    for name in ("", "ema", "swa", "checkpoint-20"):
        assert load_file(folder / name / HEAD_FILE)["weight"].dtype == torch.float32

    call("predict", folder, "--oof", "--weights", "ema", "--output_dir", job / "suffix")
    oof = pd.read_csv(folder / "ema" / "oof.csv", index_col="id")
    again = pd.read_csv(job / "suffix" / "oof" / f"{folder.name}.csv", index_col="id").loc[oof.index]
    assert np.abs(again[PROBABILITIES] - oof[PROBABILITIES]).max().max() < 2e-3

    predictor = Predictor(fold_checkpoint(folder, "ema"))
    model = predictor.load(predictor.first)
    rows = read_rows(job / "data" / "train.csv", with_answer=True)[:12]
    plain = score_rows(model, rows, predictor.collate, [], 12)
    shown = score_rows(model, [{**row, "permutation": [2, 0, 3, 1]} for row in rows], predictor.collate, [], 12)
    assert np.abs(plain - shown).max() < (1e-6 if HAS_CUDA else 1e-12)
