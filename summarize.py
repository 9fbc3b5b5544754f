"""The table at the end of run.sh: what each step of the way scored, with its interval, and what it cost.

    python scores.py outputs/demo                                            # out-of-fold scores of the folds
    python scores.py outputs/demo --labels data/demo/test_answers.csv         # test rows whose answers are known

Nothing is trained or predicted here: the numbers are computed from the prediction files in the folder and in its
plain/. The same numbers go to scores.json in that folder.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, run_main
from vqa.core.io import write_json
from vqa.data.predictions import join, read_card, read_predictions
from vqa.data.predictions import validation_scores as scores_in_training
from vqa.data.table import read_table
from vqa.evaluation.ensembling import ensemble, score_weights
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import score_with_interval

METHODS = ("mean", "majority", "weighted")


def main() -> None:
    args = parse_args()
    folder = Path(args.folder)
    folds = sorted(folder.glob("fold*.csv"))
    if not folds:
        raise UserError(f"{folder}: no fold*.csv in it; predict with predict.py first")
    table = test_scores(folder, folds, args.labels) if args.labels else validation_scores(folds)
    seconds = read_seconds(folder / "seconds.txt")
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    if seconds:
        print("\nseconds: " + ", ".join(f"{stage} {value}" for stage, value in seconds.items()))
    write_json(folder / "scores.json", {"scores": table, "seconds": seconds})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where predict.py wrote, such as outputs/demo")
    parser.add_argument("--labels", help="CSV of `id,answer` for the test rows, where they are known")
    return parser.parse_args()


def validation_scores(folds: list[Path]) -> list[dict]:
    """Out-of-fold accuracy and log-loss of each fold, as training measured them."""
    found = [read_card(path).get("validation") or {} for path in folds]
    names = ("accuracy", "log_loss")
    return [{"step": path.stem} | {name: scores.get(name) for name in names} for path, scores in zip(folds, found)]


def test_scores(folder: Path, folds: list[Path], truth: str) -> list[dict]:
    """One line a step: untrained base, each fold, each ensemble; the latter two without and with TTA."""
    table, score = [], functools.partial(score_step, truth=Labels(truth))
    if (folder / "base" / "base.csv").is_file():
        table.append(score("base model, untrained", *read_predictions(folder / "base" / "base.csv")))
    plain = sorted((folder / "plain").glob("fold*.csv"))
    for suffix, files in (("", plain), (" + TTA", folds)) if plain else (("", folds),):
        table += [score(path.stem + suffix, *read_predictions(path)) for path in files]
        if len(files) > 1:
            ids, stack = join(files)
            weights = score_weights(scores_in_training(files, "log_loss"), "log_loss")
            table += [score(f"{method}{suffix}", ids, ensemble(stack, method, weights)) for method in METHODS]
            table[-len(METHODS) + METHODS.index("majority")]["log_loss"] = None  # shares of votes are no probabilities
    return table


def score_step(step: str, ids: list[str], probabilities: np.ndarray, truth: Labels) -> dict:
    answers = truth.answers(ids)
    found = score_with_interval(probabilities, answers, truth.clusters(ids))
    return {"step": step} | {name: found[name] for name in ("rows", "accuracy", "low", "high", "log_loss")}


def read_seconds(path: Path) -> dict[str, int]:
    """Stage -> seconds, as run.sh noted them."""
    if not path.is_file():
        return {}
    table = read_table(path, ("stage", "seconds"))
    return dict(zip(table["stage"], table["seconds"].astype(int)))


if __name__ == "__main__":
    run_main(main)
