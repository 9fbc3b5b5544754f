"""Newer families in their real shapes with random weights: 20 steps, prediction, and the memory estimate.

    python -m pytest -q tests/gpu/test_families.py --shapes SHAPES --vocabulary QWEN_FOLDER

SHAPES holds config_qwen3_vl_4B.json and so on. benchmarks/models.py does the work, under 14.5 GiB. Weights are written
on the GPU: a model takes about a minute. FAMILIES="qwen3_vl_4B qwen3_5_9B" chooses some of them.
"""

import gc
import json
import math
import os
from pathlib import Path

import pytest
import torch

from .conftest import call

pytestmark = pytest.mark.gpu
SHAPES = os.environ.get("FAMILIES", "qwen3_vl_4B qwen3_vl_8B qwen3_5_4B qwen3_5_9B").split()


@pytest.fixture(autouse=True)
def all_memory_afterwards():
    """benchmarks/models.py limits the memory of the process."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_family_trains_and_predicts_under_the_memory_of_a_t4(request, tmp_path, shape):
    shapes, vocabulary = (request.config.getoption(name, default=None) for name in ("--shapes", "--vocabulary"))
    if shapes is None or not Path(shapes, f"config_{shape}.json").is_file():
        pytest.skip(f"needs --shapes FOLDER with config_{shape}.json, and --vocabulary")
    words = [Path(shapes, f"config_{shape}.json"), "--vocabulary", vocabulary or shapes, "--sizes", 384]
    call("models", *words, "--rows", 32, "--steps", 20, "--output", tmp_path / "lines")
    (line,) = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert "failed" not in line, line
    assert line["steps"] == 20 and line["peak_gib"] < 14.5 and math.isfinite(line["rows_per_second"]), line
    assert line["estimate"] == pytest.approx(1, abs=0.15), line
    assert line["letters, batch 16"] > 0, line
