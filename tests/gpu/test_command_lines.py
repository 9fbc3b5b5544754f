"""train_fold.py and predict.py as they are typed: on one GPU, and on two by `accelerate launch`."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from .conftest import NUM_GPUS, ROWS, call
from .test_training import PROBABILITIES, best_weights

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two GPUs; torch.cuda.device_count() is {NUM_GPUS}")


def lora_b(run: Path) -> torch.Tensor:
    """All B matrices of a run's adapter in one vector."""
    adapter = load_file(run / "adapter_model.safetensors")
    return torch.cat([tensor.flatten() for name, tensor in sorted(adapter.items()) if "lora_B" in name])


def largest_difference(left: Path, right: Path) -> float:
    """Of the probabilities of two files, whose ids have to be the same in the same order."""
    a, b = pd.read_csv(left), pd.read_csv(right)
    assert list(a["id"]) == list(b["id"])
    return np.abs(a[PROBABILITIES].to_numpy() - b[PROBABILITIES].to_numpy()).max()


def test_a_fold_is_trained_and_predicted_by_the_command_lines(one_process, job):
    test = pd.read_csv(job / "data" / "test.csv")
    for path in (job / "outputs" / "one.csv", job / "outputs" / "plain" / "one.csv"):
        predictions = pd.read_csv(path)
        assert list(predictions["id"]) == list(test["id"]) and len(test) == ROWS
        np.testing.assert_allclose(predictions[PROBABILITIES].sum(axis=1), 1, atol=1e-5)
    assert (best_weights(one_process) / "oof.csv").is_file()


@two_gpus
def test_two_gpus_train_the_adapter_of_one(one_process, two_processes):
    assert torch.cosine_similarity(lora_b(one_process), lora_b(two_processes), dim=0) > 0.999
    for name in ("", "ema", "swa"):
        assert largest_difference(one_process / name / "oof.csv", two_processes / name / "oof.csv") < 0.01, name


@two_gpus
def test_two_gpus_predict_what_one_does(two_processes, job):
    call("predict", two_processes, "--num_permutations", 2, "--output_dir", job / "outputs_of_two_by_one")
    for name in ("two.csv", "plain/two.csv"):
        assert largest_difference(job / "outputs_of_two" / name, job / "outputs_of_two_by_one" / name) < 0.005, name
