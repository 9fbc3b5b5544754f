"""Print the table at the end of run.sh: the score of each step, with its interval, and the seconds that it took.

    python summarize.py outputs/demo                                            # out-of-fold scores of the folds
    python summarize.py outputs/demo --labels data/demo/test_answers.csv        # test rows with known answers

The scores are computed from the prediction files in the folder and in its plain/, and are also written to scores.json
there. low and high bound the 95 % interval of the accuracy. chance and text_only are the accuracies of a draw and of a
classifier that sees no image; the latter was measured on the validation rows.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.cli import add_hidden_alias, make_parser
from vqa.core.errors import UserError, run_main
from vqa.core.io import write_json
from vqa.data.predictions import join, read_card, read_predictions, validation_scores
from vqa.data.table import read_table
from vqa.evaluation.all_rows import print_estimates
from vqa.evaluation.ensembling import ensemble, score_weights
from vqa.evaluation.experiment_log import SCORES
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import score_with_interval
from vqa.evaluation.oof import is_of_all_rows
from vqa.evaluation.reference import REMEDY, Reference, pooled_reference

METHODS = ("mean", "majority", "weighted")
BASE = "base model, untrained"


def main() -> None:
    args = parse_args()
    folder = Path(args.folder)
    folds = find_files(folder)
    if not folds:
        raise UserError(f"{folder}: no fold*.csv or seed*.csv in it. Predict with predict.py first.")
    table = test_table(folder, folds, Labels(args.labels)) if args.labels else validation_table(folds)
    seconds = read_seconds(folder / "seconds.txt")
    print_table(pd.DataFrame(table))
    for line in table:
        if line["low"] is not None and line["step"] != BASE:
            if not Reference(line["chance"], line["text_only"]).is_below(line["low"]):
                print(f"warning: the accuracy of {line['step']} is not above chance and text_only. {REMEDY}")
    print_estimates(folds)
    if seconds:
        print("\nseconds: " + ", ".join(f"{stage} {value}" for stage, value in seconds.items()))
    write_json(folder / "scores.json", {"scores": table, "seconds": seconds})


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folder", help="folder that predict.py wrote to, such as outputs/demo")
    parser.add_argument("--labels", metavar="CSV", help="CSV with `id,answer` of the test rows, if they are known")
    add_hidden_alias(parser, "--truth", "--labels")
    return parser.parse_args()


def find_files(folder: Path) -> list[Path]:
    """The predictions of folds, and of models that were trained on all rows with several seeds."""
    return sorted(folder.glob("fold*.csv")) + sorted(folder.glob("seed*.csv"))


def validation_table(folds: list[Path]) -> list[dict]:
    """Each fold's out-of-fold accuracy and log-loss, as training measured them."""
    scores = [read_card(path).get("validation") or {} for path in folds]
    return [{"step": path.stem} | {name: fold.get(name) for name in SCORES} for path, fold in zip(folds, scores)]


def test_table(folder: Path, folds: list[Path], labels: Labels) -> list[dict]:
    """A line for the untrained base model, each fold and each ensemble; the latter two without and with TTA."""
    table, base, plain = [], folder / "base" / "base.csv", find_files(folder / "plain")
    if base.is_file():
        table.append(score_step(BASE, *read_predictions(base), labels))
    methods = METHODS[:2] if any(map(is_of_all_rows, folds)) else METHODS  # weights need validation scores
    for suffix, files in (("", plain), (" + TTA", folds)) if plain else (("", folds),):
        table += [score_step(path.stem + suffix, *read_predictions(path), labels) for path in files]
        if len(files) > 1:
            ids, stack = join(files)
            weights = None
            if "weighted" in methods:
                weights = score_weights(validation_scores(files, "log_loss"), "log_loss")
            table += [score_step(f"{name}{suffix}", ids, ensemble(stack, name, weights), labels) for name in methods]
            table[1 - len(methods)]["log_loss"] = None  # majority: shares of votes are not probabilities
    validation = [read_card(path).get("validation") or {} for path in folds]
    text_only = pooled_reference(validation, chance=0.0).text_only
    return [line | {"text_only": text_only} for line in table]


def score_step(step: str, ids: list[str], probabilities: np.ndarray, labels: Labels) -> dict:
    """A line of the table, named `step`."""
    scores = score_with_interval(probabilities, labels.answers(ids), labels.clusters(ids))
    return {"step": step} | {name: scores.get(name) for name in SCORES}


def print_table(table: pd.DataFrame) -> None:
    """Print it; reference lines that are the same in all lines, as for rows of one test, are one line below."""
    names = ["chance", "text_only"]
    same = names if (table[names].nunique(dropna=False) == 1).all() else []
    print(table.drop(columns=same).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    if values := [f"{name} {table[name][0]:.4f}" for name in same if table[name].notna().all()]:
        print(f"for comparison: {', '.join(values)}")


def read_seconds(path: Path) -> dict[str, int]:
    """Stage -> seconds, as run.sh wrote them."""
    if not path.is_file():
        return {}
    table = read_table(path, ("stage", "seconds"))
    return dict(zip(table["stage"], table["seconds"].astype(int)))


if __name__ == "__main__":
    run_main(main)
