"""Out-of-fold rows: which belong to which prediction files, and whether they can be trusted.

A model is the folds of one run: prediction files in one folder whose names differ only in a number after "fold", such
as outputs/7b/fold0.csv and outputs/7b/fold1.csv. The folds' validation rows together are the model's out-of-fold rows,
on which models are tuned against each other. Folds of one model have no such rows in common.

The out-of-fold file of a prediction is the one in oof/ beside it, if `predict.py --oof` made it with the same weights
in the same views, and otherwise the one that training wrote beside the adapter. The untrained base model has only the
former; its out-of-fold rows are all rows.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.config.arguments import folds_path
from vqa.core.errors import UserError, preview
from vqa.core.io import read_json
from vqa.data.folds import read_folds
from vqa.data.predictions import read_card, read_predictions
from vqa.data.table import check_ids, read_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import chance_accuracy, row_log_loss
from vqa.evaluation.reference import Reference, pooled_reference

SAME_PREDICTION = ("model", "views", "gate")  # cards that agree in these keys are of the same weights and views
WEIGHTS = ("raw", "ema", "swa")


class MissingOOFError(UserError):
    """There are no out-of-fold rows to tune on; the message says why."""


@dataclass(frozen=True)
class OOFPredictions:
    """Out-of-fold rows that all models predicted.

    stack: probabilities (models, rows, letters). answers: their indices (rows,). labels: the answers' CSV.
    reference: chance and text-only accuracy.
    """

    ids: list[str]
    stack: np.ndarray
    answers: np.ndarray
    clusters: dict[str, np.ndarray]
    labels: Labels
    reference: Reference


def weights_folder(folder: str | Path, name: str) -> Path:
    """Where a fold's folder has the adapter of that name, one of WEIGHTS, and its out-of-fold file."""
    return Path(folder) if name == "raw" else Path(folder, name)


def model_name(fold: str | Path) -> str:
    """The common name of a model's folds: outputs/7b/fold* for outputs/7b/fold1."""
    return re.sub(r"fold\d+$", "fold*", str(fold))


def group_models(files: Sequence[str]) -> dict[str, list[str]]:
    """Name of a model -> its prediction files, in their order."""
    models: dict[str, list[str]] = {}
    for file in files:
        models.setdefault(model_name(Path(file).with_suffix("")), []).append(file)
    return {files[0] if len(files) == 1 else f"{name}.csv": files for name, files in models.items()}


def load_oof(
    models: Mapping[str, Sequence[str]],
    given: Mapping[str, str] | None = None,
    labels_csv: str | None = None,
    columns: Mapping | str | None = None,
) -> OOFPredictions:
    """The out-of-fold rows of `models`: from the files `given` (prediction -> out-of-fold file), or found by cards.

    `labels_csv` has their answers, in `columns` where the names do not say; by default the run's training CSV.

    Raises MissingOOFError where there are none, UserError where they cannot be trusted.
    """
    oof_files = {file: _oof_file(file, given) for files in models.values() for file in files}
    if plain_only := [
        file for file, oof in oof_files.items() if len(read_card(file).get("views", [])) > 1 and not read_card(oof)
    ]:
        print(
            f"{preview(plain_only)}: predicted with TTA, but the out-of-fold rows without. Run `predict.py --oof` "
            "with the same flags."
        )
    labels = _read_labels(list(oof_files.values()), labels_csv, columns)
    parts = {}
    for name, files in models.items():
        folds = [_read_checked(file, oof_files[file], labels) for file in files]
        ids = pd.Index([row_id for fold_ids, _ in folds for row_id in fold_ids])
        check_ids(f"{name}: out-of-fold rows", ids, "Give each prediction its own --oof file, in the same order.")
        parts[name] = ids, np.concatenate([values for _, values in folds])
    base = {name for name, files in models.items() if read_card(files[0]).get("weights") == "base"}
    first = next((name for name in parts if name not in base), next(iter(parts)))
    order = parts[first][0]
    for name, (ids, _) in parts.items():  # the base was trained on no row: those beside the others' do not matter
        differing = order.difference(ids) if name in base else order.symmetric_difference(ids)
        if len(differing):
            raise MissingOOFError(
                f"{first} and {name} were validated on different rows: {len(differing)} are in only one of them: "
                f"{preview(list(differing))}. Train and predict the same folds of both."
            )
    stack, ids = np.stack([values[ids.get_indexer(order)] for ids, values in parts.values()]), list(order)
    width = int(np.flatnonzero((stack > 0).any((0, 1)))[-1]) + 1  # letters up to the last that any row offers
    trained = [file for name, files in models.items() if name not in base for file in files]
    scores = [read_card(file).get("validation") or {} for file in trained]
    reference = pooled_reference(scores, chance_accuracy(stack[0]))
    return OOFPredictions(ids, stack[..., :width], labels.answers(ids), labels.clusters(ids), labels, reference)


