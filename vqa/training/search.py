"""The hyperparameter search of tune.py: the search space, the study on disk, one trial, and the conclusion.

The study is an SQLite file that several launches may share. Each trial holds a lock while it runs, so a trial whose
process was killed is recognised at once and marked as failed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import optuna
from filelock import AcquireReturnProxy, FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from vqa.config.arguments import DataArguments, folds_file, reader_options
from vqa.core.cli import die_with_parent
from vqa.core.errors import UserError, preview
from vqa.core.figures import new_figure, save_figure
from vqa.core.io import read_json, write_json
from vqa.data.predictions import join
from vqa.data.table import read_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import row_log_loss
from vqa.evaluation.oof import weights_folder
from vqa.evaluation.significance import paired_difference

TRAIN = Path(__file__).resolve().parent.parent.parent / "train_fold.py"
POLL_SECONDS = 0.5
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
DEFAULT = "default"  # marks the trial of the unchanged args
CONFIG = "asked"  # where the study keeps the args and the space; the name is that of earlier releases
VALIDATION_SCORES = ("eval_log_loss", "eval_ema_log_loss", "eval_swa_log_loss")
MIN_TRIALS = 5  # complete ones, for importances


def default_space(values: Mapping) -> dict[str, list | dict]:
    """The default search space around the args' own values, in the form of a space file."""
    rate, epochs, size = (values[name] for name in ("learning_rate", "num_train_epochs", "image_size"))
    rank, alpha = values["lora_rank"], values["lora_alpha"]
    space: dict[str, list | dict] = {
        "learning_rate": {"low": rate / 4, "high": rate * 4, "log": True},
        "lora_rank": [max(1, rank // 2), rank, rank * 2],
        "lora_alpha": [max(1, alpha // 2), alpha, alpha * 2],
        "num_train_epochs": [max(1.0, epochs - 1), epochs, epochs + 1, epochs + 2],
        "ema_decay": [0.95, 0.98, 0.99, 0.995, values["ema_decay"]],
        "image_size": [round(size * 0.75 / 28) * 28, size, round(size * 1.33 / 28) * 28],
        "loss": ["token", "letter"],
        "shuffle_choices": [True, False],
    }
    if (values.get("max_steps") or 0) > 0:  # then the number of epochs has no effect
        del space["num_train_epochs"]
    if values.get("score") == "suffix":  # nor these two
        del space["loss"], space["shuffle_choices"]
    return {name: sorted(set(choices)) if isinstance(choices, list) else choices for name, choices in space.items()}


def read_space(path: str | None, values: Mapping, known: set[str]) -> dict[str, BaseDistribution]:
    """The default space, with fields replaced or (null) removed by the space file."""
    changes = read_json(path) if path else {}
    if unknown := sorted(changes.keys() - known):
        raise UserError(f"{path}: unknown fields {preview(unknown)}. See `python train_fold.py --help`.")
    space = {name: choices for name, choices in (default_space(values) | changes).items() if choices is not None}
    distributions = {}
    for name, choices in space.items():
        try:
            distributions[name] = to_distribution(choices)
        except (AttributeError, TypeError, ValueError) as error:
            example = '{"low": 1e-5, "high": 1e-3, "log": true}'
            raise UserError(f"{path}: {name}: {error}. Give a list of values, or {example}.") from None
        value, is_list = values.get(name), isinstance(choices, list)
        if value not in choices if is_list else not choices["low"] <= (value or 0) <= choices["high"]:
            place = path or "the default space"
            raise UserError(f"{place}: {name} does not include {value!r}, the value of the args. Add it.")
    return distributions


def to_distribution(choices: list | dict) -> BaseDistribution:
    if isinstance(choices, list):
        return CategoricalDistribution(choices)
    integers = all(isinstance(choices.get(name), int) for name in ("low", "high"))
    return (IntDistribution if integers else FloatDistribution)(**choices)


def open_study(folder: Path, config: Mapping, seed: int) -> optuna.Study:
    """The study in `folder`, created if it does not exist. Raises UserError if its args or its space differ.

    Each launch has a different seed: with the same one, a restarted search would sample the same values again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # tune.py prints the trials
    folder.mkdir(parents=True, exist_ok=True)
    with study_lock(folder):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="tune",
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
        config = json.loads(json.dumps(config, default=str))
        before, launches = study.user_attrs.get(CONFIG, config), study.user_attrs.get("launches", 0)
        if changed := sorted(name for name in before.keys() | config.keys() if before.get(name) != config.get(name)):
            raise UserError(
                f"{folder} already contains a search with a different {preview(changed)}. Resume it with its original "
                "settings, choose another --output_dir, or delete the folder."
            )
        study.set_user_attr(CONFIG, config)
        study.set_user_attr("launches", launches + 1)
        study.sampler = optuna.samplers.TPESampler(seed=seed + launches)
    return study


def study_lock(folder: Path) -> FileLock:
    return FileLock(folder / "study.lock")


def trial_lock(folder: Path, number: int) -> FileLock:
    return FileLock(folder / f"trial{number}.lock")


def claim_trial(
    study: optuna.Study, folder: Path, space: dict[str, BaseDistribution], defaults: Mapping, max_trials: int
) -> tuple[Trial, AcquireReturnProxy] | None:
    """The next trial with its lock held, or None if `max_trials` are finished or running. The first has `defaults`."""
    with study_lock(folder):
        fail_interrupted_trials(study, folder)
        trials = study.get_trials(deepcopy=False, states=(*FINISHED, TrialState.RUNNING, TrialState.WAITING))
        if sum(trial.state != TrialState.WAITING for trial in trials) >= max_trials:
            return None
        if not any(trial.user_attrs.get(DEFAULT) for trial in trials):
            study.enqueue_trial({name: defaults[name] for name in space}, {DEFAULT: True})
        trial = study.ask(dict(space))
        return trial, trial_lock(folder, trial.number).acquire()


def fail_interrupted_trials(study: optuna.Study, folder: Path) -> None:
    """Mark the running trials whose lock is free as failed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            with trial_lock(folder, trial.number).acquire(timeout=0):
                study.tell(trial.number, state=TrialState.FAIL)
                print(f"trial {trial.number} was interrupted and is marked as failed")
        except Timeout:
            pass


def run_trial(trial: Trial, flags: list[str], folder: Path) -> tuple[TrialState, float | None]:
    """Run the training command in `folder`, with its output in train.log. Returns (state, lowest log-loss).

    Each validation is reported to the study, which may prune the trial. The adapters are deleted: those of thirty
    trials would fill a notebook's disk.
    """
    fixed = {"output_dir": str(folder), "save_strategy": "no", "max_hours": None}  # a trial is never resumed
    command = [sys.executable, str(TRAIN), *flags, *to_flags(trial.params), *to_flags(fixed)]
    folder.mkdir(parents=True, exist_ok=True)
    reported: list[float] = []
    with open(folder / "train.log", "wb") as log:
        process = subprocess.Popen(die_with_parent(command), stdout=log, stderr=subprocess.STDOUT)
        try:
            while (code := process.poll()) is None:
                time.sleep(POLL_SECONDS)
                report_validations(trial, folder, reported)
                if DEFAULT not in trial.user_attrs and trial.should_prune():
                    return TrialState.PRUNED, None
        finally:
            process.kill()
            process.wait()
            for weights in folder.rglob("adapter_model.safetensors"):
                weights.unlink()
    report_validations(trial, folder, reported)
    return (TrialState.COMPLETE, min(reported)) if code == 0 else (TrialState.FAIL, None)


def to_flags(params: Mapping) -> list[str]:
    """Fields and values as `--field=value`, one word each, so that a value may contain spaces or start with a dash.

    Only booleans and None need another form than `str`: true, false and null.
    """
    forms = {name: json.dumps(v) if v is None or isinstance(v, bool) else str(v) for name, v in params.items()}
    return [f"--{name}={form}" for name, form in forms.items()]


def report_validations(trial: Trial, folder: Path, reported: list[float]) -> None:
    """Report new validations to the study and append them to `reported`: the lowest log-loss of raw, EMA and SWA."""
    history = read_json(folder / "history.json") if (folder / "history.json").is_file() else []
    validations = [logs for logs in history if VALIDATION_SCORES[0] in logs]
    for logs in validations[len(reported) :]:
        reported.append(min(logs[name] for name in VALIDATION_SCORES if name in logs))
        trial.report(reported[-1], len(reported))


def default_trial(study: optuna.Study) -> FrozenTrial | None:
    """The complete trial of the unchanged args."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in complete if trial.user_attrs.get(DEFAULT)), None)


def count_finished(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def describe_trial(trial: FrozenTrial) -> str:
    """One line: how the trial ended, its seconds and its values."""
    outcome = {TrialState.COMPLETE: f"log-loss {trial.value or 0:.4f}", TrialState.PRUNED: "pruned"}
    params = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
    seconds = trial.duration.total_seconds() if trial.duration else 0
    return f"trial {trial.number}: {outcome.get(trial.state, 'failed')}, {seconds:.0f} s: {params}"


def print_gain(default: FrozenTrial, best: FrozenTrial, folder: Path, data: DataArguments) -> None:
    """Print the best trial's changes, and its difference in log-loss to the unchanged args with an interval."""
    if best.number == default.number or best.value is None or default.value is None:
        print(f"no trial has a lower log-loss than the unchanged args: {default.value:.4f}")
        return
    gain = default.value - best.value
    print(f"trial {best.number} is the best: log-loss {best.value:.4f}, {gain:.4f} below the unchanged args")
    for name, value in best.params.items():
        if value != default.params[name]:
            print(f"    {name} {_short(default.params[name])} -> {_short(value)}")
    folders = [folder / f"trial{trial.number}" for trial in (default, best)]
    ids, stack = join(
        [weights_folder(place, read_json(place / "metrics.json")["best"]) / "oof.csv" for place in folders]
    )
    labels = Labels(data.train_csv, **reader_options(data))
    first, second = (row_log_loss(probs, labels.answers(ids)) for probs in stack)
    difference = paired_difference(first, second, labels.clusters(ids))
    print(
        f"paired on {len(ids)} rows: {difference.value:+.4f} (95 % interval {difference.low:+.4f} to "
        f"{difference.high:+.4f}), {'beyond' if difference.beyond_noise else 'within'} noise. These rows chose the "
        "trial, so expect a smaller gain on the other folds."
    )


def write_args(folder: Path, args: dict, data: DataArguments) -> None:
    """Write `args` as base.json, and one file for each fold that extends it."""
    write_json(folder / "base.json", args)
    folds = sorted({int(fold) for fold in read_table(folds_file(data), ("fold",))["fold"]})
    for fold in folds:
        write_json(folder / f"fold{fold}.json", {"extends": "base.json", "fold": fold})
    print(f"{folder}: base.json and {len(folds)} folds. Train them with `bash run.sh {folder}`.")


def plot_importances(study: optuna.Study, path: Path) -> None:
    """Draw Optuna's importance of each field for the log-loss."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < MIN_TRIALS:
        print(f"no importances: {len(complete)} trials are complete, at least {MIN_TRIALS} are needed")
        return
    importances = optuna.importance.get_param_importances(study)
    names = list(importances)
    title = f"importance of each field for the log-loss, {len(complete)} trials"
    figure, axes = new_figure(title, "importance", size=(7, 0.5 * len(names) + 1.2))
    axes.barh(names[::-1], [importances[name] for name in names[::-1]])
    save_figure(figure, path)
    print(f"{path}: " + ", ".join(f"{name} {importances[name]:.2f}" for name in names))


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
