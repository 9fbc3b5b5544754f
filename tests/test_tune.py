"""tune.py: the study on disk, pruned and interrupted trials, and the args files of the best one.

Most tests use a stand-in for train_fold.py, whose log-loss is a known function of the learning rate.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import ROOT
from optuna.trial import TrialState

from vqa.config.args_file import read_args_file
from vqa.config.parser import parse_arguments
from vqa.core.errors import UserError
from vqa.evaluation.experiment_log import log_path, read_log
from vqa.training.search import claim_trial, default_space, open_study, read_space, to_flags

pytestmark = pytest.mark.slow

STAND_IN = """
import json, math, os, sys, time
flags = dict(word.split("=", 1) for word in sys.argv if "=" in word)
rate, folder = float(flags["--learning_rate"]), flags["--output_dir"]
loss = float(os.environ.get("LOSS") or 0.25 + abs(math.log10(rate / float(os.environ.get("BEST_RATE", 3e-3)))))
open(folder + "/pid", "w").write(str(os.getpid()))
if rate > float(os.environ.get("FAILS_ABOVE", 1)):
    sys.exit("error: it does not learn that fast")
history = [{"loss": 9.0, "epoch": 0.1}]
for step in (3, 2, 1):
    value = loss * step
    history.append({"eval_log_loss": value, "eval_ema_log_loss": value + 1, "eval_annotator_log_loss": 0.0})
    json.dump(history, open(folder + "/new", "w"))
    os.replace(folder + "/new", folder + "/history.json")
    if loss > float(os.environ.get("SLEEPS_ABOVE", 99)):
        time.sleep(60)
open(folder + "/adapter_model.safetensors", "w").write("weights")
json.dump({"best": "raw"}, open(folder + "/metrics.json", "w"))
right, wrong = str(math.exp(-loss)), str((1 - math.exp(-loss)) / 3)
lines = ["id,answer,p_a,p_b,p_c,p_d"]
for i in range(12):
    lines.append(f"row_{i:03d},a," + ",".join(right if j == i % 4 else wrong for j in range(4)))
open(folder + "/oof.csv", "w").write(chr(10).join(lines) + chr(10))
"""


def loss_at(rate: float) -> float:
    return 0.25 + abs(math.log10(rate / 3e-3))


@pytest.fixture
def search(tmp_path, contest, script, monkeypatch):
    """Runs tune.py with the stand-in on args of its own; (exit code, stdout, stderr)."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr("vqa.training.search.TRAIN", tmp_path / "train.py")
    monkeypatch.setattr("vqa.training.search.POLL_SECONDS", 0.01)
    folds = pd.DataFrame({"id": [f"row_{i:03d}" for i in range(24)], "fold": [i % 3 for i in range(24)]})
    folds.to_csv(tmp_path / "folds.csv", index=False)
    base = {"model": "tiny", "train_csv": str(contest / "train.csv"), "folds_csv": str(tmp_path / "folds.csv")}
    (tmp_path / "args").mkdir()
    (tmp_path / "args" / "base.json").write_text(json.dumps(base | {"learning_rate": 1e-3, "use_cpu": True}))
    (tmp_path / "args" / "fold1.json").write_text(json.dumps({"extends": "base.json", "fold": 1, "output_dir": "x"}))

    def call(trials: int, *flags: str) -> tuple[int, str, str]:
        args = [tmp_path / "args" / "fold1.json", "--trials", trials, "--output_dir", tmp_path / "study", *flags]
        return script("tune", *args)

    return call


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{folder / 'study' / 'study.db'}")


