"""benchmarks/ladder.py: the rungs that it composes, and what it says of them."""

import importlib
import json
import sys

import ladder
import numpy as np
import pandas as pd
import pytest
from conftest import write_csv
from scipy.stats import binomtest

from vqa.core.errors import UserError
from vqa.evaluation.labels import Labels


@pytest.fixture
def here(monkeypatch):
    """The ladder's commands in this process, which has the libraries loaded; gives those that were run."""
    seen = []

    def run_command(words, log, jobs):
        seen.append(words)
        name = words[0].removesuffix(".py").replace("/", ".")
        monkeypatch.setattr(sys, "argv", [str(ladder.ROOT / words[0]), *words[1:]])
        importlib.import_module(name).main()

    monkeypatch.setattr(ladder, "run_command", run_command)
    monkeypatch.setattr(ladder, "FOLDS", 2)
    return seen


@pytest.mark.slow
def test_the_ladder_is_climbed_from_the_contest_to_the_table(here, script, tmp_path):
    flags = ["--seeds", "5", "--train_rows", "24", "--test_rows", "8", "--max_steps", "2", "--root", tmp_path]
    code, output, error = script("ladder", *flags)
    assert code == 0, error
    made = json.loads((tmp_path / "outputs/ladder/ladder.json").read_text())
    assert [line["rung"] for line in made["rungs"]] == [name for name, _ in ladder.COMPARED] and made["rows"] == {
        "train": 24,
        "test": 8,
    }
    assert [words[0] for words in here].count("train_fold.py") == 5
    text = (tmp_path / "outputs/ladder/ladder.md").read_text()
    assert all(name in text and name in output for name in ladder.RUNGS) and "python benchmarks/ladder.py" in text
    truth = pd.read_csv(tmp_path / "data/ladder/test_answers.csv")["answer"]
    lines = {line["rung"]: line for line in made["rungs"]}
    for name, file in (
        ("base model, untrained", "raw/base/base"),
        ("200 rows, one epoch", "raw/baseline"),
        ("one fold", "raw/fold0"),
        ("one fold, EMA", "ema/fold0"),
        ("one fold, SWA", "swa/fold0"),
    ):
        answers = pd.read_csv(tmp_path / f"outputs/ladder/5/{file}.csv")["answer"]
        assert lines[name]["accuracy"] == (answers == truth).mean(), name
    cards = {
        name: json.loads((tmp_path / f"outputs/ladder/5/{name}.json").read_text())
        for name in ("permutations/fold1", "larger/fold1")
    }
    views = ["plain", "rotation 1", "rotation 2", "rotation 3"]
    assert cards["permutations/fold1"]["views"] == views == cards["larger/fold1"]["views"]
    for weights in ladder.WEIGHTS:
        card = json.loads((tmp_path / f"outputs/ladder/5/{weights}/fold1.json").read_text())
        assert card["weights"] == weights and card["views"] == ["plain"]
    assert "larger" in cards["larger/fold1"]["adapter"]
    args = json.loads((tmp_path / "checkpoints/ladder/5/larger/fold1/args.json").read_text())
    assert (args["image_size"], args["fold"], args["seed"], args["max_steps"]) == (ladder.LARGER, 1, 5, 2)

    trained = (tmp_path / "checkpoints/ladder/5/fold0/metrics.json").stat().st_mtime_ns
    code, again, error = script("ladder", *flags)
    assert code == 0 and "is finished; nothing to train" in again and "is finished; nothing to predict" in again, error
    assert (tmp_path / "checkpoints/ladder/5/fold0/metrics.json").stat().st_mtime_ns == trained
    code, _, error = script("ladder", *flags[:4], "--test_rows", "9", *flags[6:])
    assert code == 2 and "delete that folder" in error.splitlines()[-1]


@pytest.fixture
def planted(tmp_path):
    """Rungs of three seeds on 300 rows: the base is worse, three folds by majority are better, all others are one."""
    random = np.random.default_rng(0)
    answers = random.integers(0, 4, 300)
    ids = [f"r{i}" for i in range(300)]
    write_csv(tmp_path / "answers.csv", [[a, "abcd"[b]] for a, b in zip(ids, answers)], ["id", "answer"])

    def values(skill):
        scores = random.normal(size=(300, 4))
        scores[np.arange(300), answers] += skill
        return np.exp(scores) / np.exp(scores).sum(1, keepdims=True)

    seeds = []
    for _ in range(3):
        same = values(1.0)
        others = {"base model, untrained": values(0.2), ladder.MAJORITY: values(2.5)}
        seeds.append([(ids, others.get(name, same)) for name in ladder.RUNGS])
    return seeds, Labels(tmp_path / "answers.csv"), answers


def test_a_rung_is_compared_with_the_one_it_is_built_on(planted):
    seeds, truth, answers = planted
    *lines, whole_way = ladder.compare_rungs(seeds, truth)
    table = {line["rung"]: line for line in lines}
    assert whole_way["against"] == "one fold" and whole_way["rung"] in table
    assert table["base model, untrained"].get("against") is None
    for name, line in table.items():
        assert line.get("against") == ladder.RUNGS[name]
        right = [(seed[list(ladder.RUNGS).index(name)][1].argmax(1) == answers) for seed in seeds]
        assert line["seeds"] == pytest.approx([own.mean() for own in right])
        assert line["accuracy"] == pytest.approx(np.mean(right)) and line["low"] < line["accuracy"] < line["high"]
    majority, weighted = table[ladder.MAJORITY], table["3 folds, weighted"]
    assert majority["verdict"] == "better" and majority["log_loss"] is None and majority["from"] > 0
    assert weighted["verdict"] == "within noise" and weighted["change"] == 0 and weighted["p"] == 1
    before = np.concatenate([seed[2][1].argmax(1) == answers for seed in seeds]).astype(int)
    after = np.concatenate([seed[5][1].argmax(1) == answers for seed in seeds]).astype(int)
    wanted = binomtest(int((after > before).sum()), int((after != before).sum())).pvalue
    assert majority["p"] == pytest.approx(wanted) and majority["change"] == pytest.approx((after - before).mean())


def test_three_seeds_on_the_same_rows_are_not_three_times_the_rows(planted):
    """Three seeds that answer alike say no more than one."""
    seeds, truth, _ = planted
    three = ladder.compare_rungs([seeds[0]] * 3, truth)
    one = ladder.compare_rungs([seeds[0]], truth)
    for alike, alone in zip(three, one):
        assert alike["high"] - alike["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.03)


@pytest.mark.slow
def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"`python summarize.py nowhere` failed with exit code 2; see .*said.log"):
        ladder.run_command(["summarize.py", "nowhere"], tmp_path / "said.log", 1)
    assert "error: nowhere: no fold" in (tmp_path / "said.log").read_text()
