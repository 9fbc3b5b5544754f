"""Full and read-only disks, and kill -9 in every stage of run.sh: one line, and nothing that was finished is lost."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT
from safetensors import SafetensorError

from vqa.config.arguments import DataArguments, folds_file
from vqa.core.errors import run_main
from vqa.core.io import is_writable
from vqa.training.validation import letter_metrics

# What the libraries raised on a full and on a read-only tmpfs.
FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
]
READ_ONLY = [
    OSError(30, "Read-only file system", "/data/x.json"),
    SafetensorError('I/O error: Read-only file system (os error 30) at path "/data/.tmpYBdcGa"'),
    RuntimeError("[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system"),
    PermissionError(13, "Permission denied", "/data/x.json"),
]


@pytest.mark.parametrize("error", FULL + READ_ONLY, ids=str)
def test_a_disk_that_is_full_or_read_only_is_one_line_with_the_remedy(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(fail)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and str(error) in line and "--output_dir" in line
    assert ("The disk is full" in line) == (error in FULL)


def test_other_errors_keep_their_traceback():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_main(fail)


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
SCRIPT = """
import os, sys
from pathlib import Path
from vqa.config.arguments import DataArguments, folds_file
from vqa.core.errors import run_main
from vqa.core.io import check_writable, write_json

full, contest = map(Path, sys.argv[1:])
write_json(full / "x.json", "complete")
try:
    run_main(lambda: write_json(full / "x.json", "x" * 10**6))
except SystemExit as stop:
    assert stop.code == 2
assert (full / "x.json").read_text() == '"complete"\\n' and os.listdir(full) == ["x.json"]
print(folds_file(DataArguments(train_csv=str(contest / "train.csv"))))
run_main(lambda: check_writable(contest / "new" / "fold0", "--output_dir"))
"""


def test_real_disks_that_are_full_and_read_only(tmp_path):
    """In a mount namespace, since a file's mode does not stop root."""
    full, contest = tmp_path / "full", tmp_path / "my-contest"
    full.mkdir()
    contest.mkdir()
    mount = f"mount -t tmpfs -o size=64k tmpfs {full} && mount --bind {contest} {contest} && mount -o remount,ro,bind"
    mount += f" {contest}"
    if subprocess.run([*NAMESPACE, mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mount namespaces")
    words = [*NAMESPACE, f'{mount} && exec "$@"', "sh", sys.executable, "-c", SCRIPT, full, contest]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "outputs/folds/my-contest.csv\n"), done.stderr
    first, second = done.stderr.splitlines()
    assert "No space left on device" in first and "The disk is full" in first
    assert f"{contest}/new/fold0: read-only" in second and "Set --output_dir" in second


def test_a_folds_file_in_a_read_only_contest_is_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert is_writable(tmp_path / "new" / "er") and not is_writable(tmp_path / "file" / "new")
    monkeypatch.setattr("vqa.config.arguments.is_writable", lambda folder: False)
    data = DataArguments(train_csv=str(tmp_path / "train.csv"))
    assert folds_file(data).parts[:2] == ("outputs", "folds")
    (tmp_path / "folds.csv").touch()
    assert folds_file(data) == tmp_path / "folds.csv"


def test_validation_needs_no_folder_in_hf_home(monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", "/proc/no/such/folder")
    assert letter_metrics([[0.9, 0.1], [0.2, 0.8]], [0, 1])["accuracy"] == 1


# Forks a child for each (argv, write): it runs a script and is killed by SIGKILL just before that many files are in
# place; 0: it runs to its end. One process, so that torch is imported once.
STAGES = """
import importlib, json, os, signal, sys
import datasets, sklearn.model_selection, torch, transformers
import train_fold, predict, ensemble, make_folds
from vqa.core.errors import run_main

for argv, write in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        left, replace = iter(range(write - 1, -1, -1)), os.replace
        def replace_or_die(*paths):
            if write and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
        os.replace, sys.argv = replace_or_die, argv
        run_main(importlib.import_module(argv[0]).main)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == (signal.SIGKILL if write else 0), (argv, write, status)
"""


@pytest.mark.slow
def test_kill_9_in_every_stage_loses_nothing(trained, tmp_path):
    """Each stage is killed and started again by the same command, and ends as in a run that was never killed."""
    shutil.copytree(trained / "data", tmp_path / "data", ignore=shutil.ignore_patterns("folds.csv"))
    fold, outputs = tmp_path / "checkpoints" / "fold0", tmp_path / "outputs"
    args = json.loads((trained / "args" / "base.json").read_text())
    args |= {name: str(tmp_path / "data" / f"{name[:-4]}.csv") for name in ("train_csv", "test_csv")}
    (tmp_path / "args.json").write_text(json.dumps(args | {"fold": 0, "output_dir": str(fold)}))
    train = ["train_fold", tmp_path / "args.json", "--resume_from_checkpoint", "auto"]
    stages = [
        (["make_folds", tmp_path / "args.json", "--folds", "2"], [1]),
        (train, [14]),  # amid the adapters of a validation
        (["predict", fold, "--output_dir", outputs, "--num_permutations", "2"], [3]),
        (["ensemble", outputs / "fold0.csv"], [1]),
    ]
    runs = [(list(map(str, argv)), write) for argv, writes in stages for write in (*writes, 0)]
    environment = ENVIRONMENT | {"HF_HOME": "/proc/no/such/folder", "EXPERIMENTS_LOG": str(tmp_path / "log.csv")}
    words = [sys.executable, "-c", STAGES, json.dumps(runs)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = trained / "checkpoints" / "fold0"
    names = [
        f"{weights}{name}" for weights in ("", "ema/", "swa/") for name in ("adapter_model.safetensors", "oof.csv")
    ]
    for name in [*names, "checkpoint-4/ema.safetensors"]:
        assert (fold / name).read_bytes() == (whole / name).read_bytes(), name
    assert (tmp_path / "data" / "folds.csv").read_bytes() == (trained / "data" / "folds.csv").read_bytes()
    assert len((outputs / "submission.csv").read_text().splitlines()) == 25
