"""The ladder's content: the models that it trains, the ways it predicts with them, and the rungs it compares."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vqa.evaluation.ensembling import fit
from vqa.evaluation.oof import load_oof

FOLDS = [f"fold{i}" for i in range(3)]
NATIVE = 252  # px: the size of the contest's images; args/bench has half of it
PERMUTATIONS = ("--num_permutations", "4")


@dataclass(frozen=True)
class Run:
    """A model to train: the fields that differ from args/bench/base.json, and the runs that must be finished before.

    In texts, {seed} is the ladder's seed, {folder} has the seed's models, {data} the contest. `cost` is relative to
    that of one fold: the expensive runs begin first.
    """

    fields: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    cost: float = 1.0


@dataclass(frozen=True)
class Rung:
    """A line of the table: the prediction files `view/run` that it combines, and the rung that it builds on."""

    before: str | None
    files: tuple[str, ...]
    combine: Callable | None = None  # (files' paths, probabilities (files, rows, letters)) -> (rows, letters)


def of_folds(prefix: str, cost: float = 1.0, **fields) -> dict[str, Run]:
    return {f"{prefix}{name}": Run({"fold": i} | fields, cost=cost) for i, name in enumerate(FOLDS)}


def files(view: str, prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{view}/{prefix}{name}" for name in FOLDS)


def stacked(paths: list[str], stack: np.ndarray, models: int) -> np.ndarray:
    """The stack of `models` models, three folds each, fitted on their out-of-fold rows."""
    names = [paths[i : i + len(FOLDS)] for i in range(0, len(paths), len(FOLDS))]
    oof = load_oof({str(number): list(map(str, own)) for number, own in enumerate(names)})
    members = stack.reshape(models, len(FOLDS), *stack.shape[1:]).mean(1)
    return fit("stack", oof.stack, oof.answers)(members)


RUNS = {
    **of_folds(""),
    **of_folds("native_", 2.0, image_size=NATIVE),
    **of_folds("suffix_", score="suffix"),
    "baseline": Run({"fold": 0, "max_train_rows": 200, "num_train_epochs": 1}, cost=0.3),
    "rate_half": Run({"learning_rate": 1e-3}),
    "rate_double": Run({"learning_rate": 4e-3}),
    "rank_8": Run({"lora_rank": 8, "lora_alpha": 16}),
    "rank_64": Run({"lora_rank": 64, "lora_alpha": 128}),
    "epochs_1": Run({"num_train_epochs": 1}, cost=0.6),
    "epochs_4": Run({"num_train_epochs": 4}, cost=1.8),
    "token_loss": Run({"loss": "token"}),
    "unshuffled": Run({"shuffle_choices": False}),
    "permuted": Run({"permutations_per_step": 4}, cost=2.0),
    "permuted_epochs_1": Run({"permutations_per_step": 4, "num_train_epochs": 1}, cost=1.2),
    "consistent": Run({"permutations_per_step": 4, "consistency_weight": 0.3}, cost=2.0),
    "size_182": Run({"image_size": 182}, cost=1.4),
    "tiles": Run({"crops": True}, cost=4.0),
    "upper_half": Run({"lora_first_layer": 3}, cost=0.8),
    "upper_third": Run({"lora_first_layer": 4}, cost=0.8),
    "extra": Run({"extra_csv": ["{data}/home/train.csv"], "extra_weight": 0.3}, cost=2.0),
    "extra_then_target": Run({"init_adapter": "{folder}/extra", "num_train_epochs": 1}, needs=("extra",)),
    "student": Run({"teacher": [f"{{folder}}/{name}" for name in FOLDS]}, needs=tuple(FOLDS)),
    **{f"all_rows_seed{seed}": Run({"fold": None, "seed": f"{{seed}}{seed}"}, cost=1.2) for seed in range(1, 4)},
}

# Flags of predict.py. The first view of "permutations" is "plain".
VIEWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "permutations": PERMUTATIONS,
    "raw": ("--weights", "raw"),
    "ema": ("--weights", "ema"),
    "swa": ("--weights", "swa"),
    "scales": (*PERMUTATIONS, "--scales", "0.9", "1.0", "1.1"),
    "crops": ("--crops", "--gate", "0.9"),
}

ONE = "one fold"
THREE = "3 folds"
RUNGS = {
    "base model, untrained": Rung(None, ("plain/base",)),
    "200 rows, one epoch": Rung("base model, untrained", ("plain/baseline",)),
    ONE: Rung("200 rows, one epoch", ("plain/fold0",)),
    "raw weights": Rung(None, ("raw/fold0",)),
    "EMA": Rung("raw weights", ("ema/fold0",)),
    "SWA": Rung("raw weights", ("swa/fold0",)),
    "mean of raw, EMA and SWA": Rung("EMA", ("raw/fold0", "ema/fold0", "swa/fold0")),
    "half the learning rate": Rung(ONE, ("plain/rate_half",)),
    "twice the learning rate": Rung(ONE, ("plain/rate_double",)),
    "rank 8": Rung(ONE, ("plain/rank_8",)),
    "rank 64": Rung(ONE, ("plain/rank_64",)),
    "1 epoch": Rung(ONE, ("plain/epochs_1",)),
    "4 epochs": Rung(ONE, ("plain/epochs_4",)),
    "loss over the answer's tokens": Rung(ONE, ("plain/token_loss",)),
    "choices not shuffled": Rung(ONE, ("plain/unshuffled",)),
    "4 permutations a step": Rung(ONE, ("plain/permuted",)),
    "4 permutations a step, 1 epoch": Rung("4 epochs", ("plain/permuted_epochs_1",)),
    "4 permutations a step, consistency": Rung("4 permutations a step", ("plain/consistent",)),
    "182 px": Rung(ONE, ("plain/size_182",)),
    "252 px": Rung("182 px", ("plain/native_fold0",)),
    "trained on tiles": Rung(ONE, ("crops/tiles",)),
    "adapters on the upper half": Rung(ONE, ("plain/upper_half",)),
    "adapters on the upper third": Rung(ONE, ("plain/upper_third",)),
    "suffix score": Rung(ONE, ("plain/suffix_fold0",)),
    "further data": Rung(ONE, ("plain/extra",)),
    "further data, then the target": Rung(ONE, ("plain/extra_then_target",)),
    "soft targets of a teacher": Rung(ONE, ("plain/student",)),
    THREE: Rung(ONE, files("plain")),
    "3 folds, 4 permutations": Rung(THREE, files("permutations")),
    "3 folds, 4 permutations, scales": Rung("3 folds, 4 permutations", files("scales")),
    "3 folds, tiles for unsure rows": Rung(THREE, files("crops")),
    "3 folds, 252 px": Rung(THREE, files("plain", "native_")),
    "3 folds, 252 px, 4 permutations": Rung("3 folds, 252 px", files("permutations", "native_")),
    "all rows, 3 seeds": Rung(THREE, tuple(f"plain/all_rows_seed{seed}" for seed in range(1, 4))),
    "3 folds of letters + 3 of suffixes": Rung(
        THREE, files("plain") + files("plain", "suffix_"), lambda paths, stack: stacked(paths, stack, 2)
    ),
    "whole way": Rung(
        ONE,
        files("permutations", "native_") + files("plain", "suffix_"),
        lambda paths, stack: stacked(paths, stack, 2),
    ),
}
