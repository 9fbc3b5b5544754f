"""Finished folds as training wrote them: the out-of-fold probabilities of each of their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vqa.core.errors import UserError, preview
from vqa.core.io import read_json
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import chance_accuracy
from vqa.evaluation.oof import WEIGHTS, model_name, read_fold_oof, weights_folder
from vqa.evaluation.reference import Reference, pooled_reference


@dataclass(frozen=True)
class Fold:
    """A fold's folder.

    scores: weights -> their best validation ("accuracy", "log_loss", "step"). best: name of the best weights.
    oof: weights -> out-of-fold probabilities, one row for each id, ten letters. history: the log of each validation.
    """

    folder: Path
    number: int
    best: str
    scores: dict[str, dict]
    oof: dict[str, pd.DataFrame]
    history: list[dict]

    def curve(self, weights: str, score: str) -> np.ndarray:
        """Step and "accuracy" or "log_loss" of these weights at each validation that scored them, (validations, 2)."""
        key = f"eval_{score}" if weights == "raw" else f"eval_{weights}_{score}"
        return np.array([(logs["step"], logs[key]) for logs in self.history if key in logs]).reshape(-1, 2)


@dataclass(frozen=True)
class Model:
    """The folds of one run. Each validated different rows; together these are the model's out-of-fold rows."""

    name: str
    folds: list[Fold]

    @property
    def weights(self) -> list[str]:
        """The weights that every fold has."""
        return [name for name in WEIGHTS if all(name in fold.oof for fold in self.folds)]

    def oof(self, weights: str | None = None) -> pd.DataFrame:
        """Probabilities (rows, ten letters) of all folds by id, from these weights or from each fold's best ones."""
        return pd.concat([fold.oof[weights or fold.best] for fold in self.folds])

    def fold_of_row(self) -> pd.Series:
        return pd.concat([pd.Series(fold.number, index=fold.oof[fold.best].index) for fold in self.folds])


@dataclass
class Results:
    """Models on the out-of-fold rows that all of them have.

    models: by their short names, M1, M2, ...; probs: probabilities (rows, letters) of each model's best weights.
    """

    models: dict[str, Model]
    labels: Labels
    ids: list[str]
    answers: np.ndarray
    probs: dict[str, np.ndarray]
    left_out: int

    def clusters(self, rows=slice(None)) -> dict[str, np.ndarray]:
        return self.labels.clusters(np.array(self.ids, dtype=object)[rows])

    def by_weights(self, name: str) -> dict[str, np.ndarray]:
        """Weights -> probabilities (rows, letters) of a model, for the weights that each of its folds has."""
        model = self.models[name]
        return {weights: model.oof(weights).loc[self.ids].to_numpy() for weights in model.weights}

    def reference(self, name: str) -> Reference:
        """Chance, and the text-only accuracy that training measured on a model's folds."""
        scores = [{"rows": len(fold.oof[fold.best]), **fold.scores[fold.best]} for fold in self.models[name].folds]
        return pooled_reference(scores, chance_accuracy(self.probs[name]))

    def correct(self, name: str) -> np.ndarray:
        """Whether a model's best weights answer each row correctly, bool (rows,)."""
        return self.probs[name].argmax(1) == self.answers

    def prefix(self, name: str) -> str:
        """What a sentence about a model starts with: nothing if there is only one."""
        return f"{name}: " if len(self.models) > 1 else ""


def load_results(folders: Sequence[Path], labels: Labels) -> Results:
    """Read finished folds, group them into models, and keep the rows that all models have."""
    models = {f"M{number}": model for number, model in enumerate(read_models(folders, labels), start=1)}
    tables = {name: model.oof() for name, model in models.items()}
    first, *others = tables.values()
    ids = [row_id for row_id in first.index if all(row_id in other.index for other in others)]
    if not ids:
        raise UserError("the models have no validation row in common. Analyse them one at a time.")
    return Results(
        models=models,
        labels=labels,
        ids=ids,
        answers=labels.answers(ids),
        probs={name: table.loc[ids].to_numpy() for name, table in tables.items()},
        left_out=len(set().union(*(table.index for table in tables.values()))) - len(ids),
    )


def find_finished_folds(folders: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(folders with a finished fold, the other folders): `checkpoints/*/` matches more than folds.

    A run that trained on every row (fold null) is among the others: it has no out-of-fold rows.
    """
    paths = [Path(folder) for folder in dict.fromkeys(folders)]
    finished = [
        path
        for path in paths
        if (path / "metrics.json").is_file() and read_json(path / "args.json").get("fold") is not None
    ]
    if not finished:
        raise UserError(f"{preview(list(folders))}: no finished fold in there. Train one with train_fold.py.")
    return finished, [path for path in paths if path not in finished]


def training_csv(folders: Sequence[Path]) -> tuple[str, str | None, dict]:
    """(train_csv, image_root, the `reader_options`) of the folds' args."""
    args = [read_json(folder / "args.json") for folder in folders]
    sources = {(values["train_csv"], values.get("image_root")) for values in args}
    if len(sources) > 1:
        names = preview(sorted(csv for csv, _ in sources))
        raise UserError(f"the folds were trained on different data ({names}). Analyse them in separate commands.")
    return *sources.pop(), {name: args[0].get(name) for name in ("columns", "answer_form")}


def read_models(folders: Sequence[Path], labels: Labels) -> list[Model]:
    """One model for the folders in one place whose names differ only in the number after "fold"."""
    grouped: dict[str, list[Fold]] = {}
    for folder in sorted(folders):
        grouped.setdefault(model_name(folder), []).append(read_fold(folder, labels))
    for name, folds in grouped.items():
        numbers = [fold.number for fold in folds]
        if repeated := [number for number in numbers if numbers.count(number) > 1]:
            raise UserError(f"{name}: fold {repeated[0]} is there twice. Give each fold once.")
    return [Model(name if len(folds) > 1 else str(folds[0].folder), folds) for name, folds in grouped.items()]


def read_fold(folder: Path, labels: Labels) -> Fold:
    """A finished fold. Its out-of-fold files must hold the fold's rows, with the log-loss that training measured."""
    metrics, number = read_json(folder / "metrics.json"), read_json(folder / "args.json")["fold"]
    scores = metrics["weights"]
    oof = {}
    for name in WEIGHTS:
        if name in scores and (weights_folder(folder, name) / "oof.csv").is_file():
            ids, probs = read_fold_oof(folder, name, labels)
            oof[name] = pd.DataFrame(probs, index=ids)
    if metrics["best"] not in oof:
        raise UserError(f"{folder}: the out-of-fold file of its {metrics['best']} weights is missing. Train it again.")
    history = folder / "history.json"
    return Fold(folder, number, metrics["best"], scores, oof, read_json(history) if history.is_file() else [])
