"""run.sh, with stand-ins for python and accelerate that note what they are called with."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def loop(tmp_path):
    """Run run.sh in a folder of its own: (exit code, what was called, stderr)."""
    shutil.copytree(ROOT / "args", tmp_path / "args")
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "bin").mkdir()

    def call(*flags: str, training: int = 0):
        for name, code in (("python", 0), ("accelerate", training)):
            path = tmp_path / "bin" / name
            path.write_text(f'#!/bin/sh\necho {name} "$@" >> calls.txt\nexit {code}\n')
            path.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", "run.sh", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = tmp_path / "calls.txt"
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return call


def test_every_fold_is_trained_predicted_and_ensembled(loop):
    code, calls, error = loop("args", "--learning_rate", "1e-4")
    assert code == 0, error
    trained = [call for call in calls if call.startswith("accelerate launch") and "train_fold.py" in call]
    assert len(trained) == 3
    for fold, call in enumerate(trained):
        assert f"train_fold.py args/fold{fold}.json --learning_rate 1e-4" in call
        assert "--resume_from_checkpoint auto" in call
    assert sum("predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2" in call for call in calls) == 1
    assert any("ensemble.py outputs/fold0.csv outputs/fold1.csv outputs/fold2.csv" in call for call in calls)


def test_a_fold_that_was_stopped_is_the_last_one(loop):
    code, calls, _ = loop("args", training=1)
    assert code != 0
    assert sum(call.startswith("accelerate") for call in calls) == 1 and not any("predict" in call for call in calls)


@pytest.mark.parametrize(
    "flags", [["elsewhere"], ["args", "--output_dir", "x"], ["args", "--train_csv", "x.csv"], ["args", "--fold=1"]]
)
def test_what_would_split_the_steps_is_refused_in_one_line(loop, flags):
    code, calls, error = loop(*flags)
    assert (code, calls, error.count("\n")) == (2, [], 1)
