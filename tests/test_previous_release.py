"""A fold that the previous release trained: today's code takes it as finished and predicts the same with it."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from vqa.config import same_run
from vqa.config.same_run import changed_fields

RELEASE = ROOT / "tests" / "data" / "previous_release"
FOLD = RELEASE / "checkpoints" / "fold0"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)  # the args name files relative to it


def files() -> dict:
    return {path: path.read_bytes() for path in FOLD.rglob("*") if path.is_file()}


def test_its_fold_is_finished(script):
    before = files()
    args = RELEASE.relative_to(ROOT) / "args" / "fold0.json"
    code, output, error = script("train_fold", args, "--resume_from_checkpoint", "auto")
    assert (code, output) == (0, f"{FOLD.relative_to(ROOT)} is finished; nothing to train\n"), error
    assert files() == before


def test_a_field_that_a_later_release_adds_does_not_make_it_another_run(monkeypatch):
    config = json.loads((FOLD / "args.json").read_text())
    older = {key: value for key, value in config.items() if key not in ("soft_labels", "save_total_limit")}
    assert changed_fields(older | {"a_field_that_was_removed": 1}, config) == []
    assert changed_fields(older, config | {"soft_labels": True}) == ["soft_labels"]
    assert changed_fields(config, config | {"seed": 1, "save_total_limit": 5, "output_dir": "moved"}) == ["seed"]
    assert changed_fields(config, config | {"warmup_steps": None}) == ["warmup_steps"]
    monkeypatch.setattr(same_run, "OLD_DEFAULTS", {"soft_labels": True})  # what that release did without the field
    assert changed_fields(older, config) == ["soft_labels"]


@pytest.mark.slow
def test_its_adapter_gives_the_probabilities_that_it_gave(script, tmp_path):
    code, _, error = script("predict", FOLD.relative_to(ROOT), "--num_permutations", 2, "--output_dir", tmp_path)
    assert code == 0, error
    new, old = (pd.read_csv(folder / "fold0.csv") for folder in (tmp_path, RELEASE / "outputs"))
    columns = ["p_a", "p_b", "p_c", "p_d"]
    assert list(new["id"]) == list(old["id"]) and list(new["answer"]) == list(old["answer"])
    assert np.abs(new[columns].to_numpy() - old[columns].to_numpy()).max() < 1e-6
