"""Out-of-fold rows: which belong to which prediction files, and whether they may be trusted.

A model is the folds of one run. Its folds validated disjoint rows, so weights between folds cannot be tuned on rows
that two of them have in common; put together, the folds' rows are the model's out-of-fold set, and on those sets
models are tuned against each other. Prediction files are one model where they lie in one folder and their names differ
only in a number after "fold": outputs/7b/fold0.csv, outputs/7b/fold1.csv, ...

Each prediction's out-of-fold file lies beside its adapter, as training wrote it, or, by `predict.py --oof`, in oof/
beside the prediction; that one is taken where it was made by the same weights in the same views.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.config.arguments import folds_path
from vqa.core.errors import UserError, preview
from vqa.core.io import read_json
from vqa.data.folds import read_folds
from vqa.data.predictions import read_card, read_predictions
from vqa.data.table import read_table
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import row_log_loss

ASKED = ("model", "views", "gate")  # what a card says of how rows were asked


WEIGHTS = ("raw", "ema", "swa")


class MissingOOFError(UserError):
    """There are no out-of-fold rows to tune on; the message says why."""


@dataclass(frozen=True)
class OOFPredictions:
    """Out-of-fold rows that all models predicted: stack (models, rows, letters), answers' indices (rows,)."""

    ids: list[str]
    stack: np.ndarray
    answers: np.ndarray
    clusters: dict[str, np.ndarray]
    truth: str | Path


def weights_folder(folder: str | Path, name: str) -> Path:
    """Where a fold's folder holds the adapter of that name, one of WEIGHTS, and its out-of-fold file."""
    return Path(folder) if name == "raw" else Path(folder, name)


def model_name(fold: str | Path) -> str:
    """What the folds of one model are called together: outputs/7b/fold* for outputs/7b/fold1."""
    return re.sub(r"fold\d+$", "fold*", str(fold))


def group_models(files: Sequence[str]) -> dict[str, list[str]]:
    """Name of a model -> its prediction files, in their order."""
    models: dict[str, list[str]] = {}
    for file in files:
        models.setdefault(model_name(Path(file).with_suffix("")), []).append(file)
    return {files[0] if len(files) == 1 else f"{name}.csv": files for name, files in models.items()}


def load_oof(
    models: Mapping[str, Sequence[str]], given: Mapping[str, str] | None = None, truth: str | None = None
) -> OOFPredictions:
    """The out-of-fold rows of `models`: those `given` (prediction file -> out-of-fold file), or found by their cards.

    Raises NoEvidence where there are none, UserError where there are some that cannot be trusted.
    """
    found = {file: _out_of_fold_file(file, given) for files in models.values() for file in files}
    if unlike := [
        file for file, oof in found.items() if len(read_card(file).get("views", [])) > 1 and not read_card(oof)
    ]:
        print(f"{preview(unlike)}: made with TTA, out of fold without; `predict.py --oof` in the same views mends it")
    answers_csv = Labels(truth or _training_csv(next(iter(found.values()))))
    parts = {}
    for name, files in models.items():
        read = [_read_checked(file, found[file], answers_csv) for file in files]
        ids = pd.Index([row_id for ids, _ in read for row_id in ids])
        if twice := list(ids[ids.duplicated()]):
            raise UserError(
                f"{name}: {len(twice)} out-of-fold rows stand in two of its folds: {preview(twice)}; give each "
                "prediction its own out-of-fold file, in the same order"
            )
        parts[name] = ids, np.concatenate([values for _, values in read])
    (first, (order, _)), *_ = parts.items()
    for name, (ids, _) in parts.items():
        if len(differing := order.symmetric_difference(ids)):
            raise MissingOOFError(
                f"{first} and {name} were not validated on the same rows: {len(differing)} are in one only: "
                f"{preview(list(differing))}; train and predict the same folds of both"
            )
    stack = np.stack([values[ids.get_indexer(order)] for ids, values in parts.values()])
    ids = list(order)
    answers, clusters = answers_csv.answers(ids), answers_csv.clusters(ids)
    return OOFPredictions(ids, stack[..., : _width(stack)], answers, clusters, answers_csv.path)


