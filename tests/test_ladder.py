"""benchmarks/ladder.py: what it trains, how it compares the rungs, and whether its test can tell one point."""

import dataclasses
import json
import re
import sys
from concurrent.futures import Future
from pathlib import Path

import ladder
import numpy as np
import pandas as pd
import pytest
import rungs
from conftest import ROOT
from scipy.stats import ttest_1samp

from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.parser import field_names
from vqa.config.recipe import RecipeArguments
from vqa.core.errors import UserError

RESULT = ROOT / "benchmarks" / "results" / "ladder.json"


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["ladder.py", "--root", str(tmp_path), *map(str, words)])
        return ladder.parse_args()

    return parse


def commands(args) -> list[ladder.Command]:
    wanted = [file for name in args.rungs for file in ladder.RUNGS[name].files]
    return [c for seed in args.seeds for c in ladder.Seed(seed, Path(args.root), args, wanted).commands()]


def test_every_file_of_the_table_is_made_by_one_command_and_every_need_by_another(arguments):
    args = arguments()
    made = [path for command in commands(args) for path in command.makes]
    assert len(set(made)) == len(made)
    assert {need for command in commands(args) for need in command.needs} <= set(made)
    wanted = [file for rung in ladder.RUNGS.values() for file in rung.files]
    seed = ladder.Seed(42, Path(args.root), args, wanted)
    plain = {Path(*path.parts[:-1], "plain", path.name) for path in made if path.parent.name == "permutations"}
    assert {seed.file(file) for file in wanted} <= set(made) | plain


def test_every_rung_builds_on_a_rung_and_every_model_has_real_fields(arguments):
    assert {rung.before for rung in ladder.RUNGS.values()} - {None} <= set(ladder.RUNGS)
    fields = {name for run in rungs.RUNS.values() for name in run.fields}
    assert fields <= field_names()
    assert arguments("--rungs", "3 folds, 252 px").rungs == [
        "base model, untrained", "200 rows, one epoch", "one fold", "3 folds", "3 folds, 252 px"
    ]  # fmt: skip
    with pytest.raises(UserError, match="no rung four folds"):
        arguments("--rungs", "four folds")


def test_args_files_hold_the_seed_and_the_folders_of_its_own_models(arguments):
    args = arguments("--rungs", "soft targets of a teacher", "all rows, 3 seeds", "--seeds", 7)
    commands(args)
    folder = Path(args.root, "outputs/ladder/7/args")
    student, member = (json.loads((folder / f"{name}.json").read_text()) for name in ("student", "all_rows_seed2"))
    assert student["teacher"] == [f"{args.root}/checkpoints/ladder/7/fold{i}" for i in range(3)]
    assert (student["seed"], int(member["seed"]), member["fold"]) == (7, 72, None)


def test_the_gpus_are_those_that_are_visible_or_those_of_the_machine(arguments, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert arguments().gpus == [""]
    for printed, found in (("0\\n1\\n2", ["0", "1", "2"]), ("NVIDIA-SMI has failed", [""])):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{printed}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert arguments().gpus == found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert arguments().gpus == ["5", "7"] and arguments("--gpus", 1).gpus == ["5"]


def gaps(rng, seeds, rows, of_seed=0.0, of_row=0.0, effect=0.0):
    return (
        effect + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_row, rows) + rng.normal(0, 0.4, (seeds, rows))
    )


def test_the_difference_of_one_seed_is_a_t_test_over_rows():
    rng = np.random.default_rng(0)
    values = gaps(rng, 1, 500, effect=0.05)
    gap, oracle = ladder.compare_all({"a": values})["a"], ttest_1samp(values[0], 0)
    assert gap.p_value == pytest.approx(oracle.pvalue)
    assert gap.interval == pytest.approx(tuple(oracle.confidence_interval()))


def test_three_seeds_on_the_same_rows_are_not_three_times_the_rows():
    one = gaps(np.random.default_rng(0), 1, 500)
    alone, alike = ladder.compare_all({"a": one})["a"], ladder.compare_all({"a": np.repeat(one, 3, axis=0)})["a"]
    assert alike.error == pytest.approx(alone.error)


