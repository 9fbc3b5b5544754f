"""Search for better args on one fold, by its validation log-loss; the best ones become args files for every fold.

    python tune.py args/fold0.json --trials 30
    python tune.py args/fold0.json --trials 30 --model /kaggle/input/.../qwen2.5-vl-3b-instruct
    CUDA_VISIBLE_DEVICES=1 python tune.py args/fold0.json --trials 30       # a second GPU helps with the same search
    bash run.sh args/tuned                                                  # train all folds with what was found

The first trial is the args as they are, so the end says by how much the best is better, or that none is. Searched are
learning_rate (a quarter to four times), lora_rank, lora_alpha, num_train_epochs, ema_decay, image_size, loss and
shuffle_choices, around the args' own values; --space replaces or removes some:
    {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": true}, "lora_rank": [8, 16], "image_size": null}

Killed and started again it goes on: finished trials count, one that was cut off is marked as failed. A trial that at
a validation does worse than half of the others did is ended (Optuna's median pruner; its sampler is TPE).
"""

import argparse
from pathlib import Path

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from tqdm.auto import tqdm

from vqa.config.arguments import DataArguments, folds_file
from vqa.config.parser import field_names, non_default_fields, parse_arguments
from vqa.core.errors import UserError, run_main
from vqa.core.io import atomic_write, read_json, swap_root, write_json
from vqa.data.predictions import join
from vqa.data.table import read_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import row_log_loss
from vqa.evaluation.oof import weights_folder
from vqa.evaluation.significance import paired_difference
from vqa.training.search import DEFAULT, claim_trial, default_trial, open_study, read_space, run_trial

FAILURES = 3  # in a row
FEWEST = 5  # finished trials that say something of importances


def main() -> None:
    args, flags = parse_args()
    _, data, recipe, values = parse_arguments([args.args_file, *flags], __doc__)
    if data.fold is None:
        raise UserError("fold is null, so nothing is validated and no trial is better than another; give a fold")
    space = read_space(args.space, values, field_names())
    folder = Path(args.output_dir or swap_root("checkpoints/tuning", Path(args.args_file).with_suffix(""), "args"))
    asked = {name: value for name, value in values.items() if name != "output_dir"} | {"space": space}
    study = open_study(folder, asked, recipe.seed)
    search(study, folder, space, values, [args.args_file, *flags], args.trials)
    conclude(study, folder, Path(args.args_file).parent / "tuned", values, data)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """(own args, flags for training)."""
    parser = argparse.ArgumentParser(
        usage="python tune.py ARGS.json [--trials N] [--space SPACE.json] [--output_dir DIR] [--field value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("args_file", metavar="ARGS.json", help="args file of the fold to search on")
    parser.add_argument("--trials", type=int, default=30, help="finished ones, earlier launches' too (default: 30)")
    parser.add_argument("--space", metavar="SPACE.json", help="fields to search otherwise, or not (null)")
    parser.add_argument("--output_dir", help="of the search (default: checkpoints/tuning/, as the args file's place)")
    own, flags = parser.parse_known_args()
    if own.trials < 1:
        raise UserError(f"--trials is {own.trials}; give 1 or more")
    return own, flags


def search(study: optuna.Study, folder: Path, space: dict, values: dict, flags: list[str], most: int) -> None:
    """Run trials until `most` are over, those of other launches counted in."""
    failures = 0
    with tqdm(total=most, desc="trials", disable=None) as bar:
        while claimed := claim_trial(study, folder, space, values, most):
            bar.update(count_over(study) - bar.n)
            trial, lock = claimed
            place = folder / f"trial{trial.number}"
            with lock:
                state, value = run_trial(trial, flags, place)
                study.tell(trial, value, state)
            failures = failures + 1 if state == TrialState.FAIL else 0
            tqdm.write(describe(study.trials[trial.number]))
            if failures == FAILURES or failures and DEFAULT in trial.user_attrs:
                lines = (place / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
                raise UserError(f"trial {trial.number} failed: {lines[-1] if lines else 'it said nothing'}")
        bar.update(count_over(study) - bar.n)


def count_over(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def describe(trial: FrozenTrial) -> str:
    outcome = {TrialState.COMPLETE: f"log-loss {trial.value or 0:.4f}", TrialState.PRUNED: "ended early"}
    params = ", ".join(f"{name} {short(value)}" for name, value in trial.params.items())
    seconds = trial.duration.total_seconds()
    return f"trial {trial.number}: {outcome.get(trial.state, 'failed')}, {seconds:.0f} s: {params}"


def short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def conclude(study: optuna.Study, folder: Path, tuned: Path, values: dict, data: DataArguments) -> None:
    """Say what was found, and write it as args files into `tuned`."""
    default = default_trial(study)
    if default is None:
        print(f"{folder}: another launch is still at the args as they are; run this again when it is done")
        return
    tell_gain(default, study.best_trial, folder, data)
    write_args(tuned, values, study.best_trial, data)
    plot_importances(study, folder / "importances.png")


def tell_gain(default: FrozenTrial, best: FrozenTrial, folder: Path, data: DataArguments) -> None:
    """How much lower the best trial's log-loss is than that of the args as they are."""
    if best.number == default.number:
        print(f"no trial has a lower log-loss than the args as they are: {default.value:.4f}")
        return
    print(
        f"trial {best.number} is the best: log-loss {best.value:.4f}, {default.value - best.value:.4f} below the args "
        f"as they are ({default.value:.4f}):"
    )
    for name, value in best.params.items():
        if value != default.params[name]:
            print(f"    {name} {short(default.params[name])} -> {short(value)}")
    ids, stack = join([best_out_of_fold(folder / f"trial{trial.number}") for trial in (default, best)])
    truth = Labels(data.train_csv)
    gap = paired_difference(*(row_log_loss(values, truth.answers(ids)) for values in stack), truth.clusters(ids))
    print(
        f"paired on {len(ids)} rows: {gap.value:+.4f} (95 % interval {gap.low:+.4f} to {gap.high:+.4f}), "
        f"{'beyond' if gap.beyond_noise else 'within'} noise; it was chosen by these very rows, so the other folds "
        "are the judge"
    )


def best_out_of_fold(folder: Path) -> Path:
    return weights_folder(folder, read_json(folder / "metrics.json")["best"]) / "oof.csv"


def write_args(folder: Path, values: dict, best: FrozenTrial, data: DataArguments) -> None:
    """The args with the best trial's as base.json, and a file for each fold that extends it."""
    write_json(folder / "base.json", non_default_fields(values) | best.params)
    folds = sorted(set(read_table(folds_file(data), ("fold",))["fold"]), key=int)
    for fold in folds:
        write_json(folder / f"fold{fold}.json", {"extends": "base.json", "fold": int(fold)})
    print(f"{folder}: base.json and {len(folds)} folds; train them by `bash run.sh {folder}`")


def plot_importances(study: optuna.Study, path: Path) -> None:
    """A bar a field: how much of what differs between trials goes with it, by Optuna's importances."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < FEWEST:
        print(f"no importances: {len(finished)} trials that ran to their end say nothing of them, {FEWEST} would")
        return
    found = optuna.importance.get_param_importances(study)
    figure = Figure(figsize=(7, 0.5 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(found)[::-1], np.array(list(found.values()))[::-1])
    axes.set(title=f"what the log-loss depends on, {len(finished)} trials", xlabel="importance")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(f"{path}: " + ", ".join(f"{name} {share:.2f}" for name, share in found.items()))


if __name__ == "__main__":
    run_main(main)
