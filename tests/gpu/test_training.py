"""fp16 training, validation and prediction of the tiny model by the scripts' main(), and what they read from disk."""

import gc
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from .conftest import DEVICE, FP16, HAS_CUDA, IN_4BIT, call

pytestmark = pytest.mark.gpu
GIB = 2**30
PROBABILITIES = ["p_a", "p_b", "p_c", "p_d"]


@pytest.fixture(scope="module", params=[False, True], ids=["16bit", "4bit"])
def run(request, job) -> Path:
    """The folder of a fold that was trained for 20 steps."""
    if request.param and not IN_4BIT:
        pytest.skip("4 bits need CUDA")
    folder = job / "runs" / f"in_process_{request.param}"
    gc.collect()  # an earlier test's Trainer refers to itself, and to its model
    if HAS_CUDA:
        torch.empty(2 * GIB, dtype=torch.uint8, device=DEVICE)  # the peak of what this process did before
    call("train_fold", job / "args.json", "--output_dir", folder, "--load_in_4bit", request.param)
    return folder


def best_weights(run: Path) -> Path:
    best = json.loads((run / "metrics.json").read_text())["best"]
    return run if best == "raw" else run / best


def probabilities(path: Path, ids) -> np.ndarray:
    return pd.read_csv(path).set_index("id").loc[ids, PROBABILITIES].to_numpy()


def test_fp16_training_is_finite_and_its_loss_falls(run):
    history = json.loads((run / "checkpoint-20" / "trainer_state.json").read_text())["log_history"]
    losses = [logs["loss"] for logs in history if "loss" in logs]
    assert len(losses) == 20 and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_the_loss_scaler_is_in_use_and_skips_few_steps(run):
    assert json.loads((run / "metrics.json").read_text())["skipped_steps"] <= 1
    if FP16:
        scaler = torch.load(run / "checkpoint-20" / "scaler.pt", weights_only=True)
        assert scaler["scale"] >= 2**8


@pytest.mark.skipif(not HAS_CUDA, reason="the peak is that of a GPU")
def test_the_peak_memory_is_that_of_this_run(run):
    assert 0 < json.loads((run / "metrics.json").read_text())["peak_gpu_gib"] < 1


def test_adapters_are_float32_and_have_moved(run):
    for name in ("", "ema", "swa", "checkpoint-20"):
        adapter = load_file(run / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
        assert all(tensor.isfinite().all() for tensor in adapter.values())
        assert max(tensor.abs().max() for key, tensor in adapter.items() if "lora_B" in key) > 1e-3


def test_validation_gives_the_probabilities_of_predict(run, job):
    oof = pd.read_csv(best_weights(run) / "oof.csv")
    rows = pd.read_csv(job / "data" / "train.csv").set_index("id").loc[oof["id"]].reset_index()
    rows.to_csv(job / "data" / "valid.csv", index=False)
    call("predict", run, "--csv", job / "data" / "valid.csv", "--output_dir", job / "valid")
    predicted = probabilities(job / "valid" / f"{run.name}.csv", oof["id"])
    assert np.abs(predicted - oof[PROBABILITIES].to_numpy()).max() < 2e-3
    card = json.loads((job / "valid" / f"{run.name}.json").read_text())
    generate = card["generate"]  # with this loss the likeliest token of all may be no letter, so some disagree
    assert generate["agreeing"] > generate["rows"] / 2 > 0


def test_stored_features_give_the_logits_of_pixels_in_fp16(folder, rows, ids, tmp_path):
    from vqa.config.arguments import DataArguments
    from vqa.core.dtypes import half_autocast
    from vqa.data.collator import Collator
    from vqa.inference.scoring import answer_logits, score_rows
    from vqa.modeling.feature_store import open_feature_store
    from vqa.modeling.loading import load_base, load_processor

    model, processor = load_base(folder, False, torch.float16).eval(), load_processor(folder)
    data = DataArguments(image_size=112, vision_cache_dir=str(tmp_path))
    store = open_feature_store(model, processor, data, [rows], show=False)
    assert store.dtype == torch.float16 and store.holds(rows)
    collators = [Collator(processor, 112, features=features) for features in (None, store)]
    logits = []
    for collate in collators:
        batch = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in collate(rows[:8]).items()}
        with torch.no_grad(), half_autocast(model):
            logits.append(answer_logits(model, batch)[:, -1])
    assert "image_features" in batch and "pixel_values" not in batch
    # Other images are encoded in the same batch, so the last bits may differ.
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 5e-3
    probs = [score_rows(model, rows, collate, ids, 8) for collate in collators]
    assert np.abs(probs[0] - probs[1]).max() < 5e-3