def check_agreement(names: Sequence[str], members: np.ndarray, oof: OOFPredictions) -> None:
    """Raise UserError where two models agree on the rows to predict but not on the out-of-fold rows.

    `members` are the predictions (models, rows, letters). If ids were exchanged, a file still has valid ids and
    probabilities, and without training's own scores only this shows it.
    """
    for i, j in itertools.combinations(range(len(names)), 2):
        predicted, validated = (_correlation(stack[i], stack[j]) for stack in (members, oof.stack))
        error = np.sqrt(1 / members.shape[1] + 1 / oof.stack.shape[1])
        if validated < predicted / 4 and np.arctanh(min(predicted, 0.999)) - np.arctanh(validated) > 6 * error:
            worse = max(i, j, key=lambda m: row_log_loss(oof.stack[m], oof.answers).mean())
            raise UserError(
                f"{names[worse]}: its probabilities correlate with those of {names[i + j - worse]} on the rows to "
                f"predict ({predicted:.2f}) but not on the out-of-fold rows ({validated:.2f}), so the ids of its "
                "out-of-fold file were exchanged. Write that file again, or leave the model out."
            )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of two models' probabilities (rows, letters), relative to each row's mean over the letters that it offers."""
    offered = (first > 0) | (second > 0)
    gaps = [np.where(offered, values - 1 / offered.sum(1, keepdims=True), 0).ravel() for values in (first, second)]
    scale = np.sqrt((gaps[0] @ gaps[0]) * (gaps[1] @ gaps[1]))
    return float(gaps[0] @ gaps[1] / scale) if scale else 0.0


def _oof_file(file: str, given: Mapping[str, str] | None) -> Path:
    if given is not None:
        return Path(given[file])
    card, with_views = read_card(file), Path(file).parent / "oof" / Path(file).name
    if card and with_views.is_file() and all(read_card(with_views).get(k) == card.get(k) for k in SAME_PREDICTION):
        return with_views
    if card.get("weights") == "base":
        raise MissingOOFError(f"{file}: {with_views} is missing. Run `predict.py --base ARGS.json --oof`.")
    for key, how in {"image_size": "at image size {}", "cascade": "by a cascade"}.items():
        if card.get(key):
            raise MissingOOFError(
                f"{file}: predicted {how.format(card[key])}, and no out-of-fold rows are. Run `predict.py --oof` with "
                "the same flags."
            )
    if not card.get("adapter"):
        raise MissingOOFError(f"{file}: no card beside it names its adapter. Give --oof FILES and --labels train.csv.")
    path = Path(card["adapter"], "oof.csv")
    if not path.is_file() and is_of_all_rows(file):
        raise MissingOOFError(f"{file}: its model was trained on all rows. Use --method mean, geometric or majority.")
    if not path.is_file():
        raise MissingOOFError(f"{path}: no such file. Give the out-of-fold files with --oof, and --labels train.csv.")
    return path


def run_args(*files: str | Path) -> dict:
    """The args.json of the first run among those that prediction or out-of-fold files belong to; {} without any.

    It is beside the adapter or one folder above.
    """
    for file in files:
        adapter = Path(read_card(file).get("adapter") or Path(file).parent)
        for path in (adapter / "args.json", adapter.parent / "args.json"):
            if path.is_file():
                return read_json(path)
    return {}


def is_of_all_rows(file: str | Path) -> bool:
    """Whether the model of a prediction file was trained on all rows, so that it has no out-of-fold rows."""
    args = run_args(file)
    return "fold" in args and args["fold"] is None


def _read_labels(oof_files: Sequence[Path], csv: str | None, columns: Mapping | str | None) -> Labels:
    """The answers in `csv`; by default those in a run's training CSV, read as training read it."""
    args = run_args(*oof_files) or read_card(oof_files[0])  # the card of a base model's file has train_csv, too
    if csv and csv != args.get("train_csv"):
        return Labels(csv, columns)
    csv = args.get("train_csv")
    if not csv or not Path(csv).is_file():
        raise MissingOOFError(
            f"{oof_files[0]}: the training CSV is {csv or 'unknown'}, which is no file. Give it as --labels."
        )
    return Labels(csv, columns or args.get("columns"), args.get("answer_form"))


