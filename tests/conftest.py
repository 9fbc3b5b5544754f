"""What the tests share: the tiny model, a contest of a few drawn rows, and a way to run the scripts."""

import atexit
import csv
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers take the log of the process that starts them
    os.environ["EXPERIMENTS_LOG"] = f"{tempfile.mkdtemp()}/log.csv"  # and not the log of whoever runs the tests
    atexit.register(shutil.rmtree, Path(os.environ["EXPERIMENTS_LOG"]).parent)

import pytest
import torch
from filelock import FileLock

from vqa.config.recipe import RecipeArguments
from vqa.core.errors import run_main
from vqa.data.collator import Collator
from vqa.data.prompt import LETTERS, letter_ids
from vqa.data.rows import read_rows
from vqa.data.synthetic import CONTEST, draw_row
from vqa.modeling.loading import add_adapter, load_base, load_processor
from vqa.training.dataset import TrainDataset
from vqa.training.trainer import FoldTrainer

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "checkpoints" / "tiny")
HEADER = ["id", "path", "question", "a", "b", "c", "d", "answer"]


@pytest.fixture(scope="session")
def processor():
    return load_processor(TINY)


@pytest.fixture(scope="session")
def ids(processor):
    return letter_ids(processor)


@pytest.fixture(scope="session")
def model():
    """The tiny base model, frozen. Tests that change it load their own."""
    return load_base(TINY, load_in_4bit=False, dtype=torch.float32).eval()


def write_csv(path: Path, rows: list[list[str]], header: list[str] = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def draw_contest(folder: Path, count: int, seed: int = 0) -> Path:
    """train.csv, test.csv (the same rows without answers), sample_submission.csv and pictures; answers even."""
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        image, row = draw_row(rng, CONTEST)
        image.save(folder / "pictures" / f"{number}.jpg")
        question, choices, answer = row["question"], row["choices"], row["answer"]
        wanted = number % 4
        choices[answer], choices[wanted] = choices[wanted], choices[answer]
        rows.append([f"row_{number:03d}", f"pictures/{number}.jpg", question, *choices, LETTERS[wanted]])
    write_csv(folder / "test.csv", [row[:-1] for row in rows], HEADER[:-1])
    write_csv(folder / "sample_submission.csv", [[row[0], "a"] for row in reversed(rows)], ["id", "answer"])
    return write_csv(folder / "train.csv", rows)


@pytest.fixture(scope="session")
def contest(tmp_path_factory) -> Path:
    """The folder of a contest of 24 rows. Not to be changed."""
    folder = tmp_path_factory.mktemp("contest") / "data"
    draw_contest(folder, 24)
    return folder


@pytest.fixture(scope="session")
def rows(contest) -> list[dict]:
    return read_rows(contest / "train.csv", with_answer=True)


@pytest.fixture
def make_trainer(processor, ids, rows, tmp_path):
    """A FoldTrainer of the tiny model on eight rows; fields are those of the recipe."""

    def make(callbacks=(), **fields) -> FoldTrainer:
        usual = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        recipe = RecipeArguments(**usual | {"use_cpu": True, "disable_tqdm": True, "eval_strategy": "no"} | fields)
        return FoldTrainer(
            add_adapter(load_base(TINY, False, torch.float32), 4, 8, 0.0),
            recipe,
            data_collator=Collator(processor, 112, with_answer=True),
            train_dataset=TrainDataset(rows[:8], True, 42),
            eval_dataset=[],
            callbacks=list(callbacks),
            weight_averages=[],
            letter_ids=ids,
            prompts=Collator(processor, 112),
        )

    return make


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script's main() with a command line, in this process: (exit code, stdout, stderr)."""

    def call(name: str, *args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            run_main(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def command(*words: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in words]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def pytest_collection_modifyitems(items):
    """Mark what needs trained folds as slow. Order the files so that two workers have work until the end.

    One worker begins with a file that trains the folds, the other one with slow files that do without them.
    """
    for item in items:
        if "trained" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    train = Counter(item.path for item in items if "trained" in item.fixturenames)
    first = train.most_common(1)[0][0] if train else None

    def rank(path: Path) -> int:
        return 0 if path == first else 2 if train[path] else 1 if slow[path] else 3

    items.sort(key=lambda item: (rank(item.path), -slow[item.path], item.path))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small contest whose two folds were trained by the README's command lines. Not to be changed."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return train_two_folds(tmp_path_factory.mktemp("job"))
    folder = tmp_path_factory.getbasetemp().parent / "job"  # one for all workers
    with FileLock(f"{folder}.lock"):
        if not (folder / "finished").exists():
            train_two_folds(folder)
            (folder / "finished").touch()
    return folder


def train_two_folds(folder: Path) -> Path:
    data = folder / "data"
    draw_contest(data, 24)
    base = {
        "model": TINY,
        "train_csv": str(data / "train.csv"),
        "test_csv": str(data / "test.csv"),
        "vision_cache_dir": str(folder / "vision_cache"),
        "image_size": 112,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        "ema_decay": 0.99,
        "swa_start": 0.5,
    }
    args = folder / "args"
    args.mkdir()
    (args / "base.json").write_text(json.dumps(base))
    for fold in (0, 1):
        path, output = args / f"fold{fold}.json", folder / "checkpoints" / f"fold{fold}"
        values = {"extends": "base.json", "fold": fold, "output_dir": str(output), "loss": ("token", "letter")[fold]}
        path.write_text(json.dumps(values))
    launch = ["-m", "accelerate.commands.launch", "train_fold.py", args / "fold0.json", args / "fold1.json"]
    for words in (["make_folds.py", args / "fold0.json", "--folds", "2"], launch):
        done = command(sys.executable, *words)
        assert done.returncode == 0, done.stderr
    return folder