def test_the_best_trial_is_compared_with_the_unchanged_args_and_becomes_args_files(search, tmp_path):
    code, said, error = search(8)
    assert code == 0, error
    trials = study_of(tmp_path).trials
    assert len(trials) == 8 and trials[0].params["learning_rate"] == 1e-3 and trials[0].params["lora_rank"] == 16
    for trial in trials:
        loss = loss_at(trial.params["learning_rate"])
        assert trial.state == TrialState.PRUNED or trial.value == pytest.approx(loss)
        values = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
        assert values == pytest.approx([3 * loss, 2 * loss, loss][: len(values)])
    best = min((t for t in trials if t.value and t.state == TrialState.COMPLETE), key=lambda trial: trial.value)
    assert best.number > 0
    assert (
        f"trial {best.number} is the best: log-loss {best.value:.4f}, {loss_at(1e-3) - best.value:.4f} below" in said
    )
    assert f"paired on 12 rows: {best.value - loss_at(1e-3):+.4f}" in said and "beyond noise" in said
    for fold in range(3):
        tuned = read_args_file(tmp_path / "args" / "tuned" / f"fold{fold}.json")
        assert {name: tuned[name] for name in best.params} == best.params
        assert tuned["fold"] == fold and tuned["model"] == "tiny" and "output_dir" not in tuned
    assert (tmp_path / "study" / "importances.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "study").rglob("*.safetensors"))


def test_a_resumed_search_continues_to_the_number_of_trials_and_samples_new_values(search, tmp_path):
    search(4)
    before = study_of(tmp_path).trials
    code, said, _ = search(4)
    assert code == 0 and len(study_of(tmp_path).trials) == 4 and "the unchanged args" in said
    search(7)
    trials = study_of(tmp_path).trials
    assert len(trials) == 7 and [trial.params for trial in trials[:4]] == [trial.params for trial in before]
    rates = [trial.params["learning_rate"] for trial in trials]
    assert len(set(rates)) == 7  # a sampler with the same seed would sample the same values again


def test_where_nothing_is_better_it_says_so_and_writes_the_unchanged_args(search, tmp_path, monkeypatch):
    monkeypatch.setenv("LOSS", "0.5")
    code, said, error = search(2)
    assert code == 0 and "no trial has a lower log-loss than the unchanged args: 0.5000" in said, error
    assert read_args_file(tmp_path / "args" / "tuned" / "fold0.json")["learning_rate"] == 1e-3
    assert "no importances: 2 trials" in said


def test_a_trial_that_is_worse_than_the_median_is_pruned_and_its_process_killed(search, tmp_path, monkeypatch):
    """The stand-in sleeps for a minute after a bad validation."""
    space = tmp_path / "space.json"
    space.write_text(
        json.dumps({name: None for name in ("lora_rank", "lora_alpha", "ema_decay", "image_size", "loss")})
    )
    code, _, error = search(5, "--space", space)
    assert code == 0, error
    monkeypatch.setenv("LOSS", "0.9")
    monkeypatch.setenv("SLEEPS_ABOVE", "0.8")
    start = time.time()
    code, said, error = search(6, "--space", space)
    assert code == 0 and "pruned" in said and time.time() - start < 30, error
    last = study_of(tmp_path).trials[-1]
    assert last.state == TrialState.PRUNED and last.params.keys() == {
        "learning_rate",
        "num_train_epochs",
        "shuffle_choices",
    }
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "study" / f"trial{last.number}" / "pid").read_text()), 0)


