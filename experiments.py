"""The experiment log: every finished training, prediction and ensemble, newest last.

    python experiments.py                                   # the table
    python experiments.py --compare mh2k3x9a mh2k7c01       # which args differ, and is the second better?
    python experiments.py --public_score 0.8271             # what the leaderboard said of the latest ensemble
    python experiments.py --public_score 0.8271 mh2k9d4f    # or of that one
    python experiments.py --plot                            # validation against leaderboard, as a PNG beside the log

The scripts write the log themselves: experiments/log.csv, or the file that the environment variable EXPERIMENTS_LOG
names. Scores are out of fold: of rows that the run's models were not trained on.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview, run_main
from vqa.core.figures import new_figure, save_figure
from vqa.data.predictions import read_predictions
from vqa.evaluation.experiment_log import log_path, log_run, read_log
from vqa.evaluation.labels import Labels
from vqa.evaluation.significance import print_comparison

ARGS_WIDTH = 60


def main() -> None:
    args = parse_args()
    log = read_log(log_path())
    if args.compare:
        compare_runs(log, *args.compare)
    elif args.public_score is not None:
        record_public_score(log, args.public_score, args.run)
    elif args.plot:
        plot_leaderboard(log, log_path().with_name("leaderboard.png"))
    else:
        print(as_table(log).to_string(index=False))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="ID", help="for --public_score (default: the latest ensemble)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", nargs=2, metavar="ID", help="two runs: by their args and by the rows both scored")
    what.add_argument("--public_score", type=float, help="what the leaderboard said, as a share: 0.8271")
    what.add_argument("--plot", action="store_true", help="draw out-of-fold accuracy against the leaderboard's")
    args = parser.parse_args()
    if args.run and args.public_score is None:
        raise UserError(f"{args.run}: an id on its own says nothing; give --public_score with it, or --compare")
    if args.public_score is not None and not 0 <= args.public_score <= 1:
        raise UserError(f"--public_score {args.public_score:g} is no share; give 82.71 % as 0.8271")
    return args


def as_table(log: pd.DataFrame) -> pd.DataFrame:
    """What a terminal has room for: a line a run, with the args in which it differs from others of its kind."""
    runs, public = log[log["kind"] != "leaderboard"], public_scores(log)
    table = runs[["id", "time", "kind", "output"]].copy()
    for name in ("rows", "accuracy"):
        table[name] = runs[name].map(shortened)
    bounds = zip(runs["low"].map(shortened), runs["high"].map(shortened))
    table["interval"] = [f"{low}-{high}" if low else "" for low, high in bounds]
    table["log_loss"] = runs["log_loss"].map(shortened)
    table["public"] = [shortened(public.get(name, "")) for name in runs["id"]]
    for name in ("seconds", "peak_gib", "parents"):
        table[name] = runs[name]
    table["args"] = telling_args(runs)
    return table


def shortened(number: str) -> str:
    """Four decimals of a number that has any."""
    return f"{float(number):.4f}" if "." in number else number


def telling_args(runs: pd.DataFrame) -> list[str]:
    """The args of each run that are not the same in all runs of its kind, cut to one line."""
    args = [json.loads(cell) for cell in runs["args"]]
    shown = []
    for kind, own in zip(runs["kind"], args):
        others = [other for other, its in zip(args, runs["kind"]) if its == kind]
        telling = {k: v for k, v in own.items() if len(others) == 1 or any(other.get(k) != v for other in others)}
        line = " ".join(f"{name}={value}" for name, value in telling.items())
        shown.append(line if len(line) <= ARGS_WIDTH else f"{line[: ARGS_WIDTH - 3]}...")
    return shown


def public_scores(log: pd.DataFrame) -> dict[str, str]:
    """Run -> what the leaderboard said of it, the last time."""
    said = log[log["kind"] == "leaderboard"]
    return dict(zip(said["parents"], said["public_score"]))


def find_run(log: pd.DataFrame, name: str) -> pd.Series:
    found = log[log["id"] == name]
    if found.empty:
        raise UserError(f"{log_path()}: no run {name!r}; `python experiments.py` lists them")
    return found.iloc[0]


def compare_runs(log: pd.DataFrame, first: str, second: str) -> None:
    """The args that differ, then a paired test on the out-of-fold rows that both runs scored."""
    runs = [find_run(log, name) for name in (first, second)]
    args = pd.DataFrame({run["id"]: json.loads(run["args"]) for run in runs}, dtype=object)
    differing = args[[a != b for a, b in zip(args[first].map(str), args[second].map(str))]]
    print(differing.to_string(na_rep="(default)") if len(differing) else "no args differ")
    files = [log_path().with_name(f"{run['id']}.csv") for run in runs]
    if missing := [run["id"] for run, file in zip(runs, files) if not file.is_file()]:
        raise UserError(f"{preview(missing)}: no out-of-fold rows were scored, so there is nothing more to compare")
    (ids, values), (other, other_values) = (read_predictions(file) for file in files)
    both = pd.Index(ids).intersection(other)
    if both.empty:
        raise UserError(f"{first} and {second} scored no row in common; compare runs of one fold, or of all folds")
    stack = [v[pd.Index(i).get_indexer(both)] for i, v in ((ids, values), (other, other_values))]
    print(f"\non the {len(both)} rows that both scored:")
    print_comparison(first, second, list(both), np.stack(stack), Labels(runs[1]["truth"]))


def record_public_score(log: pd.DataFrame, score: float, name: str | None) -> None:
    """Add what the leaderboard said; say how that compares with validation."""
    ensembles = log[log["kind"] == "ensemble"]
    if name is None and ensembles.empty:
        raise UserError(f"{log_path()}: no ensemble in it yet; make one with ensemble.py, or name another run")
    run_ = find_run(log, name) if name else ensembles.iloc[-1]
    log_run("leaderboard", run_["output"], {}, parents=[run_["id"]], public_score=score)
    print(f"{run_['id']} ({run_['output']}, {run_['time']}): {score:.4f} on the leaderboard", end="")
    if run_["accuracy"]:
        low, high = float(run_["low"]), float(run_["high"])
        place = "below" if score < low else "above" if score > high else "within"
        print(f", {place} the 95 % interval of validation, {low:.4f} to {high:.4f}", end="")
    print()


def plot_leaderboard(log: pd.DataFrame, path: Path) -> None:
    """Out-of-fold accuracy with its interval against the public score, a point a run."""
    public = public_scores(log)
    runs = log[log["id"].isin(public) & (log["accuracy"] != "")]
    if runs.empty:
        raise UserError(f"{log_path()}: no run has both an out-of-fold and a public score; record one: --public_score")
    x, low, high = (runs[name].astype(float) for name in ("accuracy", "low", "high"))
    y = runs["id"].map(public).astype(float)
    figure, axes = new_figure("", "out-of-fold accuracy, 95 % interval", "leaderboard", size=(6, 6))
    axes.errorbar(x, y, xerr=(x - low, high - x), fmt="o", capsize=3)
    for name, *place in zip(runs["id"], x, y):
        axes.annotate(name, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.axline((x.mean(), x.mean()), slope=1, linestyle=":", color="grey", label="equal")
    axes.legend()
    save_figure(figure, path)
    print(f"{path}: runs with both scores: {len(runs)}")


if __name__ == "__main__":
    run_main(main)
