"""Combine prediction files into a submission.

    python ensemble.py outputs/*.csv                                   # writes outputs/submission.csv
    python ensemble.py outputs/fold*.csv outputs/7b/fold*.csv          # two models
    python ensemble.py outputs/*.csv --method majority
    python ensemble.py a.csv b.csv --oof oof_a.csv oof_b.csv --labels data/train.csv
    python ensemble.py --compare a.csv b.csv --labels data/train.csv   # better, worse, or within noise?

Files in one folder whose names differ only in the number after "fold" are the folds of one model: they are averaged.
Models are tuned against each other on their out-of-fold rows. --method auto takes the method with the lowest log-loss
on out-of-fold rows that it was not fitted on, and prints the gain over the mean. With one model, or without
out-of-fold rows, it takes the mean.

Accuracies are printed with their 95 % interval (low, high). Rows are joined by id; the submission has the ids and the
order of the sample submission.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.cli import add_hidden_alias, make_parser, non_default_args
from vqa.core.errors import UserError, preview, run_main
from vqa.data.answers import FORMS, AnswerForm
from vqa.data.predictions import is_prediction_file, join, read_card, write_probabilities
from vqa.data.rows import LETTERS, Row, read_questions
from vqa.data.submission import check_offered, count_changes, read_previous, read_submission_form, write_submission
from vqa.data.table import read_table
from vqa.evaluation.all_rows import print_estimates
from vqa.evaluation.ensembling import BY_TYPE, METHODS, TUNED, choose_ensemble, ensemble_members, nested_scores
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy, row_log_loss
from vqa.evaluation.oof import MissingOOFError, OOFPredictions, check_agreement, group_models, load_oof, run_args
from vqa.evaluation.question_types import question_types
from vqa.evaluation.reference import model_warning
from vqa.evaluation.significance import error_overlap, print_comparison


def main() -> None:
    start, (args, cli_args) = time.time(), parse_args()
    if args.compare:
        ids, stack = join(args.compare)
        return print_comparison(*args.compare, ids, stack, Labels(args.labels, args.columns))
    files, oof_files = find_prediction_files(args.predictions, args.oof)
    output = Path(args.output or Path(files[0]).parent / "submission.csv")
    check_probabilities_path(args.probabilities, files)
    before = read_previous(output)
    models = group_models(files)
    ids, stack = join(files)
    test_csv, sample = find_test_csv(files[0], args.sample)
    run = run_args(*files)
    rows = read_questions(test_csv, run.get("columns")) if test_csv else {}
    choices = {row_id: row["choices"] for row_id, row in rows.items()}
    if test_csv:
        check_offered(test_csv, ids, stack.max(0), choices)
    oof = find_oof(models, oof_files, args)
    names, members = ensemble_members(models, files, stack)
    if oof and len(models) > 1:
        check_agreement(names, members, oof)
    chosen = choose_ensemble(models, oof, args.method, args.temperature, args.weight_by)
    probabilities = chosen(members, test_types(args.method, ids, rows))
    if args.known_answers:
        use_known_answers(args.known_answers, ids, probabilities)
    form = None
    if sample:
        form = read_submission_form(sample, ids, choices, train_answer_form(run, oof), args.answer_form)
    write_submission(output, ids, probabilities, form, choices)
    if args.probabilities:
        write_probabilities(args.probabilities, ids, probabilities)
    print(chosen.describe(names))
    print_letters(probabilities, oof)
    print_changes(before, output)
    cards = [read_card(file) for file in files]
    scores = nested_scores(chosen, oof, args.weight_by) if oof else {}
    parents, data = [card.get("run", "") for card in cards], cards[0].get("data", "")
    run_id = log_run("ensemble", output, cli_args, time.time() - start, data, parents=parents, **scores)
    like = f"like {sample}: {form}" if sample else "no sample submission, so id,answer in the order of the predictions"
    print(f"{output}: {len(ids)} rows, {like}" + (f"; {run_id} in the experiment log" if run_id else ""))


def parse_args() -> tuple[argparse.Namespace, dict]:
    """(the arguments, those that differ from their defaults, for the experiment log)."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("predictions", nargs="*", help="files that predict.py wrote; earlier submissions among them are ignored")
    add(
        "--method",
        choices=("auto", *METHODS, BY_TYPE),
        default="auto",
        help="mean: of probabilities; geometric: of log-probabilities; weighted: mean, by out-of-fold score; greedy: "
        "mean of members selected one by one; stack: logistic regression on log-probabilities, a coefficient per "
        "model; majority: of votes; stack_by_type: stack with coefficients for each question type, shrunk "
        "towards those of all rows; auto: of the others, the one with the lowest out-of-fold log-loss (default: auto)",
    )
    add("--temperature", action="store_true", help="first calibrate each model's confidence on its out-of-fold rows")
    add(
        "--weight_by",
        choices=("log_loss", "accuracy"),
        default="log_loss",
        help="score behind the weights of --method weighted (default: log_loss)",
    )
    add(
        "--oof",
        nargs="+",
        metavar="FILE",
        help="out-of-fold files, one per prediction in the same order (default: found beside the adapters)",
    )
    add("--labels", metavar="CSV", help="CSV with the answers (default: the train.csv that the folds were trained on)")
    add("--columns", metavar="JSON", help="which column of --labels is which, as the field `columns` of an args file")
    add("--compare", nargs=2, metavar=("A", "B"), help="only compare two files: is B better than A on --labels?")
    add("--sample", metavar="CSV", help="sample submission (default: sample_submission.csv beside the test CSV)")
    add("--answer_form", choices=FORMS, help="how the submission writes answers, where the sample does not show it")
    add(
        "--known_answers",
        metavar="CSV",
        help="CSV with `id,answer`, answers as letters: these rows are answered so. explore.py writes such a file; "
        "read the contest's rules before you use it (default: none)",
    )
    add("--output", metavar="CSV", help="the submission (default: submission.csv beside the first file)")
    add("--probabilities", metavar="CSV", help="also write the probabilities, usable as a pseudo_csv in training")
    add_hidden_alias(parser, "--truth", "--labels")
    args = parser.parse_args()
    if args.compare and (args.predictions or not args.labels):
        raise UserError("--compare takes two files and their --labels, and no other predictions.")
    if not args.compare and not args.predictions:
        raise UserError("no predictions given. Name the files that predict.py wrote, such as outputs/*.csv.")
    return args, non_default_args(parser, args)


