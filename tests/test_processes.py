"""Training in two processes against training in one: the same rows, weights, averages and out-of-fold file."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ENVIRONMENT, ROOT, TINY, draw_contest
from jobs import STEPS, distance_from_torch, train
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "args/accelerate/cpu.yaml"]
TRAIN_ROWS, VALID_ROWS, BATCH, EPOCHS = 9, 13, 4, 2  # neither divides evenly between two processes
STEPS_AN_EPOCH = -(-TRAIN_ROWS // BATCH)
SAVED = STEPS_AN_EPOCH + 1  # in the middle of the second epoch
RECIPE = {
    "model": TINY,
    "image_size": 112,
    "fold": 0,
    "max_train_rows": TRAIN_ROWS,
    "lora_dropout": 0.0,
    "num_train_epochs": EPOCHS,
    "effective_batch_size": BATCH,
    # With its usual epsilon AdamW moves a weight whose gradient is rounding noise as far as any other.
    "adam_epsilon": 1e-3,
    "learning_rate": 3e-3,
    "ema_decay": 0.99,
    "swa_start": 0.5,
    "max_grad_norm": 0,  # clipping would hide gradients that are off by a factor
    "save_strategy": "steps",
    "save_steps": SAVED,
    "logging_steps": 1,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this file are: records/ what was seen of each, runs/ what each wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "records").mkdir()
    draw_contest(folder / "data", 3 * VALID_ROWS)
    data = {"train_csv": str(folder / "data" / "train.csv"), "vision_cache_dir": str(folder / "vision_cache")}
    (folder / "args.json").write_text(json.dumps(RECIPE | data))
    return folder


def argv(folder: Path, name: str, *flags) -> list[str]:
    return [str(word) for word in (folder / "args.json", "--output_dir", folder / "runs" / name, *flags)]


@pytest.fixture(scope="module")
def one(folder):
    """One process: the folder of the run."""
    train(argv(folder, "one"), folder / "records" / "one.0")
    return folder / "runs" / "one"


@pytest.fixture(scope="module")
def launched(folder):
    """Two processes, started before `one` is asked for; gives what they printed."""
    import make_folds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_folds.py", str(folder / "args.json")])
        make_folds.main()
    checkpoint = folder / "runs" / "two" / f"checkpoint-{SAVED}"
    jobs = {
        "two": argv(folder, "two"),
        "resumed": argv(folder, "resumed", "--resume_from_checkpoint", checkpoint),
        "again": argv(folder, "two", "--resume_from_checkpoint", "auto"),
        "refused": argv(folder, "refused", "--fold", 7),
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    started = subprocess.Popen(
        [*LAUNCH, "tests/jobs.py", str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield started
    started.kill()


@pytest.fixture(scope="module")
def two(folder, launched, one):
    """Two processes beside `one`: the folder of the run."""
    output, _ = launched.communicate(timeout=300)
    (folder / "output.txt").write_text(output)
    assert launched.returncode == 0, output[-6000:]
    return folder / "runs" / "two"


def record(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / "records" / f"{name}.{rank}.json").read_text())


def largest_difference(left: Path, right: Path) -> float:
    a, b = load_file(left), load_file(right)
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def weights(run: Path, name: str = "") -> Path:
    return run / name / "adapter_model.safetensors"


def test_every_row_counts_once_an_epoch_and_repeats_not_at_all(folder, two):
    ids = {row_id for _, row_id, _ in record(folder, "one")["rows"]}
    assert len(ids) == TRAIN_ROWS and not ids & set(pd.read_csv(two / "oof.csv")["id"])
    for epoch in range(EPOCHS):
        ranks = [[row for row in record(folder, "two", rank)["rows"] if row[0] == epoch] for rank in (0, 1)]
        assert [len(rows) for rows in ranks] == [STEPS_AN_EPOCH * BATCH // 2] * 2
        counted = Counter(row_id for rows in ranks for _, row_id, weight in rows if weight == 1)
        assert counted == dict.fromkeys(ids, 1)
        repeats = [weight for rows in ranks for _, _, weight in rows if weight != 1]
        assert repeats == [0] * (STEPS_AN_EPOCH * BATCH - TRAIN_ROWS)


def test_the_adapter_is_that_of_one_process(one, two):
    fresh = load_file(weights(one))
    assert max(t.abs().max().item() for name, t in fresh.items() if "lora_B" in name) > 1e-3, "it has moved"
    for name in ("", "ema", "swa"):
        assert largest_difference(weights(one, name), weights(two, name)) < 1e-5, name
    checkpoint = f"checkpoint-{EPOCHS * STEPS_AN_EPOCH}"
    assert largest_difference(weights(one / checkpoint), weights(two / checkpoint)) < 1e-5


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averages_are_the_same_in_every_process_and_those_of_one(folder, two, name):
    files = [folder / "records" / f"{run}.{name}.safetensors" for run in ("two.0", "two.1", "one.0")]
    assert largest_difference(files[0], files[1]) == 0
    assert largest_difference(files[0], files[2]) < 1e-5


@pytest.mark.parametrize("name", ["", "ema", "swa"])
def test_the_out_of_fold_file_is_whole_in_order_and_that_of_one_process(folder, one, two, name):
    got, wanted = (pd.read_csv(run / name / "oof.csv") for run in (two, one))
    folds = pd.read_csv(folder / "data" / "folds.csv")
    assert list(got["id"]) == list(folds["id"][folds["fold"] == 0]) and len(got) == VALID_ROWS
    columns = ["p_a", "p_b", "p_c", "p_d"]
    assert np.abs(got[columns].to_numpy() - wanted[columns].to_numpy()).max() < 1e-5


def test_two_processes_go_on_from_a_checkpoint_to_the_same_bytes(folder, two):
    """The checkpoint lies in the middle of an epoch, so the rows left in it have to be the same ones."""
    assert record(folder, "resumed")["code"] == 0
    for rank in (0, 1):
        rows = record(folder, "two", rank)["rows"]
        assert record(folder, "resumed", rank)["rows"] == rows[SAVED * BATCH // 2 :]
    last = f"checkpoint-{EPOCHS * STEPS_AN_EPOCH}"
    for name in ("adapter_model.safetensors", "ema.safetensors", "swa.safetensors"):
        resumed, whole = (folder / "runs" / run / last / name for run in ("resumed", "two"))
        assert resumed.read_bytes() == whole.read_bytes(), name


def test_one_process_continues_what_two_began(folder, one, two):
    """The folder moves to a machine with one GPU, in the middle of an epoch: the same run, with the same result."""
    moved = folder / "runs" / "moved"
    shutil.copytree(two, moved, ignore=shutil.ignore_patterns("metrics.json", f"checkpoint-{EPOCHS * STEPS_AN_EPOCH}"))
    train(argv(folder, "moved", "--resume_from_checkpoint", "auto"), folder / "records" / "moved.0")
    rows = [record(folder, run)["rows"] for run in ("one", "moved")]
    assert record(folder, "moved")["code"] == 0 and sorted(rows[1]) == sorted(rows[0][SAVED * BATCH - 3 :])
    for name in ("", "ema", "swa"):
        assert largest_difference(weights(one, name), weights(moved, name)) < 1e-5, name


def test_only_the_first_process_writes(folder, two):
    first, second = ([Path(path).name for path in record(folder, "all", rank)["written"]] for rank in (0, 1))
    for name in ("args.json", "metrics.json", "best.json", "oof.csv"):
        assert any(name in path for path in first), "the watch sees what is written"
    # Each process keeps its random state in a checkpoint, so that a run that goes on draws the same numbers.
    assert [name for name in second if not name.startswith(("checkpoint-", "rng_state"))] == []
    assert not list((folder / "runs").rglob(".*")), "nothing temporary is left"


def test_messages_are_printed_once_and_an_error_is_one_line(folder, two):
    output = (folder / "output.txt").read_text().splitlines()
    steps = EPOCHS * STEPS_AN_EPOCH
    assert sum("  loss " in line for line in output) == steps + (steps - SAVED)  # two, and resumed
    assert sum(": best weights " in line for line in output) == 2
    assert sum("is finished; nothing to train" in line for line in output) == 1
    assert sum(line.startswith("error: ") for line in output) == 1
    assert sum("fold 7 is not in" in line for line in output) == 1
    assert [[record(folder, name, rank)["code"] for rank in (0, 1)] for name in ("again", "refused")] == [
        [0, 0],
        [2, 2],
    ]


def test_two_batches_of_two_are_one_of_four(folder, one):
    """Gradient accumulation; an epoch's last step has one batch of two only, in both."""
    half = ["--per_device_train_batch_size", BATCH // 2]
    train(argv(folder, "accumulated", *half), folder / "records" / "accumulated.0")
    assert record(folder, "accumulated")["code"] == 0
    for name in ("", "ema", "swa"):
        assert largest_difference(weights(one, name), weights(folder / "runs" / "accumulated", name)) < 1e-6, name


def test_accumulated_batches_of_different_sizes_count_by_their_rows(folder):
    """A step of 5 and 4 rows is one of 9: the mean of the two batches' means would not be the mean of the rows."""
    runs = []
    for size, rows in ((5, 10), (9, 9)):
        name, flags = f"by_{size}", ["--per_device_train_batch_size", size, "--effective_batch_size", rows]
        flags += ["--num_train_epochs", 3, "--ema_decay", 0, "--fold", "null"]
        train(argv(folder, name, *flags), folder / "records" / f"{name}.0")
        runs.append(folder / "runs" / name)
    assert largest_difference(weights(runs[0]), weights(runs[1])) < 1e-6


def test_averages_of_a_real_trainer_are_torchs(folder, tmp_path):
    """200 optimiser steps of two batches each, in one process."""
    distances = distance_from_torch(tmp_path)
    assert distances["moved"] > 0.1 and distances["ema_to_weights"] > 1e-4
    assert max(distances["ema"], distances["swa"]) < 1e-6, STEPS


def test_averages_of_two_processes_are_torchs(folder, two):
    for rank in (0, 1):
        distances = record(folder, "all", rank)["distances"]
        assert distances["moved"] > 0.1 and distances["ema_to_weights"] > 1e-4
        assert max(distances["ema"], distances["swa"]) < 1e-6


def test_full_determinism_gives_the_same_bytes_whatever_was_drawn_before(folder):
    files = {}
    flags = ["--full_determinism", "true", "--max_steps", 2, "--eval_strategy", "steps", "--eval_steps", 2]
    try:
        for name in ("first", "second"):
            torch.manual_seed(hash(name) % 1000)
            np.random.seed(len(name))
            train(argv(folder, name, *flags, "--lora_dropout", 0.1), folder / "records" / f"{name}.0")
            assert torch.are_deterministic_algorithms_enabled()
            run = folder / "runs" / name
            found = [p for p in run.rglob("*") if p.suffix in (".safetensors", ".csv")]
            files[name] = {str(path.relative_to(run)): path.read_bytes() for path in found}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert {"oof.csv", "ema/oof.csv", "swa/adapter_model.safetensors", "adapter_model.safetensors"} <= set(
        files["first"]
    )
    assert files["first"] == files["second"]


@pytest.mark.parametrize("path", sorted((ROOT / "args" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_is_valid_and_begins_with_its_command(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line.strip("# ") for line in comment if "accelerate launch" in line]
    for words in map(str.split, commands):
        assert words[words.index("--config_file") + 1] == str(path.relative_to(ROOT))
        launch = launch_command_parser().parse_args(words[2:])  # an unknown flag, or file, is an error here
        assert launch.training_script == "train_fold.py" and Path(ROOT, launch.training_script_args[0]).is_file()
    assert commands and load_config_from_file(str(path)).mixed_precision == "no", "the args file says fp16 or bf16"
