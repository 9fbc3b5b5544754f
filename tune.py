"""Search for better args on one fold by its validation log-loss, and write the best ones as args files for all folds.

    python tune.py args/fold0.json --trials 30
    python tune.py args/fold0.json --trials 30 --model /kaggle/input/.../qwen2.5-vl-3b-instruct
    CUDA_VISIBLE_DEVICES=1 python tune.py args/fold0.json --trials 30       # a second GPU joins the same search
    bash run.sh args/tuned                                                  # train all folds with the result

The first trial uses the args as they are, so the gain of the best one is measured against them. The default space is
learning_rate (a quarter to four times), lora_rank, lora_alpha, num_train_epochs, ema_decay, image_size, loss and
shuffle_choices, around the args' own values. --space replaces or removes fields:
    {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": true}, "lora_rank": [8, 16], "image_size": null}

Run the same command again to resume: finished trials count, an interrupted one is marked as failed. Trials that do
worse than the median of the others are pruned (Optuna's median pruner; the sampler is TPE).
"""

import argparse
from pathlib import Path

import optuna
from optuna.trial import TrialState
from tqdm.auto import tqdm

from vqa.config.arguments import DataArguments
from vqa.config.parser import field_names, non_default_fields, parse_arguments
from vqa.core.cli import make_parser
from vqa.core.errors import UserError, run_main
from vqa.core.io import swap_root
from vqa.training.search import (
    DEFAULT,
    claim_trial,
    count_finished,
    default_trial,
    describe_trial,
    open_study,
    plot_importances,
    print_gain,
    read_space,
    run_trial,
    write_args,
)

MAX_FAILURES = 3  # in a row


def main() -> None:
    args, flags = parse_args()
    _, data, recipe, values = parse_arguments([args.args_file, *flags], __doc__)
    if data.fold is None:
        raise UserError("fold is null, so there is no validation to compare trials by. Set a fold.")
    space = read_space(args.space, values, field_names())
    folder = Path(args.output_dir or swap_root("checkpoints/tuning", Path(args.args_file).with_suffix(""), "args"))
    config = {name: value for name, value in values.items() if name != "output_dir"} | {"space": space}
    study = open_study(folder, config, recipe.seed)
    search(study, folder, space, values, [args.args_file, *flags], args.trials)
    conclude(study, folder, Path(args.args_file).parent / "tuned", values, data)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """(arguments of this script, flags for training)."""
    usage = "python tune.py ARGS.json [--trials N] [--space SPACE.json] [--output_dir DIR] [--field value ...]"
    parser = make_parser(__doc__, usage=usage)
    parser.add_argument("args_file", metavar="ARGS.json", help="args file of the fold to search on")
    parser.add_argument("--trials", type=int, default=30, help="number of finished trials (default: %(default)s)")
    parser.add_argument("--space", metavar="SPACE.json", help="fields to search differently, or not at all (null)")
    parser.add_argument("--output_dir", help="folder of the search (default: args/X.json -> checkpoints/tuning/X)")
    args, flags = parser.parse_known_args()
    if args.trials < 1:
        raise UserError(f"--trials is {args.trials}. Give 1 or more.")
    return args, flags


def search(study: optuna.Study, folder: Path, space: dict, values: dict, flags: list[str], max_trials: int) -> None:
    """Run trials until `max_trials` are finished, including those of other launches."""
    failures = 0
    with tqdm(total=max_trials, desc="trials", disable=None) as bar:
        while claimed := claim_trial(study, folder, space, values, max_trials):
            bar.update(count_finished(study) - bar.n)
            trial, lock = claimed
            trial_folder = folder / f"trial{trial.number}"
            with lock:
                state, value = run_trial(trial, flags, trial_folder)
                study.tell(trial, value, state)
            failures = failures + 1 if state == TrialState.FAIL else 0
            tqdm.write(describe_trial(study.trials[trial.number]))
            if failures == MAX_FAILURES or failures and DEFAULT in trial.user_attrs:
                lines = (trial_folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
                raise UserError(f"trial {trial.number} failed: {lines[-1] if lines else 'train.log is empty'}")
        bar.update(count_finished(study) - bar.n)


def conclude(study: optuna.Study, folder: Path, tuned: Path, values: dict, data: DataArguments) -> None:
    """Print the gain, write the best trial as args files into `tuned`, and draw the importances."""
    default = default_trial(study)
    if default is None:
        print(f"{folder}: another launch is still running the first trial. Run this command again when it is done.")
        return
    print_gain(default, study.best_trial, folder, data)
    write_args(tuned, non_default_fields(values) | study.best_trial.params, data)
    plot_importances(study, folder / "importances.png")


if __name__ == "__main__":
    run_main(main)
