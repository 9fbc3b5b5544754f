"""Prediction CSVs -> a submission.

    python ensemble.py outputs/*.csv                                  # outputs/submission.csv, by --method auto
    python ensemble.py outputs/fold*.csv outputs/7b/fold*.csv         # two models, tuned against each other
    python ensemble.py outputs/*.csv --method majority
    python ensemble.py a.csv b.csv --oof oof_a.csv oof_b.csv --labels data/train.csv
    python ensemble.py --compare a.csv b.csv --labels data/train.csv   # better, worse, or within noise?

Files are joined by id. Those in one folder whose names differ only in a number after "fold" are the folds of one
model: they are averaged, and models are tuned against each other on their out-of-fold rows, which lie beside each
fold's adapter. `auto` takes the method of the lowest out-of-fold log-loss, each measured on rows that had no part in
fitting it, and says whether that beats the mean beyond noise; with one model, or without such rows, it takes the mean.
The submission has the ids and order of the sample submission: the one given, or the one beside the test CSV.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.cli import non_default_args
from vqa.core.errors import UserError, run_main
from vqa.data.predictions import (
    check_offered,
    is_submission,
    join,
    letters,
    previous_answers,
    read_card,
    validation_scores,
    write_probabilities,
    write_submission,
)
from vqa.data.prompt import LETTERS
from vqa.evaluation.ensembling import METHODS, Ensemble, fit, nested, score_weights
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy, row_log_loss, score_with_interval
from vqa.evaluation.oof import MissingOOFError, OOFPredictions, check_agreement, group_models, load_oof
from vqa.evaluation.significance import paired_difference, print_comparison

NO_WEIGHT = 0.01


def main() -> None:
    start, args = time.time(), parse_args()
    if args.compare:
        ids, stack = join(args.compare)
        return print_comparison(*args.compare, ids, stack, Labels(args.labels))
    files, oof = prediction_files(args.predictions, args.oof)
    output = Path(args.output or Path(files[0]).parent / "submission.csv")
    check_place(args.probabilities, files)
    before = previous_answers(output)
    models = group_models(files)
    ids, stack = join(files)
    test_csv = csv_beside(files[0])
    if test_csv:
        check_offered(test_csv, ids, stack.max(0))
    evidence = find_evidence(models, oof, args)
    members, names = (stack, files) if len(models) == 1 else (average_folds(stack, files, models), list(models))
    if evidence and len(models) > 1:
        check_agreement(names, members, evidence)
    chosen = choose(args, models, names, evidence)
    probabilities = chosen(members)
    sample = args.sample or sample_beside(test_csv)
    write_submission(output, ids, probabilities, sample)
    if args.probabilities:
        write_probabilities(args.probabilities, ids, probabilities)
    print_weights(chosen, names)
    print_letters(probabilities, evidence)
    print_changes(before, ids, probabilities)
    run_id = log_ensemble(output, args, files, chosen, evidence, time.time() - start)
    order = f"ids and order of {sample}" if sample else "order not checked: no sample"
    print(f"{output}: {len(ids)} rows, {order}" + (f"; {run_id} in the experiment log" if run_id else ""))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "predictions", nargs="*", help="files that predict.py wrote; earlier submissions are passed over"
    )
    parser.add_argument(
        "--method",
        choices=("auto", *METHODS),
        default="auto",
        help="mean of probabilities; geometric: of log-probabilities; weighted: mean, by out-of-fold score; greedy: "
        "mean, of members selected one by one; stack: logistic regression on log-probabilities, a coefficient a "
        "model; majority: of votes (default: auto, the lowest out-of-fold log-loss)",
    )
    parser.add_argument(
        "--temperature",
        action="store_true",
        help="first make each model as sure of itself as its out-of-fold rows show that it may be",
    )
    parser.add_argument(
        "--weight_by", choices=("log_loss", "accuracy"), default="log_loss", help="for weighted (default: log_loss)"
    )
    parser.add_argument(
        "--oof",
        nargs="+",
        metavar="FILE",
        help="out-of-fold files, one a prediction and in the same order (default: found beside the adapters)",
    )
    parser.add_argument(
        "--labels", help="CSV with the answers (default: the train.csv that the folds were trained on)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="instead: is B better than A? Files of rows that --labels answers",
    )
    parser.add_argument("--sample", help="sample submission (default: sample_submission.csv beside the test CSV)")
    parser.add_argument("--output", help="(default: submission.csv beside the first file)")
    parser.add_argument(
        "--probabilities", metavar="FILE", help="write the ensemble's probabilities too, as a pseudo_csv for training"
    )
    args = parser.parse_args()
    if args.compare and (args.predictions or not args.labels):
        raise UserError("--compare takes two files and the --labels to judge them by, and nothing else")
    if not args.compare and not args.predictions:
        raise UserError("no predictions given; name the files that predict.py wrote, such as outputs/*.csv")
    args.differing = non_default_args(parser, args)
    return args


def prediction_files(paths: list[str], oof: list[str] | None) -> tuple[list[str], dict[str, str] | None]:
    """(the prediction files among `paths`, sorted, the out-of-fold file of each where given).

    Submissions, which a glob may catch as well, are left out.
    """
    for path in [*paths, *(oof or [])]:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; write predictions with predict.py first")
    named = list(dict.fromkeys(path for path in paths if not is_submission(path)))
    if not named:
        raise UserError(f"none of the {len(paths)} files holds probabilities; give those that predict.py wrote")
    if oof and len(oof) != len(named):
        raise UserError(f"{len(named)} predictions and {len(oof)} --oof files; give one each, in the same order")
    return sorted(named), dict(zip(named, oof)) if oof else None


def check_place(probabilities: str | None, files: list[str]) -> None:
    """Refuse to put the ensemble's probabilities where the next `*.csv` would take them for another model's."""
    if probabilities and Path(probabilities).parent.resolve() in {Path(file).parent.resolve() for file in files}:
        raise UserError(
            f"{probabilities} would lie among the predictions, and be taken for one of them the next time; name "
            f"another folder, such as {Path(probabilities).parent / 'ensemble' / Path(probabilities).name}"
        )


def csv_beside(file: str) -> str | None:
    """The CSV that a prediction file predicts, by its card."""
    test_csv = read_card(file).get("test_csv")
    return test_csv if test_csv and Path(test_csv).is_file() else None


def sample_beside(test_csv: str | None) -> Path | None:
    sample = Path(test_csv).with_name("sample_submission.csv") if test_csv else None
    return sample if sample and sample.is_file() else None


def average_folds(stack: np.ndarray, files: list[str], models: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Each model's mean over its folds, (models, rows, letters)."""
    return np.stack([stack[[files.index(file) for file in folds]].mean(0) for folds in models.values()])


