"""The ladder's content: the models that it trains, the ways it predicts with them, and the rungs it compares."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vqa.data.rows import read_rows
from vqa.evaluation.cascade import Cascade
from vqa.evaluation.ensembling import fit
from vqa.evaluation.oof import load_oof
from vqa.evaluation.question_types import question_types

FOLDS = [f"fold{i}" for i in range(3)]
NATIVE = 252  # px: the size of the contest's images; args/bench has half of it


@dataclass(frozen=True)
class Run:
    """A model to train: the fields that differ from args/bench/base.json, and the runs that must be finished before.

    In texts, {seed} is the ladder's seed, {folder} has the seed's models, {data} the contest.
    """

    fields: dict = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rung:
    """A line of the table: the prediction files `folder/run` that it combines, and the rung that it builds on."""

    before: str | None
    files: tuple[str, ...]
    combine: Callable | None = None  # (paths, probabilities (files, rows, letters), test_csv) -> (rows, letters)


def of_folds(prefix: str, **fields) -> dict[str, Run]:
    return {f"{prefix}{name}": Run({"fold": i} | fields) for i, name in enumerate(FOLDS)}


def files(view: str, prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{view}/{prefix}{name}" for name in FOLDS)


def members(stack: np.ndarray) -> np.ndarray:
    """The mean of each model's three folds: (models, rows, letters) of files (files, rows, letters)."""
    return stack.reshape(-1, len(FOLDS), *stack.shape[1:]).mean(1)


def stacked(paths: list[str], stack: np.ndarray, test_csv: str, method: str = "stack") -> np.ndarray:
    """A stack of models, three folds each, fitted on their out-of-fold rows."""
    folds = [paths[i : i + len(FOLDS)] for i in range(0, len(paths), len(FOLDS))]
    oof = load_oof({str(number): own for number, own in enumerate(folds)})
    fitted = fit(method, oof.stack, oof.answers, types=oof.labels.question_types(oof.ids))
    return fitted(members(stack), question_types(read_rows(test_csv)))


def by_type(paths: list[str], stack: np.ndarray, test_csv: str) -> np.ndarray:
    return stacked(paths, stack, test_csv, "stack_by_type")


def cascade(paths: list[str], stack: np.ndarray, test_csv: str) -> np.ndarray:
    """The 30 % of the rows of which the first model is least sure go through the second one."""
    return Cascade(share=0.3, weight=1.0).combine(*members(stack))


RUNS = {
    **of_folds(""),
    **of_folds("native_", image_size=NATIVE),
    **of_folds("suffix_", score="suffix"),
    "baseline": Run({"max_train_rows": 200}),
    "averaged": Run({"ema_decay": 0.99, "swa_start": 0.5}),
    "constant": Run({"ema_decay": 0.99, "lr_scheduler_type": "constant_with_warmup"}),
    "rate_half": Run({"learning_rate": 1e-3}),
    "rate_double": Run({"learning_rate": 4e-3}),
    "rank_8": Run({"lora_rank": 8, "lora_alpha": 16}),
    "rank_64": Run({"lora_rank": 64, "lora_alpha": 128}),
    "epochs_2": Run({"num_train_epochs": 2}),
    "epochs_4": Run({"num_train_epochs": 4}),
    "token_loss": Run({"loss": "token"}),
    "unshuffled": Run({"shuffle_choices": False}),
    "permuted": Run({"permutations_per_step": 4}),
    "consistent": Run({"permutations_per_step": 4, "consistency_weight": 0.3}),
    "size_182": Run({"image_size": 182}),
    "tiles": Run({"crops": True}),
    "upper_half": Run({"lora_first_layer": 3}),
    "upper_third": Run({"lora_first_layer": 4}),
    "extra": Run({"extra_csv": ["{data}/home/train.csv"], "extra_weight": 0.3}),
    "extra_then_target": Run({"init_adapter": "{folder}/extra"}, needs=("extra",)),
    "student": Run({"teacher": [f"{{folder}}/{name}" for name in FOLDS]}, needs=tuple(FOLDS)),
    **{f"all_rows_seed{seed}": Run({"fold": None, "seed": f"{{seed}}{seed}"}) for seed in range(1, 4)},
}