def check_agreement(names: Sequence[str], members: np.ndarray, evidence: OOFPredictions) -> None:
    """Refuse a model that agrees with another on the rows to predict and not at all out of fold.

    `members` (models, rows, letters) are the predictions. Exchanged ids leave a file's ids and probabilities valid,
    and nothing else shows them where training's own measure is not at hand.
    """
    for i, j in itertools.combinations(range(len(names)), 2):
        here, there = (_correlation(stack[i], stack[j]) for stack in (members, evidence.stack))
        error = np.sqrt(1 / members.shape[1] + 1 / evidence.stack.shape[1])
        if there < here / 4 and np.arctanh(min(here, 0.999)) - np.arctanh(there) > 6 * error:
            worse = max(i, j, key=lambda m: row_log_loss(evidence.stack[m], evidence.answers).mean())
            other = names[i + j - worse]
            raise UserError(
                f"{names[worse]}: its probabilities go with those of {other} on the rows to predict (correlation "
                f"{here:.2f}) and not on the out-of-fold rows ({there:.2f}), so the ids of its out-of-fold file were "
                "exchanged; make that file anew, or leave the model out"
            )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of two models' probabilities (rows, letters), each row taken from its mean over the letters it offers."""
    offered = (first > 0) | (second > 0)
    gaps = [np.where(offered, values - 1 / offered.sum(1, keepdims=True), 0).ravel() for values in (first, second)]
    scale = np.sqrt((gaps[0] @ gaps[0]) * (gaps[1] @ gaps[1]))
    return float(gaps[0] @ gaps[1] / scale) if scale else 0.0


def _width(stack: np.ndarray) -> int:
    """Letters up to the last that any row offers."""
    return int(np.flatnonzero((stack > 0).any((0, 1)))[-1]) + 1


def _out_of_fold_file(file: str, given: Mapping[str, str] | None) -> Path:
    if given is not None:
        return Path(given[file])
    card, same = read_card(file), Path(file).parent / "oof" / Path(file).name
    if not card.get("adapter"):
        raise MissingOOFError(f"{file}: no card beside it names its adapter; give --oof FILES and --labels train.csv")
    if same.is_file() and all(read_card(same).get(key) == card.get(key) for key in ASKED):
        return same
    path = Path(card["adapter"], "oof.csv")
    if not path.is_file():
        raise MissingOOFError(f"{path}: not there; give the out-of-fold files with --oof, and --labels train.csv")
    return path


def _run_args(oof: Path) -> dict:
    """The args.json of the run that an out-of-fold file belongs to: it lies with the adapter, or one folder above."""
    adapter = Path(read_card(oof).get("adapter") or oof.parent)
    places = (adapter / "args.json", adapter.parent / "args.json")
    return next((read_json(place) for place in places if place.is_file()), {})


def _training_csv(oof: Path) -> str:
    csv = _run_args(oof).get("train_csv")
    if not csv or not Path(csv).is_file():
        raise MissingOOFError(f"{oof}: the training CSV with its answers is {csv or 'unknown'}; give it as --labels")
    return csv


def _read_checked(file: str, oof: Path, truth: Labels) -> tuple[list[str], np.ndarray]:
    """An out-of-fold file: the very rows of its fold, and scoring what training measured on them."""
    ids, probabilities = read_predictions(oof)
    check_fold(ids, oof)
    card = read_card(file)
    measured = (
        card.get("validation") if oof == Path(card.get("adapter") or "", "oof.csv") else read_card(oof).get("scores")
    )
    if (expected := (measured or {}).get("log_loss")) is not None:  # one given may be of other views
        check_measured(oof, probabilities, truth.answers(ids), expected, truth.path)
    return ids, probabilities


def check_measured(
    oof: Path, probabilities: np.ndarray, answers: np.ndarray, expected: float, truth: str | Path
) -> None:
    """Refuse an out-of-fold file whose log-loss is not the one measured when it was made."""
    got = row_log_loss(probabilities, answers).mean()
    if abs(got - expected) > 1e-6 * max(1, expected):
        raise UserError(
            f"{oof}: its log-loss against {truth} is {got:.4f} and was {expected:.4f} when it was made; its ids "
            "were exchanged or the answers changed: make it anew, or leave that fold out"
        )


def check_fold(ids: Sequence[str], oof: Path) -> None:
    """Refuse rows that the model was trained on, by the run's args.json and folds file."""
    args = _run_args(oof)
    if not args:
        return
    if args.get("fold") is None:
        raise UserError(f"{oof}: its model was trained on every row, so none is out of fold; leave it out")
    folds_csv = folds_path(args.get("folds_csv"), args["train_csv"])
    if not folds_csv.is_file():
        raise MissingOOFError(
            f"{oof}: {folds_csv} is not there to show that its rows were left out of training; copy it"
        )
    all_ids = list(read_table(folds_csv, ("id", "fold"))["id"])
    folds = read_folds(folds_csv, all_ids, args["train_csv"])
    own = {row_id for row_id, fold in zip(all_ids, folds) if fold == args["fold"]}
    if trained_on := [row_id for row_id in ids if row_id not in own]:
        raise UserError(
            f"{oof}: {len(trained_on)} rows are not of fold {args['fold']}, so its model trained on them: "
            f"{preview(trained_on)}; give the fold's own out-of-fold file"
        )
    if missing := sorted(own - set(ids)):
        raise UserError(f"{oof}: {len(missing)} rows of fold {args['fold']} are missing: {preview(missing)}")