def _read_checked(file: str, oof: Path, labels: Labels) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities) of an out-of-fold file that has exactly its fold's rows and the score that was measured."""
    ids, probabilities = read_predictions(oof)
    check_fold(ids, oof)
    card = read_card(file)
    by_training = oof == Path(card.get("adapter") or "", "oof.csv")
    scores = card.get("validation") if by_training else read_card(oof).get("scores")
    if scores and scores.get("log_loss") is not None:
        check_measured(oof, probabilities, labels.answers(ids), scores["log_loss"], labels.path)
    return ids, probabilities


def read_fold_oof(folder: Path, weights: str, labels: Labels) -> tuple[list[str], np.ndarray]:
    """(ids, probabilities (rows, ten letters)) of a finished fold, checked: its rows, and the measured log-loss."""
    path = weights_folder(folder, weights) / "oof.csv"
    ids, probs = read_predictions(path)
    check_fold(ids, path)
    measured = read_json(folder / "metrics.json")["weights"][weights]["log_loss"]
    check_measured(path, probs, labels.answers(ids), measured, labels.path)
    return ids, probs


def check_measured(
    oof: Path, probabilities: np.ndarray, answers: np.ndarray, expected: float, labels_csv: str | Path
) -> None:
    """Raise UserError unless an out-of-fold file has the log-loss that was measured when it was written."""
    log_loss = row_log_loss(probabilities, answers).mean()
    if abs(log_loss - expected) > 1e-6 * max(1, expected):
        raise UserError(
            f"{oof}: its log-loss on {labels_csv} is {log_loss:.4f}, but was {expected:.4f} when it was written. Its "
            "ids were exchanged or the answers changed. Write it again, or leave that fold out."
        )


@lru_cache(maxsize=2)
def _ids_by_fold(folds_csv: Path, train_csv: str, changed: int) -> dict[int, frozenset[str]]:
    """The ids of each fold. The file is read once for all folds; `changed` is when it was written."""
    ids = read_table(folds_csv, ("id", "fold"))["id"]
    folds = read_folds(folds_csv, list(ids), train_csv)
    return {int(fold): frozenset(ids[folds == fold]) for fold in set(folds)}


def check_fold(ids: Sequence[str], oof: Path) -> None:
    """Raise UserError unless `ids` are the rows of the run's fold, by its args.json and folds file."""
    args = run_args(oof)
    if not args:
        return
    if args.get("fold") is None:
        raise UserError(f"{oof}: its model was trained on every row, so it has no out-of-fold rows. Leave it out.")
    folds_csv = folds_path(args.get("folds_csv"), args["train_csv"])
    if not folds_csv.is_file():
        raise MissingOOFError(f"{oof}: {folds_csv} is missing, so its rows cannot be checked. Copy that file.")
    fold_ids = _ids_by_fold(folds_csv, args["train_csv"], folds_csv.stat().st_mtime_ns).get(args["fold"], frozenset())
    if trained_on := [row_id for row_id in ids if row_id not in fold_ids]:
        raise UserError(
            f"{oof}: {len(trained_on)} rows are not of fold {args['fold']}, so its model was trained on them: "
            f"{preview(trained_on)}. Give the fold's own out-of-fold file."
        )
    if most := args.get("max_valid_rows"):
        raise UserError(f"{oof}: its run had max_valid_rows {most}. Leave it out, or train without max_valid_rows.")
    if missing := sorted(fold_ids - set(ids)):
        raise UserError(
            f"{oof}: {len(missing)} rows of fold {args['fold']} are missing: {preview(missing)}. Write it again."
        )