def find_prediction_files(paths: list[str], oof: list[str] | None) -> tuple[list[str], dict[str, str] | None]:
    """(the prediction files among `paths`, sorted, without submissions; the out-of-fold file of each, if given)."""
    for path in [*paths, *(oof or [])]:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file. Write predictions with predict.py first.")
    files = list(dict.fromkeys(path for path in paths if is_prediction_file(path)))
    if not files:
        raise UserError(f"none of the {len(paths)} files has probabilities. Give those that predict.py wrote.")
    if ignored := [path for path in paths if path not in files]:
        print(f"ignored, because they have no probabilities: {preview(ignored)}")
    if oof and len(oof) != len(files):
        raise UserError(f"{len(files)} predictions but {len(oof)} --oof files. Give one each, in the same order.")
    return sorted(files), dict(zip(files, oof)) if oof else None


def check_probabilities_path(path: str | None, files: list[str]) -> None:
    """Raise UserError where the next `outputs/*.csv` would read the ensemble's probabilities as another model's."""
    if path and Path(path).parent.resolve() in {Path(file).parent.resolve() for file in files}:
        other = Path(path).parent / "ensemble" / Path(path).name
        raise UserError(f"{path} is in the folder of the predictions. Choose another folder, such as {other}.")


def find_test_csv(file: str, sample: str | None) -> tuple[str | None, str | Path | None]:
    """(the CSV that a file predicts, by its card; the sample submission: the one given or beside that CSV)."""
    test_csv = read_card(file).get("test_csv")
    if not test_csv or not Path(test_csv).is_file():
        return None, sample
    beside = Path(test_csv).with_name("sample_submission.csv")
    return test_csv, sample or (beside if beside.is_file() else None)


