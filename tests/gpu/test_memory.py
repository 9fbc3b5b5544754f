"""The estimate of peak GPU memory against what torch allocates, for a model in the 3B's shape."""

import json
from pathlib import Path

import pytest

from .conftest import call

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def measurements(request, tmp_path_factory) -> list[dict]:
    """What benchmarks/memory.py measures at two pixel budgets."""
    shapes = request.config.getoption("--shapes", default=None)
    if shapes is None:
        pytest.skip("needs --shapes FOLDER with Qwen2.5-VL's config_3B.json and vocabulary")
    assert (Path(shapes) / "config_3B.json").is_file(), f"--shapes {shapes}: it contains no config_3B.json"
    folder = tmp_path_factory.mktemp("memory")
    sizes = ["--sizes", 384, 768, "--batches", 8]
    call("memory", "--configs", shapes, "--models", "3B", *sizes, "--folder", folder, "--output", folder / "lines")
    return [json.loads(line) for line in (folder / "lines").read_text().splitlines()]


def test_training_and_validation_peaks_are_estimated_within_15_percent(measurements):
    assert [line["image_size"] for line in measurements] == [384, 768]
    for line in measurements:
        assert line["averaged_steps"] > 0, "the optimiser and the averages hold their memory"
        assert line["ratio"] == pytest.approx(1, abs=0.15), line
        assert line["validation_ratio"] == pytest.approx(1, abs=0.15), line
