"""Finished folds as training left them: what each of their weights said of the rows that were kept from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.io import read_json
from vqa.data.predictions import read_predictions
from vqa.evaluation.labels import Labels
from vqa.evaluation.oof import WEIGHTS, check_fold, check_measured, model_name, weights_folder

BEST = "best"


@dataclass(frozen=True)
class Fold:
    """A fold's folder.

    scores: weights -> their best validation ("accuracy", "log_loss", "step"), of which `best` names the best.
    oof: weights -> out-of-fold probabilities, a row an id and ten letters. history: what each validation logged.
    """

    folder: Path
    number: int
    best: str
    scores: dict[str, dict]
    oof: dict[str, pd.DataFrame]
    history: list[dict]


@dataclass(frozen=True)
class Model:
    """The folds of one run. Each validated other rows; put together they are the model's out-of-fold set."""

    name: str
    folds: list[Fold]

    @property
    def weights(self) -> list[str]:
        """The weights that every fold has, beside the best ones."""
        return [name for name in WEIGHTS if all(name in fold.oof for fold in self.folds)]

    def oof(self, weights: str = BEST) -> pd.DataFrame:
        """Probabilities (rows, ten letters) of all folds by id; of each fold its best weights, or those named."""
        return pd.concat([fold.oof[fold.best if weights == BEST else weights] for fold in self.folds])

    def fold_of_row(self) -> pd.Series:
        return pd.concat([pd.Series(fold.number, index=fold.oof[fold.best].index) for fold in self.folds])


@dataclass
class Results:
    """Models on the out-of-fold rows that all of them have.

    models: by their short names, M1, M2, ...; best: probabilities (rows, letters) of each model's best weights.
    """

    models: dict[str, Model]
    truth: Labels
    ids: list[str]
    answers: np.ndarray
    best: dict[str, np.ndarray]
    left_out: int

    def clusters(self, at=slice(None)) -> dict[str, np.ndarray]:
        return self.truth.clusters(np.array(self.ids, dtype=object)[at])

    def by_weights(self, name: str) -> dict[str, np.ndarray]:
        """Weights -> probabilities (rows, letters) of a model, for the weights that each of its folds has."""
        model = self.models[name]
        return {weights: model.oof(weights).loc[self.ids].to_numpy() for weights in model.weights}

    def right(self, name: str) -> np.ndarray:
        """Whether a model's best weights answer each row rightly, bool (rows,)."""
        return self.best[name].argmax(1) == self.answers


def put_together(models: Sequence[Model], truth: Labels) -> Results:
    tables = {f"M{number}": model.oof() for number, model in enumerate(models, start=1)}
    first, *others = tables.values()
    ids = [row_id for row_id in first.index if all(row_id in other.index for other in others)]
    if not ids:
        raise UserError("the models were not validated on any common row; analyse them one at a time")
    return Results(
        models=dict(zip(tables, models)),
        truth=truth,
        ids=ids,
        answers=truth.answers(ids),
        best={name: table.loc[ids].to_numpy() for name, table in tables.items()},
        left_out=len(set().union(*(table.index for table in tables.values()))) - len(ids),
    )


def finished(folders: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(the folders that hold a finished fold, the others): `checkpoints/*/` catches more than folds.

    One that was trained on every row is among the others: it has no row to be judged by.
    """
    paths = [Path(folder) for folder in dict.fromkeys(folders)]
    done = [
        path
        for path in paths
        if (path / "metrics.json").is_file() and read_json(path / "args.json").get("fold") is not None
    ]
    if not done:
        raise UserError(f"{preview(folders)}: no finished fold among them; train one with train_fold.py")
    return done, [path for path in paths if path not in done]


def training_csv(folders: Sequence[Path]) -> tuple[str, str | None]:
    """(train_csv, image_root) that all of the folds were trained on."""
    found = {(args["train_csv"], args.get("image_root")) for args in (read_json(f / "args.json") for f in folders)}
    if len(found) > 1:
        named = preview(sorted(csv for csv, _ in found))
        raise UserError(f"the folds were trained on different data ({named}); analyse them in two commands")
    return found.pop()


def read_models(folders: Sequence[Path], truth: Labels) -> list[Model]:
    """The models that the folds make up: those in one folder whose names differ only in the number after "fold"."""
    grouped: dict[str, list[Fold]] = {}
    for folder in sorted(folders):
        grouped.setdefault(model_name(folder), []).append(read_fold(folder, truth))
    models = []
    for name, folds in grouped.items():
        numbers = [fold.number for fold in folds]
        if len(set(numbers)) < len(numbers):
            raise UserError(f"{name}: fold {preview([n for n in numbers if numbers.count(n) > 1][:1])} is there twice")
        models.append(Model(name if len(folds) > 1 else str(folds[0].folder), folds))
    return models


def read_fold(folder: Path, truth: Labels) -> Fold:
    """A finished fold, its files checked: the very rows of the fold, scoring what training measured."""
    metrics, fold = read_json(folder / "metrics.json"), read_json(folder / "args.json")["fold"]
    oof = {}
    for name in WEIGHTS:
        path = weights_folder(folder, name) / "oof.csv"
        if name in metrics["weights"] and path.is_file():
            ids, probabilities = read_predictions(path)
            check_fold(ids, path)
            check_measured(path, probabilities, truth.answers(ids), metrics["weights"][name]["log_loss"], truth.path)
            oof[name] = pd.DataFrame(probabilities, index=ids)
    if metrics["best"] not in oof:
        raise UserError(f"{folder}: the out-of-fold file of its {metrics['best']} weights is missing; train it again")
    history = folder / "history.json"
    logged = read_json(history) if history.is_file() else []
    return Fold(folder, fold, metrics["best"], metrics["weights"], oof, logged)


def curve(fold: Fold, weights: str, score: str) -> np.ndarray:
    """(validations, 2): step and "accuracy" or "log_loss" of these weights at each validation that scored them."""
    key = f"eval_{score}" if weights == "raw" else f"eval_{weights}_{score}"
    return np.array([(logs["step"], logs[key]) for logs in fold.history if key in logs]).reshape(-1, 2)
