"""Print the experiment log: every finished training, prediction and ensemble, newest last.

    python experiments.py                                   # the table
    python experiments.py --compare mh2k3x9a mh2k7c01       # which args differ, and is the second run better?
    python experiments.py --public_score 0.8271             # record the leaderboard score of the latest ensemble
    python experiments.py --public_score 0.8271 mh2k9d4f    # or of that run
    python experiments.py --plot                            # validation against leaderboard, as a PNG beside the log

The other scripts write the log: experiments/log.csv, or the file in the environment variable EXPERIMENTS_LOG.
Accuracy, its 95 % interval and log-loss are out of fold: on rows that the run's models were not trained on. chance and
text_only are the accuracies of a draw and of a classifier that sees no image.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.cli import make_parser
from vqa.core.errors import UserError, preview, run_main
from vqa.core.figures import new_figure, save_figure
from vqa.data.predictions import read_predictions
from vqa.evaluation.experiment_log import log_path, log_run, read_log
from vqa.evaluation.labels import Labels
from vqa.evaluation.reference import REMEDY, Reference
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
        if blind := not_above_reference(log):
            print(f"warning: {preview(blind, 10)}: the accuracy is not above chance and text_only. {REMEDY}")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="ID", help="run of --public_score (default: the latest ensemble)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--compare", nargs=2, metavar="ID", help="compare the args and the scores of two runs")
    action.add_argument("--public_score", type=float, metavar="X", help="record a leaderboard score from 0 to 1")
    action.add_argument("--plot", action="store_true", help="draw out-of-fold accuracy against leaderboard score")
    args = parser.parse_args()
    if args.run and args.public_score is None:
        raise UserError(f"{args.run}: an id alone does nothing. Add --public_score, or use --compare.")
    if args.public_score is not None and not 0 <= args.public_score <= 1:
        raise UserError(f"--public_score {args.public_score:g} is not between 0 and 1. Write 82.71 % as 0.8271.")
    return args


def as_table(log: pd.DataFrame) -> pd.DataFrame:
    """A line for each run, with the args in which it differs from other runs of its kind."""
    runs, public = log[log["kind"] != "leaderboard"], public_scores(log)
    table = runs[["id", "time", "kind", "output"]].copy()
    for name in ("rows", "accuracy"):
        table[name] = runs[name].map(round_cell)
    bounds = zip(runs["low"].map(round_cell), runs["high"].map(round_cell))
    table["interval"] = [f"{low}-{high}" if low else "" for low, high in bounds]
    for name in ("chance", "text_only"):
        table[name] = runs[name].map(round_cell).replace("", "-")
    table["log_loss"] = runs["log_loss"].map(round_cell)
    table["public"] = [round_cell(public.get(name, "")) for name in runs["id"]]
    table[["seconds", "peak_gib", "parents"]] = runs[["seconds", "peak_gib", "parents"]]
    table["args"] = differing_args(runs)
    return table


def not_above_reference(log: pd.DataFrame) -> list[str]:
    """Ids of the runs whose accuracy is not above their reference lines."""
    scored = log[(log["low"] != "") & (log["chance"] != "")]
    cells = zip(scored["id"], scored["low"], scored["chance"], scored["text_only"])
    return [name for name, low, *lines in cells if not Reference(*(float(x or 0) for x in lines)).is_below(float(low))]


def round_cell(number: str) -> str:
    """A number with four decimals, if it has any."""
    return f"{float(number):.4f}" if "." in number else number


def differing_args(runs: pd.DataFrame) -> list[str]:
    """The args of each run that are not the same in all runs of its kind, cut to one line."""
    args, lines = runs["args"].map(json.loads), []
    for kind, run_args in zip(runs["kind"], args):
        peers = args[runs["kind"] == kind]
        line = " ".join(
            f"{name}={value}"
            for name, value in run_args.items()
            if len(peers) == 1 or any(peer.get(name) != value for peer in peers)
        )
        lines.append(line if len(line) <= ARGS_WIDTH else f"{line[: ARGS_WIDTH - 3]}...")
    return lines


def public_scores(log: pd.DataFrame) -> dict[str, str]:
    """Run -> its latest leaderboard score."""
    scores = log[log["kind"] == "leaderboard"]
    return dict(zip(scores["parents"], scores["public_score"]))


def find_run(log: pd.DataFrame, name: str) -> pd.Series:
    runs = log[log["id"] == name]
    if runs.empty:
        raise UserError(f"{log_path()}: no run {name!r}. `python experiments.py` lists all runs.")
    return runs.iloc[0]


def compare_runs(log: pd.DataFrame, first: str, second: str) -> None:
    """The args that differ, then a paired test on the out-of-fold rows that both runs scored."""
    runs = [find_run(log, name) for name in (first, second)]
    args = pd.DataFrame({run["id"]: json.loads(run["args"]) for run in runs}, dtype=object)
    differing = args[[a != b for a, b in zip(args[first].map(str), args[second].map(str))]]
    print(differing.to_string(na_rep="(default)") if len(differing) else "no args differ")
    files = [log_path().with_name(f"{run['id']}.csv") for run in runs]
    if missing := [run["id"] for run, file in zip(runs, files) if not file.is_file()]:
        raise UserError(f"{preview(missing)}: no out-of-fold rows were scored. Compare the scores of other runs.")
    (ids, values), (other, other_values) = (read_predictions(file) for file in files)
    both = pd.Index(ids).intersection(other)
    if both.empty:
        raise UserError(f"{first} and {second} have no scored row in common. Compare runs of the same folds.")
    stack = [v[pd.Index(i).get_indexer(both)] for i, v in ((ids, values), (other, other_values))]
    print(f"\non the {len(both)} rows that both scored:")
    print_comparison(first, second, list(both), np.stack(stack), Labels(runs[1]["labels"], **reader_of(log, runs[1])))


def reader_of(log: pd.DataFrame, run: pd.Series) -> dict:
    """How to read the labels of a run: the args `columns` and `answer_form` of the training that it comes from."""
    args, parents = json.loads(run["args"]), log[log["id"].isin(run["parents"].split())]
    if run["kind"] != "training" and len(parents):
        return reader_of(log, parents.iloc[0])
    return {name: args.get(name) for name in ("columns", "answer_form")}


def record_public_score(log: pd.DataFrame, score: float, name: str | None) -> None:
    """Add a leaderboard score to the log, and print whether it is within the interval of validation."""
    ensembles = log[log["kind"] == "ensemble"]
    if name is None and ensembles.empty:
        raise UserError(f"{log_path()}: no ensemble in it. Make one with ensemble.py, or name another run.")
    run = find_run(log, name) if name else ensembles.iloc[-1]
    log_run("leaderboard", run["output"], {}, parents=[run["id"]], public_score=score)
    line = f"{run['id']} ({run['output']}, {run['time']}): {score:.4f} on the leaderboard"
    if run["accuracy"]:
        low, high = float(run["low"]), float(run["high"])
        position = "below" if score < low else "above" if score > high else "within"
        line += f", {position} the 95 % interval of validation, {low:.4f} to {high:.4f}"
    print(line)


def plot_leaderboard(log: pd.DataFrame, path: Path) -> None:
    """Out-of-fold accuracy with its interval against the public score, a point a run."""
    public = public_scores(log)
    runs = log[log["id"].isin(public) & (log["accuracy"] != "")]
    if runs.empty:
        raise UserError(f"{log_path()}: no run has an out-of-fold and a public score. Add one with --public_score.")
    x, low, high = (runs[name].astype(float) for name in ("accuracy", "low", "high"))
    y = runs["id"].map(public).astype(float)
    figure, axes = new_figure("", "out-of-fold accuracy, 95 % interval", "leaderboard", size=(6, 6))
    axes.errorbar(x, y, xerr=(x - low, high - x), fmt="o", capsize=3)
    for name, *point in zip(runs["id"], x, y):
        axes.annotate(name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_aspect("equal", adjustable="datalim")
    axes.axline((x.mean(), x.mean()), slope=1, linestyle=":", color="grey", label="equal")
    axes.legend()
    save_figure(figure, path)
    print(f"{path}: {len(runs)} runs with both scores")


if __name__ == "__main__":
    run_main(main)