def test_a_failed_trial_is_skipped_and_three_in_a_row_end_the_search(search, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_ABOVE", "0.002")
    code, said, error = search(6)
    states = [trial.state for trial in study_of(tmp_path).trials]
    assert TrialState.FAIL in states and states[0] == TrialState.COMPLETE
    assert states.count(TrialState.FAIL) == said.count(": failed") and (code == 0) == (
        states[-3:] != [TrialState.FAIL] * 3
    )
    monkeypatch.setenv("FAILS_ABOVE", "0")
    code, _, error = search(30)
    assert code == 2 and error.splitlines()[-1].endswith("failed: error: it does not learn that fast")
    assert [trial.state for trial in study_of(tmp_path).trials[-3:]] == [TrialState.FAIL] * 3


def test_the_search_stops_where_the_first_trial_fails_and_repeats_it_when_resumed(search, tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS_ABOVE", "0")
    code, _, error = search(3)
    assert code == 2 and "trial 0 failed: error: it does not learn that fast" in error
    monkeypatch.setenv("FAILS_ABOVE", "1")
    code, _, error = search(2)
    trials = study_of(tmp_path).trials
    assert code == 0 and len(trials) == 3 and trials[1].params == trials[0].params != trials[2].params, error


KILLED = """
import sys
from pathlib import Path
import vqa.training.search as search
from optuna.distributions import FloatDistribution
search.TRAIN = Path(sys.argv[1]) / "train.py"
space = {"learning_rate": FloatDistribution(1e-4, 1e-2)}
study = search.open_study(Path(sys.argv[1]) / "study", {}, 42)
while claimed := search.claim_trial(study, Path(sys.argv[1]) / "study", space, {"learning_rate": 1e-3}, 9):
    trial, lock = claimed
    with lock:
        state, value = search.run_trial(trial, ["args.json"], Path(sys.argv[1]) / "study" / f"trial{trial.number}")
        study.tell(trial, value, state)
"""


def test_a_killed_search_loses_no_finished_trial_and_its_running_one_is_marked_as_failed(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(STAND_IN)
    environment = os.environ | {"BEST_RATE": "1e-3", "SLEEPS_ABOVE": "0.2501", "PYTHONPATH": str(ROOT)}
    # No rate is as good as the default, so every later trial sleeps.
    killed = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, env=environment)
    for _ in range(600):
        time.sleep(0.1)
        if running := [pid for pid in (tmp_path / "study").glob("trial[1-9]*/pid")]:
            break
    (running,) = running
    child = int(running.read_text())
    number = int(running.parent.name.removeprefix("trial"))
    space = {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2)}
    study = open_study(tmp_path / "study", {}, 42)
    other, lock = claim_trial(study, tmp_path / "study", space, {"learning_rate": 1e-3}, 9)
    assert other.number == number + 1 and study.trials[number].state == TrialState.RUNNING  # beside a living one
    lock.lock.release()
    study.tell(other, 1.0)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    another, lock = claim_trial(study, tmp_path / "study", space, {"learning_rate": 1e-3}, 9)
    lock.lock.release()
    states = [trial.state for trial in study.trials]
    assert (
        states[number] == TrialState.FAIL and states[0] == TrialState.COMPLETE and states.count(TrialState.FAIL) == 1
    )
    assert study.trials[0].value == pytest.approx(0.25) and another.number == number + 2
    for _ in range(50):  # the training ends with the search
        time.sleep(0.1)
        if not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
    pytest.fail("the training of the killed search is still running")


VALUES = {
    "learning_rate": 2e-4,
    "num_train_epochs": 3.0,
    "image_size": 384,
    "lora_rank": 16,
    "lora_alpha": 32,
    "ema_decay": 0.999,
    "loss": "token",
    "shuffle_choices": True,
}


def test_the_default_space_holds_the_args_own_values():
    space = default_space(VALUES)
    assert space["learning_rate"] == {"low": 5e-5, "high": 8e-4, "log": True}
    assert space["ema_decay"] == [0.95, 0.98, 0.99, 0.995, 0.999] and space["image_size"] == [280, 384, 504]
    assert space["num_train_epochs"] == [2.0, 3.0, 4.0, 5.0] and "num_train_epochs" not in default_space(
        VALUES | {"max_steps": 9}
    )
    assert read_space(None, VALUES, set()).keys() == space.keys() == VALUES.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rnk": [1]}, "unknown fields lora_rnk"),
        ({"lora_rank": [8, 32]}, "lora_rank does not include 16, the value of the args"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-2}}, "does not include 0.0002, the value of the args"),
        ({"learning_rate": {"low": 1e-3}}, "learning_rate: .*high"),
        ({"lora_rank": 8}, "lora_rank: "),
        ({"weight_decay": [0.1]}, "weight_decay does not include None, the value of the args"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(tmp_path, given, message):
    path = tmp_path / "space.json"
    path.write_text(json.dumps(given))
    with pytest.raises(UserError, match=message) as error:
        read_space(str(path), VALUES, {*VALUES, "weight_decay"})
    assert "\n" not in str(error.value)


def test_a_search_with_other_args_is_not_resumed(search):
    assert search(1)[0] == 0
    code, _, error = search(2, "--seed", "7")
    assert (code, error.count("\n")) == (2, 1) and "already contains a search with a different seed" in error
    code, _, error = search(2, "--fold", "null")
    assert (code, error.count("\n")) == (2, 1) and "fold is null" in error


def test_every_sampled_value_arrives_unchanged_by_the_command_line(tmp_path):
    (tmp_path / "fold0.json").write_text(json.dumps({"model": "tiny", "learning_rate": 1e-3, "use_cpu": True}))
    params = {name: choice[0] for name, choice in default_space(VALUES).items() if isinstance(choice, list)}
    params |= {"learning_rate": 1.2345678901234567e-05, "swa_start": None}
    assert params["shuffle_choices"] is False and len(params) == len(VALUES) + 1
    *_, resolved = parse_arguments([str(tmp_path / "fold0.json"), *to_flags(params)], "")
    assert {name: resolved[name] for name in params} == params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "/input/My Models/Qwen2.5-VL-3B-Instruct"),
        ("model", "True"),
        ("instruction", "정답의 글자(A, B)만 쓰세요."),
        ("instruction", "--letter only"),
        ("instruction", "42"),
        ("instruction", ""),
        ("image_root", None),
        ("shuffle_choices", True),
    ],
)
def test_a_sampled_path_or_text_is_the_one_trained(tmp_path, field, value):
    """Case, spaces, a leading dash and what looks like a number, a boolean or null."""
    (tmp_path / "fold0.json").write_text(json.dumps({"model": "tiny", "image_root": "x", "use_cpu": True}))
    *_, resolved = parse_arguments([str(tmp_path / "fold0.json"), *to_flags({field: value})], "")
    assert resolved[field] == value and type(resolved[field]) is type(value)


def test_a_trial_trains_as_the_command_line_does(trained, script, tmp_path):
    """The first one is the fold that the README's command line trained, to the last digit."""
    args = [trained / "args" / "fold0.json", "--trials", "1", "--output_dir", tmp_path / "study"]
    code, said, error = script("tune", *args)
    assert code == 0, error
    (trial,) = study_of(tmp_path).trials
    trained_here, trained_there = tmp_path / "study" / "trial0", trained / "checkpoints" / "fold0"
    weights = json.loads((trained_there / "metrics.json").read_text())["weights"]
    assert trial.value == pytest.approx(min(scores["log_loss"] for scores in weights.values()), abs=1e-6)
    assert set(trial.intermediate_values) == {1, 2}  # of 4 steps, validated every 2
    columns = ["p_a", "p_b", "p_c", "p_d"]
    oof = [pd.read_csv(folder / "oof.csv")[columns] for folder in (trained_here, trained_there)]
    np.testing.assert_allclose(*oof, atol=1e-6)
    assert (trained_here / "swa" / "oof.csv").is_file() and not list(trained_here.rglob("*.safetensors"))
    assert str(trained_here) in set(read_log(log_path())["output"])