@pytest.mark.parametrize(("of_seed", "of_row"), [(0.0, 0.0), (0.0, 0.4), (0.03, 0.0), (0.03, 0.4)])
def test_an_effect_that_is_not_there_is_found_in_one_of_twenty(of_seed, of_row):
    """Whether the noise comes from the seeds, from the rows or from both."""
    rng, signs = np.random.default_rng(0), []
    for _ in range(60):
        many = {str(i): gaps(rng, 3, 300, of_seed, of_row) for i in range(20)}
        signs += [gap.sign != 0 for gap in ladder.compare_all(many).values()]
    assert np.mean(signs) < 0.075


def test_a_rung_whose_seeds_differ_much_neither_hides_the_others_nor_is_trusted_like_them():
    rng, found, wrong, unsure = np.random.default_rng(0), [], [], []
    for _ in range(40):
        many = {f"calm {i}": gaps(rng, 3, 2000, of_seed=0.004) for i in range(20)}
        many |= {f"real {i}": gaps(rng, 3, 2000, of_seed=0.004, effect=0.03) for i in range(5)}
        many |= {f"wild {i}": gaps(rng, 3, 2000, of_seed=0.1) for i in range(2)}
        signs = {name: gap.sign for name, gap in ladder.compare_all(many).items()}
        for kind, kept in (("calm", wrong), ("real", found), ("wild", unsure)):
            kept += [sign for name, sign in signs.items() if name.startswith(kind)]
    assert np.mean(np.abs(wrong)) < 0.075 and np.mean(found) > 0.9 and np.mean(np.abs(unsure)) < 0.12


def test_moderated_variances_are_between_their_own_and_the_common_one():
    rng = np.random.default_rng(0)
    alike, freedom = ladder.moderate(rng.chisquare(2, 400) / 2, 2)
    assert np.median(alike) == pytest.approx(1, rel=0.1) and np.median(freedom) > 10
    true = 10 / rng.chisquare(10, 4000)  # worth 10 degrees of freedom
    own = true * rng.chisquare(2, 4000) / 2
    moderated, freedom = ladder.moderate(own, 2)
    assert np.median(freedom) == pytest.approx(12, rel=0.25)
    assert np.abs(np.log(moderated / true)).mean() < 0.6 * np.abs(np.log(own / true)).mean()
    assert ladder.moderate(np.array([0.0, 1.0, 2.0, 1.5]), 2)[0][0] == 0, "models that are the same"


def models(seed: int, spread: float, count: int = 12, rows: int = 10_000) -> list[np.ndarray]:
    """Which rows each of `count` models has right: rows differ in difficulty, models by `spread` points."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=rows)
    return [0.9 * difficulty + 0.6 + rng.normal(0, spread / 32) + rng.normal(0, 0.4, rows) > 0 for _ in range(count)]


def test_the_check_finds_a_planted_point_and_no_effect_where_none_is():
    results = [ladder.check_test(models(seed, spread=0.1)) for seed in range(8)]
    assert np.mean([result["found"] for result in results]) > 9 and np.mean([r["rejected"] for r in results]) < 1
    unsure = [ladder.check_test(models(seed, spread=3.0)) for seed in range(8)]
    assert np.mean([result["found"] for result in unsure]) < 4, "models that differ by points hide a point"
    assert np.mean([result["rejected"] for result in unsure]) < 1.5


@pytest.fixture
def in_this_process(monkeypatch):
    """The ladder's commands run here, where the libraries are loaded."""

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *words):
            future = Future()
            future.set_result(function(*words))
            return future

    monkeypatch.setattr(ladder, "ProcessPoolExecutor", Pool)