def find_evidence(models: dict, oof: dict | None, args: argparse.Namespace) -> OOFPredictions | None:
    """The out-of-fold rows; where they are not needed and not there, the reason is printed."""
    try:
        evidence = load_oof(models, oof, args.labels)
    except MissingOOFError as reason:
        if oof or args.temperature or args.method in ("greedy", "stack"):
            raise
        print(f"no out-of-fold rows: {reason}")
        return None
    for name, member in zip(models, evidence.stack):
        right = accuracy(member.argmax(1) == evidence.answers, evidence.clusters)
        loss = row_log_loss(member, evidence.answers).mean()
        print(f"{name}: out of fold accuracy {right}, log-loss {loss:.4f}, {len(evidence.answers)} rows")
    return evidence


def choose(args: argparse.Namespace, models: dict, names: list[str], evidence: OOFPredictions | None) -> Ensemble:
    """The ensemble to predict with, fitted; how it was chosen is printed."""
    if len(models) == 1:
        return average_of_folds(args, names, evidence)
    if evidence is None:
        if args.method == "auto":
            print("mean is used: without out-of-fold rows nothing can be tuned or compared")
        return untuned(args, models)
    method = args.method
    if method == "auto":
        method = lowest_log_loss(evidence, args)
    return fit(method, evidence.stack, evidence.answers, args.temperature, args.weight_by)


def average_of_folds(args: argparse.Namespace, names: list[str], evidence: OOFPredictions | None) -> Ensemble:
    """For the folds of one model, whose out-of-fold rows are disjoint."""
    if args.method in ("greedy", "stack"):
        raise UserError(
            f"--method {args.method} needs two models: folds of one have no out-of-fold rows in common to tune "
            "weights on; use mean, or add another model's predictions"
        )
    if args.method == "auto" and len(names) > 1:
        print("mean is used: folds of one model have no out-of-fold rows in common, so nothing between them is tuned")
    plain = untuned(args, {name: [name] for name in names})
    if not args.temperature:
        return plain
    inverse_temperature = fit("mean", evidence.stack, evidence.answers, temperature=True).inverse_temperature
    return Ensemble(plain.method, plain.weights, np.repeat(inverse_temperature, len(names)))