# Flags of predict.py. The first view of "permutations" is the plain one, in the folder "permutations/plain".
VIEWS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "permutations": ("--num_permutations", "4"),
    "raw": ("--weights", "raw"),
    "ema": ("--weights", "ema"),
    "swa": ("--weights", "swa"),
    "scales": ("--scales", "0.9", "1.0", "1.1"),
    "crops": ("--crops", "--gate", "0.9"),
}

ONE = "one fold"
THREE = "3 folds"
NATIVE_TOO = files("permutations") + files("permutations", "native_")
# In this order they are trained, and stand in the table.
RUNGS = {
    "base model, untrained": Rung(None, ("plain/base",)),
    "200 rows, one epoch": Rung("base model, untrained", ("plain/baseline",)),
    ONE: Rung("200 rows, one epoch", ("permutations/plain/fold0",)),
    "182 px": Rung(ONE, ("plain/size_182",)),
    "252 px": Rung("182 px", ("permutations/plain/native_fold0",)),
    "suffix score": Rung(ONE, ("plain/suffix_fold0",)),
    THREE: Rung(ONE, files("permutations/plain")),
    "3 folds, 4 permutations": Rung(THREE, files("permutations")),
    "3 folds, 252 px": Rung(THREE, files("permutations/plain", "native_")),
    "3 folds, 252 px, 4 permutations": Rung("3 folds, 252 px", files("permutations", "native_")),
    "3 folds, suffix score too": Rung(THREE, files("permutations/plain") + files("plain", "suffix_"), stacked),
    "3 folds, 30 % of the rows at 252 px": Rung("3 folds, 4 permutations", NATIVE_TOO, cascade),
    "3 folds, 126 and 252 px": Rung("3 folds, 252 px, 4 permutations", NATIVE_TOO, stacked),
    "whole way": Rung(ONE, NATIVE_TOO, stacked),
    "whole way, by question type": Rung("whole way", NATIVE_TOO, by_type),
    "4 permutations a step": Rung(ONE, ("plain/permuted",)),
    "4 epochs": Rung(ONE, ("plain/epochs_4",)),
    "4 permutations a step, 1 epoch": Rung("4 epochs", ("plain/permuted",)),
    "2 epochs": Rung(ONE, ("plain/epochs_2",)),
    "EMA": Rung(ONE, ("ema/averaged",)),
    "SWA": Rung(ONE, ("swa/averaged",)),
    "mean of raw, EMA and SWA": Rung(ONE, ("raw/averaged", "ema/averaged", "swa/averaged")),
    "constant learning rate": Rung(ONE, ("raw/constant",)),
    "constant learning rate, EMA": Rung("constant learning rate", ("ema/constant",)),
    "soft targets of a teacher": Rung(ONE, ("plain/student",)),
    "all rows, 3 seeds": Rung(THREE, tuple(f"plain/all_rows_seed{seed}" for seed in range(1, 4))),
    "3 folds, tiles for unsure rows": Rung(THREE, files("crops")),
    "trained on tiles": Rung(ONE, ("crops/tiles",)),
    "4 permutations a step, consistency": Rung("4 permutations a step", ("plain/consistent",)),
    "half the learning rate": Rung(ONE, ("plain/rate_half",)),
    "twice the learning rate": Rung(ONE, ("plain/rate_double",)),
    "choices not shuffled": Rung(ONE, ("plain/unshuffled",)),
    "loss over the answer's tokens": Rung(ONE, ("plain/token_loss",)),
    "adapters on the upper half": Rung(ONE, ("plain/upper_half",)),
    "adapters on the upper third": Rung(ONE, ("plain/upper_third",)),
    "rank 8": Rung(ONE, ("plain/rank_8",)),
    "rank 64": Rung(ONE, ("plain/rank_64",)),
    "further data": Rung(ONE, ("plain/extra",)),
    "further data, then the target": Rung(ONE, ("plain/extra_then_target",)),
    "3 folds, scales": Rung(THREE, files("scales")),
}