def find_oof(models: dict, oof_files: dict | None, args: argparse.Namespace) -> OOFPredictions | None:
    """The out-of-fold rows, with each model's score printed; None, and the reason, if they are not needed."""
    try:
        oof = load_oof(models, oof_files, args.labels, args.columns)
    except MissingOOFError as reason:
        if oof_files or args.temperature or args.method in TUNED:
            raise
        print(f"no out-of-fold rows: {reason}")
        print_estimates([file for files in models.values() for file in files])
        return None
    for name, member in zip(models, oof.stack):
        score = accuracy(member.argmax(1) == oof.answers, oof.clusters)
        loss = row_log_loss(member, oof.answers).mean()
        print(f"{name}: out-of-fold accuracy {score}, log-loss {loss:.4f}, {len(oof.answers)} rows ({oof.reference})")
        if warning := model_warning(name, member, oof.answers, oof.reference, oof.clusters):
            print(warning)
    if len(models) > 1:
        print(error_overlap(oof.stack.argmax(-1), oof.answers).describe(list(models)))
    return oof


def test_types(method: str, ids: list[str], rows: dict[str, Row]) -> np.ndarray | None:
    """The question types (rows,) of the rows to predict, for a method that needs them."""
    if method != BY_TYPE:
        return None
    if not rows:
        raise UserError(
            f"--method {BY_TYPE} reads the questions of the test CSV, which is missing. Use another method."
        )
    return question_types([rows[row_id] for row_id in ids])


def use_known_answers(path: str, ids: list[str], probabilities: np.ndarray) -> None:
    """Set `probabilities` (rows, letters) of the rows in a CSV with `id,answer` to its answers. Print how many."""
    table = read_table(path, ("id", "answer"))
    rows = pd.Index(ids).get_indexer(table["id"])
    if unknown := list(table["id"][rows < 0]):
        raise UserError(f"{path}: {len(unknown)} ids are not predicted: {preview(unknown)}. Delete these rows.")
    width = probabilities.shape[1]
    answers = table["answer"].map({letter: i for i, letter in enumerate(LETTERS[:width])}).fillna(-1).to_numpy(int)
    if wrong := list(table["id"][(answers < 0) | (probabilities[rows, answers] == 0)]):
        raise UserError(f"{path}: {len(wrong)} rows do not offer their answer: {preview(wrong)}. Correct them.")
    changed = (probabilities[rows].argmax(1) != answers).sum()
    probabilities[rows] = np.eye(width)[answers]
    print(f"known answers: {len(rows)} rows are answered as in {path}, {changed} of them not as predicted")


def print_letters(probabilities: np.ndarray, oof: OOFPredictions | None) -> None:
    """How often each letter is answered and, with out-of-fold rows, how often it is right in training."""
    counts = np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])
    parts = [f"{letter} {count} ({count / len(probabilities):.1%}" for letter, count in zip(LETTERS, counts)]
    if oof:
        right = np.bincount(oof.answers, minlength=len(counts)) / len(oof.ids)
        parts = [f"{part}, in training {rate:.1%}" for part, rate in zip(parts, right)]
    print(f"letters: {'), '.join(parts)})")


def print_changes(before: pd.DataFrame | None, output: Path) -> None:
    """How many rows differ from the submission that was overwritten."""
    if before is not None:
        after = read_table(output, ())
        changed = count_changes(before, after)
        differ = (
            "it has other columns or ids than" if changed is None else f"{changed} of {len(after)} answers differ from"
        )
        print(f"{differ} the previous submission")


def train_answer_form(run: dict, oof: OOFPredictions | None) -> AnswerForm | None:
    """How the training CSV of a run writes answers, if it is there."""
    csv = run.get("train_csv")
    if oof and oof.labels.path == csv:  # it is read already
        return oof.labels.form
    if not csv or not Path(csv).is_file():
        return None
    return Labels(csv, run.get("columns"), run.get("answer_form")).form


if __name__ == "__main__":
    run_main(main)