@pytest.mark.slow
def test_the_ladder_is_climbed_from_the_contest_to_the_table(in_this_process, script, tmp_path):
    flags = ["--rungs", "200 rows, one epoch", "--seeds", "5", "6", "--train_rows", "48", "--test_rows", "12"]
    flags += ["--max_steps", "2", "--model", "checkpoints/tiny", "--root", tmp_path]
    code, output, error = script("ladder", *flags)
    assert code == 0, error
    made = json.loads((tmp_path / "outputs/ladder/ladder.json").read_text())
    lines = {line["rung"]: line for line in made["rungs"]}
    assert made["failed"] == [] and made["rows"] == {"train": 48, "test": 12}
    answers = pd.read_csv(tmp_path / "data/bench/test_answers.csv")["answer"]
    files = {"base model, untrained": "plain/base/base", "200 rows, one epoch": "plain/baseline"}
    for name, file in files.items():
        found = [pd.read_csv(tmp_path / f"outputs/ladder/{seed}/{file}.csv")["answer"] for seed in (5, 6)]
        assert lines[name]["seeds"] == pytest.approx([(own == answers).mean() for own in found]), name
        assert name in output
    table = (tmp_path / "outputs/ladder/ladder.md").read_text()
    assert "| 200 rows, one epoch |" in table and re.search(r"\| [+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\) \|", table)
    assert "python benchmarks/ladder.py" in output
    trained = (tmp_path / "checkpoints/ladder/5/baseline/metrics.json").stat().st_mtime_ns
    code, _, error = script("ladder", *flags)
    assert code == 0, error
    assert (tmp_path / "checkpoints/ladder/5/baseline/metrics.json").stat().st_mtime_ns == trained
    code, _, error = script("ladder", *[("13" if word == "12" else word) for word in flags])
    assert code == 2 and "Delete that folder" in error.splitlines()[-1]


@pytest.mark.slow
def test_a_command_that_fails_leaves_its_log_and_the_others_run(arguments, tmp_path, capfd):
    args = arguments("--jobs", 1)
    logs = [tmp_path / "logs" / f"{name}.log" for name in "ab"]
    failing = ladder.Command(["summarize.py", "nowhere"], [], [tmp_path / "never"], logs[0], 2)
    waiting = ladder.Command(["summarize.py", "--help"], [tmp_path / "never"], [tmp_path / "nor"], logs[1], 1)
    other = ladder.Command(["summarize.py", "--help"], [], [tmp_path / "x"], logs[1], 1)
    assert ladder.run_commands([failing, waiting, other], args) == [str(logs[0]), str(logs[1])]
    assert "error: nowhere: no fold" in logs[0].read_text() and "usage: summarize.py" in logs[1].read_text()
    assert "usage" not in capfd.readouterr().out


# The table in the README. What changes there is against one fold, or against the row above.
IN_README = ["base model, untrained", "one fold", "182 px", "252 px", "4 epochs", "3 folds", "EMA", "whole way"]


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_readme_shows_what_was_measured(page):
    lines = {line["rung"]: line for line in json.loads(RESULT.read_text())["rungs"]}
    table = re.findall(r"^\| [^|]+ \| ([\d.]+) % \|([^|]*)\|$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    assert [accuracy for accuracy, _ in table] == [f"{100 * lines[name]['accuracy']:.1f}" for name in IN_README]
    assert [change.strip() for _, change in table[2:]] == [shown(lines[name]) for name in IN_README[2:]]


def shown(line: dict) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * line[key] for key in ("change", "from", "to")))


def test_every_default_names_a_rung_with_its_measured_change():
    lines = {line["rung"]: line for line in json.loads(RESULT.read_text())["rungs"]}
    page = (ROOT / "docs" / "ladder.md").read_text()
    table = re.findall(r"^\| `([\w-]+)`[^|]* \| (\S+) \| ([^|]+) \| ([+-][\d.]+) \|$", page, re.MULTILINE)
    for name, default, rung, change in table:
        assert f"{100 * lines[rung]['change']:+.1f}" == change, name
        if not name.startswith("--"):
            assert default == json.dumps(default_of(name)).strip('"').removesuffix(".0"), name
    levers = {name for run in rungs.RUNS.values() for name in run.fields} - MEANS
    assert levers <= {name for name, *_ in table}
    for path in ROOT.glob("args/**/base.json"):
        if path.parent.name not in ("bench", "demo"):  # those have a small model's own recipe
            assert json.loads(path.read_text()).keys() - MEANS <= {name for name, *_ in table}, path


# What a run needs, and what goes with another field of the table.
MEANS = {"extends", "model", "seed", "init_adapter", "extra_weight", "lora_alpha", "max_train_rows", "learning_rate"}


def default_of(name: str):
    for fields in (ModelArguments, DataArguments, RecipeArguments):
        for field in dataclasses.fields(fields):
            if field.name == name:
                return field.default
    raise KeyError(name)
