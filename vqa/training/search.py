"""The search of tune.py: what is searched, the study on disk, and how one trial of it runs.

The study is an SQLite file that several launches may share. A trial runs as long as a living process holds its lock,
so one whose process was killed is known at once, and marked as failed.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
from filelock import AcquireReturnProxy, FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from vqa.core.errors import UserError, preview
from vqa.core.io import read_json

TRAIN = Path(__file__).resolve().parent.parent.parent / "train_fold.py"


POLL_SECONDS = 0.5


OVER = (TrialState.COMPLETE, TrialState.PRUNED)


DEFAULT = "default"  # marks the trial of the unchanged args


VALIDATED = ("eval_log_loss", "eval_ema_log_loss", "eval_swa_log_loss")


def default_space(values: Mapping) -> dict[str, list | dict]:
    """What is searched unless told otherwise, around the args' own values; in the form of a space file."""
    rate, epochs, size = (values[name] for name in ("learning_rate", "num_train_epochs", "image_size"))
    rank, alpha = values["lora_rank"], values["lora_alpha"]
    space = {
        "learning_rate": {"low": rate / 4, "high": rate * 4, "log": True},
        "lora_rank": [max(1, rank // 2), rank, rank * 2],
        "lora_alpha": [max(1, alpha // 2), alpha, alpha * 2],
        "num_train_epochs": [max(1.0, epochs - 1), epochs, epochs + 1, epochs + 2],
        "ema_decay": [0.95, 0.98, 0.99, 0.995, values["ema_decay"]],
        "image_size": [round(size * 0.75 / 28) * 28, size, round(size * 1.33 / 28) * 28],
        "loss": ["token", "letter"],
        "shuffle_choices": [True, False],
    }
    if (values.get("max_steps") or 0) > 0:  # then epochs change nothing
        del space["num_train_epochs"]
    return {name: sorted(set(choice)) if isinstance(choice, list) else choice for name, choice in space.items()}


def read_space(path: str | None, values: Mapping, known: set[str]) -> dict[str, BaseDistribution]:
    """The default space with the file's fields in place of its own; null takes one out, so that it stays as it is."""
    given = read_json(path) if path else {}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"{path}: no fields of training: {preview(unknown)}; see `python train_fold.py --help`")
    space = {name: choice for name, choice in (default_space(values) | given).items() if choice is not None}
    found = {}
    for name, choice in space.items():
        try:
            found[name] = as_distribution(choice)
        except (AttributeError, TypeError, ValueError) as error:
            remedy = 'give a list of values, or {"low": 1e-5, "high": 1e-3, "log": true}'
            raise UserError(f"{path}: {name}: {error}; {remedy}") from None
        own = values.get(name)
        if own not in choice if isinstance(choice, list) else not choice["low"] <= (own or 0) <= choice["high"]:
            raise UserError(
                f"{path or 'the default space'}: {name} does not hold the args' own value {own!r}, which is what all "
                "else is measured against; add it"
            )
    return found


def as_distribution(choice: list | dict) -> BaseDistribution:
    if isinstance(choice, list):
        return CategoricalDistribution(choice)
    whole = all(isinstance(choice.get(name), int) for name in ("low", "high"))
    return (IntDistribution if whole else FloatDistribution)(**choice)


def open_study(folder: Path, asked: Mapping, seed: int) -> optuna.Study:
    """The study in `folder`, made where there is none; refused where it is one of other args or another space.

    Each launch draws by a seed of its own: by the same one, a restarted search would draw what it drew before.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # tune.py says how each trial ended
    folder.mkdir(parents=True, exist_ok=True)
    with study_lock(folder):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="tune",
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        asked = json.loads(json.dumps(asked, default=str))
        before, launches = study.user_attrs.get("asked", asked), study.user_attrs.get("launches", 0)
        if differing := sorted(name for name in before.keys() | asked.keys() if before.get(name) != asked.get(name)):
            raise UserError(
                f"{folder} holds a search with another {preview(differing)}; go on with the same, or give another "
                "--output_dir"
            )
        study.set_user_attr("asked", asked)
        study.set_user_attr("launches", launches + 1)
        study.sampler = optuna.samplers.TPESampler(seed=seed + launches)
    return study


def study_lock(folder: Path) -> FileLock:
    return FileLock(folder / "study.lock")


def trial_lock(folder: Path, number: int) -> FileLock:
    return FileLock(folder / f"trial{number}.lock")


def claim_trial(
    study: optuna.Study, folder: Path, space: Mapping[str, BaseDistribution], defaults: Mapping, most: int
) -> tuple[Trial, AcquireReturnProxy] | None:
    """The next trial and its held lock; None where `most` are over or running. The first one is of `defaults`."""
    with study_lock(folder):
        fail_interrupted_trials(study, folder)
        trials = study.get_trials(deepcopy=False, states=(*OVER, TrialState.RUNNING, TrialState.WAITING))
        if sum(trial.state != TrialState.WAITING for trial in trials) >= most:
            return None
        if not any(trial.user_attrs.get(DEFAULT) for trial in trials):
            study.enqueue_trial({name: defaults[name] for name in space}, {DEFAULT: True})
        trial = study.ask(space)
        return trial, trial_lock(folder, trial.number).acquire()


def fail_interrupted_trials(study: optuna.Study, folder: Path) -> None:
    """Mark as failed the running trials whose lock nobody holds."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with trial_lock(folder, trial.number).acquire(timeout=0):
                study.tell(trial.number, state=TrialState.FAIL)
                print(f"trial {trial.number} was cut off; it is marked as failed")
        except Timeout:
            pass


def run_trial(trial: Trial, flags: list[str], folder: Path) -> tuple[TrialState, float | None]:
    """Train by the command line in `folder`, its output going to train.log; (how it ended, its lowest log-loss).

    What each validation gives is reported, and a trial that by then does worse than most did is ended. The adapters
    are removed: those of thirty trials would fill a notebook's disk.
    """
    command = [sys.executable, str(TRAIN), *flags, *as_flags(trial.params), "--output_dir", str(folder)]
    command += ["--save_strategy", "no", "--max_hours", "null"]  # a trial is not gone on with
    folder.mkdir(parents=True, exist_ok=True)
    seen = []
    with open(folder / "train.log", "wb") as log:
        process = subprocess.Popen(die_with_parent(command), stdout=log, stderr=subprocess.STDOUT)
        try:
            while (code := process.poll()) is None:
                time.sleep(POLL_SECONDS)
                report(trial, folder, seen)
                if DEFAULT not in trial.user_attrs and trial.should_prune():
                    return TrialState.PRUNED, None
        finally:
            process.kill()
            process.wait()
            for weights in folder.rglob("adapter_model.safetensors"):
                weights.unlink()
    report(trial, folder, seen)
    return (TrialState.COMPLETE, min(seen)) if code == 0 else (TrialState.FAIL, None)


def as_flags(params: Mapping) -> list[str]:
    """Fields and their values as a command line has them."""
    return [word for name, value in params.items() for word in (f"--{name}", str(value).lower())]


def die_with_parent(command: list[str]) -> list[str]:
    """The command, ended by the system when this process is killed; it would go on and keep the GPU otherwise."""
    return ["setpriv", "--pdeathsig", "KILL", *command] if shutil.which("setpriv") else command


def report(trial: Trial, folder: Path, seen: list[float]) -> None:
    """Tell the study of the validations that `seen` does not hold yet: the lowest log-loss of raw, EMA and SWA."""
    history = read_json(folder / "history.json") if (folder / "history.json").is_file() else []
    values = [min(entry[name] for name in VALIDATED if name in entry) for entry in history if VALIDATED[0] in entry]
    for value in values[len(seen) :]:
        seen.append(value)
        trial.report(value, len(seen))


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial of the unchanged args."""
    over = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in over if trial.user_attrs.get(DEFAULT)), None)