def untuned(args: argparse.Namespace, models: Mapping[str, Sequence[str]]) -> Ensemble:
    """Nothing fitted: `weighted` goes by the scores that training measured for each model's folds."""
    if args.method != "weighted":
        return Ensemble("mean" if args.method == "auto" else args.method)
    scores = [np.mean(validation_scores(files, args.weight_by)) for files in models.values()]
    return Ensemble("weighted", score_weights(scores, args.weight_by))


def lowest_log_loss(evidence: OOFPredictions, args: argparse.Namespace) -> str:
    """The method of the lowest nested out-of-fold log-loss; the table of all and what it gains are printed."""
    answers, clusters, losses, table = evidence.answers, evidence.clusters, {}, []
    for method in METHODS:
        values = nested(method, evidence.stack, answers, clusters, args.temperature, args.weight_by)
        right = accuracy(values.argmax(1) == answers, clusters)
        table.append({"method": method, "accuracy": right.value, "low": right.low, "high": right.high})
        if method != "majority":  # shares of votes are no probabilities
            losses[method] = row_log_loss(values, answers)
            table[-1]["log_loss"] = losses[method].mean()
    print(f"\nnested, on {len(answers)} out-of-fold rows of {evidence.truth}:")
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.4f}".format, na_rep="-") + "\n")
    best = min(losses, key=lambda method: losses[method].mean())
    if best == "mean":
        print("mean is chosen: no other method has a lower log-loss")
        return best
    gain = paired_difference(losses[best], losses["mean"], clusters)
    print(
        f"{best} is chosen: its log-loss is {gain.value:.4f} below mean's (95 % interval {gain.low:.4f} to "
        f"{gain.high:.4f}), {'beyond' if gain.beyond_noise else 'within'} noise at {len(answers)} rows"
    )
    return best


def print_weights(chosen: Ensemble, names: list[str]) -> None:
    weights = [""] * len(names)
    if chosen.weights is not None:
        weights = [f" (weight {weight:.3f})" for weight in chosen.weights]
    print(f"{chosen.method} of {', '.join(f'{name}{weight}' for name, weight in zip(names, weights))}")
    if chosen.inverse_temperature is not None:
        print(
            "temperatures: "
            + ", ".join(f"{name} {1 / max(x, 1e-9):.3g}" for name, x in zip(names, chosen.inverse_temperature))
        )
    if chosen.weights is not None:
        for name, weight in zip(names, chosen.weights):
            if weight <= NO_WEIGHT:
                print(f"{name} gets no weight: out of fold it adds nothing to the others")


def print_letters(probabilities: np.ndarray, evidence: OOFPredictions | None) -> None:
    """How often each letter is answered, beside how often it is right in training."""
    width = probabilities.shape[1]
    counts = np.bincount(probabilities.argmax(1), minlength=width)
    trained = np.bincount(evidence.answers, minlength=width) / len(evidence.answers) if evidence else None
    print(
        "letters: "
        + ", ".join(
            f"{LETTERS[i]} {counts[i]} ({counts[i] / counts.sum():.1%}"
            + (f", in training {trained[i]:.1%})" if evidence else ")")
            for i in range(width)
        )
    )


def print_changes(before: dict[str, str], ids: list[str], probabilities: np.ndarray) -> None:
    """How many answers differ from the submission that is written over."""
    if not before:
        return
    if before.keys() != set(ids):
        print("the submission that was there had other ids")
        return
    differing = sum(before[row_id] != letter for row_id, letter in zip(ids, letters(probabilities)))
    print(f"{differing} of {len(ids)} answers differ from the submission that was there")


def log_ensemble(
    output: Path,
    args: argparse.Namespace,
    files: list[str],
    chosen: Ensemble,
    evidence: OOFPredictions | None,
    seconds: float,
) -> str:
    """Add the ensemble to the experiment log, with what it scores on out-of-fold rows that it was not fitted on."""
    cards, known = [read_card(file) for file in files], {}
    if evidence:
        answers, clusters = evidence.answers, evidence.clusters
        method = chosen.method if len(evidence.stack) > 1 else "mean"  # of one model each row has one opinion
        values = nested(method, evidence.stack, answers, clusters, args.temperature, args.weight_by)
        scores = score_with_interval(values, answers, clusters)
        if method == "majority":  # shares of votes are no probabilities
            del scores["log_loss"]
        known = {"scores": scores, "truth": evidence.truth, "out_of_fold": (evidence.ids, values)}
    data = cards[0].get("data", "")
    parents = [card.get("run", "") for card in cards]
    return log_run("ensemble", output, args.differing, seconds, data, parents=parents, **known)


if __name__ == "__main__":
    run_main(main)
