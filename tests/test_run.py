"""run.sh, with stand-ins for python and accelerate that note what they are called with."""

import os
import shutil
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT


@pytest.fixture
def loop(tmp_path):
    """Run run.sh in a folder of its own: (exit code, what was called, stderr)."""
    shutil.copytree(ROOT / "args", tmp_path / "args")
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "bin").mkdir()

    def call(*flags: str, training: int = 0, gpus: int = 0, smi: str = "", **variables: str):
        """`training`: exit code of train_fold.py. `gpus`: how many nvidia-smi lists; `smi`: what it does instead."""
        calls = tmp_path / "calls.txt"
        gpus_of = tmp_path / "gpus.txt"
        for path in (calls, gpus_of):
            path.unlink(missing_ok=True)
        note = (  # a moment of work, so that jobs overlap
            f'echo "$(basename $0) $*" >> {calls}; echo "$CUDA_VISIBLE_DEVICES: $*" >> {gpus_of}; '
            f'case "$*" in *train_fold.py*) sleep 0.2; exit {training};; esac'
        )
        for name, body in (("python", note), ("accelerate", note), ("nvidia-smi", smi or f"seq 0 {gpus - 1}")):
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\n{body}\n")
            path.chmod(0o755)
        cleared = {key: os.environ[key] for key in os.environ.keys() - {"CUDA_VISIBLE_DEVICES", "JOBS", "LABELS"}}
        environment = cleared | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"} | variables
        command = ["bash", "run.sh", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    call.folder = tmp_path
    return call


FILES = [f"args/fold{fold}.json" for fold in range(3)]


def test_every_fold_is_trained_predicted_and_ensembled(loop):
    code, calls, error = loop("args", "--learning_rate", "1e-4")
    assert code == 0, error
    train = f"python train_fold.py {' '.join(FILES)} --resume_from_checkpoint auto --learning_rate 1e-4"
    assert [call for call in calls if "train_fold.py" in call] == [train]
    predict = "predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2 --num_permutations 4"
    assert sum(predict in call for call in calls) == 1
    assert any("ensemble.py outputs/fold0.csv outputs/fold1.csv outputs/fold2.csv" in call for call in calls)


def test_several_folders_are_trained_one_after_the_other_and_ensembled(loop):
    for folder in ("outputs", "outputs/7b"):  # what predict.py would write
        (loop.folder / folder).mkdir(exist_ok=True)
        (loop.folder / folder / "fold0.csv").touch()
    code, calls, error = loop("args", "args/7b/", "--seed", "1")
    assert code == 0, error
    trained = [call for call in calls if "train_fold.py" in call]
    assert [call.split()[2] for call in trained] == ["args/fold0.json", "args/7b/fold0.json"]
    assert all("--seed 1" in call for call in trained)
    mixed = "python ensemble.py outputs/fold0.csv outputs/7b/fold0.csv --output outputs/mixed/submission.csv"
    assert calls[-1] == mixed


def test_all_rows_are_trained_with_each_seed_and_ensembled_with_folds(loop):
    (loop.folder / "outputs" / "all_rows").mkdir(parents=True)
    for name in ("fold0.csv", "all_rows/seed42.csv", "all_rows/seed43.csv"):
        (loop.folder / "outputs" / name).touch()
    code, calls, error = loop("args", "args/all_rows")
    assert code == 0, error
    files = " ".join(f"args/all_rows/seed{seed}.json" for seed in (42, 43, 44))
    assert f"python train_fold.py {files} --resume_from_checkpoint auto" in calls
    assert any("ensemble.py outputs/all_rows/seed42.csv outputs/all_rows/seed43.csv" in call for call in calls)
    mixed = "outputs/fold0.csv outputs/all_rows/seed42.csv outputs/all_rows/seed43.csv --output outputs/mixed"
    assert mixed in calls[-1]


def test_with_jobs_every_fold_has_a_process_of_its_own(loop):
    code, calls, error = loop("args/7b", "--seed", "1", JOBS="2")
    assert code == 0, error
    trained = sorted(call for call in calls if "train_fold.py" in call)
    assert trained == [
        f"python train_fold.py args/7b/fold{fold}.json --resume_from_checkpoint auto --seed 1" for fold in range(3)
    ]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_after_a_fold_that_was_stopped_nothing_is_predicted(loop, jobs):
    code, calls, _ = loop("args", training=3, JOBS=jobs)
    assert code == (3 if jobs == "1" else 124)  # 124: of xargs
    assert 1 <= sum("train_fold.py" in call for call in calls) <= int(jobs)
    assert not any("predict" in call for call in calls)


def test_each_fold_trains_on_a_gpu_of_its_own_and_all_gpus_predict(loop):
    def gpus_of(script: str) -> list[str]:
        lines = (loop.folder / "gpus.txt").read_text().splitlines()
        return sorted(line.split(": ")[0] for line in lines if script in line)

    def launcher(script: str = "train_fold.py", **options) -> str:
        code, calls, error = loop("args", **options)
        assert code == 0, error
        return next(call for call in calls if script in call).split(f" {script}")[0]

    assert launcher(gpus=0) == "python" and gpus_of("train_fold.py") == [""]
    assert launcher(gpus=1) == launcher(gpus=2, CUDA_VISIBLE_DEVICES="1") == "python"
    assert gpus_of("train_fold.py") == gpus_of("predict.py") == ["1"]
    assert launcher(gpus=3) == "python" and gpus_of("train_fold.py") == ["0", "1", "2"]
    assert launcher("predict.py", gpus=3).startswith("accelerate launch --multi_gpu --num_processes 3 ")
    assert launcher(gpus=2, CUDA_VISIBLE_DEVICES="5,7") == "python" and gpus_of("predict.py") == ["5,7"]
    assert set(gpus_of("train_fold.py")) == {"5", "7"} and len(gpus_of("train_fold.py")) == 3
    several = launcher(gpus=4, JOBS="2")
    options = "--num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    assert several == f"accelerate launch --multi_gpu --num_processes 2 {options}"  # accelerate warns of those missing
    assert set(gpus_of("train_fold.py")) == {"0,1", "2,3"}
    launch_command_parser().parse_args([*several.split()[2:], "train_fold.py"])
    assert launcher(gpus=3, JOBS="1").split()[4] == "2" and gpus_of("train_fold.py") == ["0,1"], "2 divides 16 rows"
    assert launcher(gpus=2, LAUNCH="accelerate launch x") == "accelerate launch x"


def test_a_driver_that_fails_counts_as_no_gpu(loop):
    assert "python train_fold.py" in " ".join(loop("args", smi="echo NVIDIA-SMI has failed; exit 9")[1])


@pytest.mark.parametrize("name", ["LABELS", "TRUTH"])
def test_known_labels_are_scored_with_the_untrained_base(loop, name):
    code, calls, error = loop("args", **{name: "answers.csv"})
    assert code == 0, error
    assert any("predict.py" in call and "--base checkpoints/fold0/args.json" in call for call in calls)
    assert any("summarize.py outputs --labels answers.csv" in call for call in calls)


@pytest.mark.parametrize(
    "flags", [["elsewhere"], ["args", "--output_dir", "x"], ["args", "--train_csv", "x.csv"], ["args", "--fold=1"]]
)
def test_what_would_split_the_steps_is_refused_in_one_line(loop, flags):
    code, calls, error = loop(*flags)
    assert (code, calls, error.count("\n")) == (2, [], 1)
