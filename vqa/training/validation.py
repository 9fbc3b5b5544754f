"""Validation of a fold: the scores of each set of weights, and the best adapters exported in PEFT's form."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from peft import PeftModel
from transformers import TrainerState

from vqa.config.recipe import RecipeArguments
from vqa.core.distributed import distributed_map
from vqa.core.io import read_json, write_json
from vqa.data.collator import Collator
from vqa.data.predictions import write_predictions
from vqa.data.prompt import shown_target
from vqa.data.rows import Row
from vqa.evaluation.metrics import accuracy_and_log_loss, soft_label_log_loss
from vqa.evaluation.oof import weights_folder
from vqa.inference.scoring import score_rows
from vqa.modeling.suffix_score import save_score_head
from vqa.training.callbacks import WeightAverage, trainable_parameters

BEST = "best.json"  # in the fold's folder: the scores of the exported adapters


class Validator:
    """Scores the validation rows with each set of weights and exports, for each, the adapter that scored best.

    The sets are the raw weights and each average that has begun. `best` has the scores of the exported adapters:
    name -> accuracy, log_loss, step and epoch.
    """

    def __init__(
        self,
        args: RecipeArguments,
        rows: list[Row],
        prompts: Collator,
        letter_ids: list[int],
        weight_averages: list[WeightAverage],
    ):
        self.args, self.rows, self.prompts, self.letter_ids = args, rows, prompts, letter_ids
        self.weight_averages = weight_averages
        self.best: dict[str, dict[str, float]] = {}
        record = Path(args.output_dir, BEST)
        if args.resume_from_checkpoint and record.is_file():
            step = read_json(Path(args.resume_from_checkpoint, "trainer_state.json"))["global_step"]
            # Adapters of later steps are not of this run, which trains those steps again.
            self.best = {name: scores for name, scores in read_json(record).items() if scores["step"] <= step}

    def weight_sets(self, model: PeftModel) -> list[tuple[str, AbstractContextManager]]:
        """(name, context in which the model holds these weights): raw, and each average that has begun."""
        begun = [average for average in self.weight_averages if average.updates]
        return [("raw", nullcontext()), *((average.name, average.average_parameters(model)) for average in begun)]

    def evaluate(self, model: PeftModel, state: TrainerState) -> dict[str, dict[str, float]]:
        """Name of the weights -> scores. An adapter that scores better than before is exported."""
        all_scores = {}
        for name, weights in self.weight_sets(model):
            with weights:
                probabilities = self._probabilities(model, f"validating {name}")
                scores = all_scores[name] = self._scores(probabilities)
                if name not in self.best or self._merit(scores) > self._merit(self.best[name]):
                    self.best[name] = scores | {"step": state.global_step, "epoch": state.epoch}
                    self.export(model, name, probabilities)
                    if self.args.should_save:
                        write_json(Path(self.args.output_dir, BEST), self.best)
        return all_scores

    def best_weights(self) -> str:
        """Name of the weights that validated best; raw where there was no validation."""
        return max(self.best, key=lambda name: self._merit(self.best[name]), default="raw")

    def export(self, model: PeftModel, name: str, probabilities: np.ndarray | None = None) -> None:
        """Write the adapter that the model now holds, in PEFT's form, and its out-of-fold file beside it."""
        if not self.args.should_save:
            return
        adapter = dict(trainable_parameters(model))
        folder = weights_folder(self.args.output_dir, name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix=".export-") as temporary:
            model.save_pretrained(temporary, state_dict=adapter, save_embedding_layers=False)
            if hasattr(model, "score_head"):
                save_score_head(model, temporary)
            if probabilities is not None:
                write_predictions(Path(temporary, "oof.csv"), self.rows, probabilities)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)

    def export_all(self, model: PeftModel) -> None:
        """Export every set of weights as it is now, for a run that validates nothing."""
        for name, weights in self.weight_sets(model):
            with weights:
                self.export(model, name)

    def _probabilities(self, model: PeftModel, label: str) -> np.ndarray:
        """Of every validation row, float64 (rows, 10); each process scores its part of the rows."""
        shown = label if self.args.process_index == 0 and not self.args.disable_tqdm else None
        fixed = self.prompts, self.letter_ids, self.args.per_device_eval_batch_size
        options: dict[str, Any] = {"label": shown, "workers": self.args.dataloader_num_workers}
        return distributed_map(self.rows, lambda rows: score_rows(model, rows, *fixed, **options))

    def _scores(self, probabilities: np.ndarray) -> dict[str, float]:
        scores = letter_metrics(probabilities, [row["answer"] for row in self.rows])
        if "annotators" in self.rows[0]:
            shares = np.array([shown_target({"target": row["annotators"]}) for row in self.rows])
            scores["annotator_log_loss"] = float(soft_label_log_loss(probabilities, shares).mean())
        return scores

    def _merit(self, scores: dict[str, float]) -> float:
        value = scores[self.args.metric_for_best_model]
        return value if self.args.greater_is_better else -value


class LetterScore(evaluate.Metric):
    """Letter accuracy, in [0, 1], and letter log-loss, in nats, as an `evaluate` metric. Needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = Features({"predictions": List(Value("float64")), "references": Value("int64")})
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=features)

    def _compute(self, predictions, references) -> dict[str, float]:
        return accuracy_and_log_loss(np.asarray(predictions), references)


def letter_metrics(probabilities: np.ndarray, answers: Sequence[int]) -> dict[str, float]:
    """{"accuracy", "log_loss"} of probabilities (rows, letters) against the answers' indices (rows,)."""
    with tempfile.TemporaryDirectory() as folder:  # a metric makes one, by default in HF_HOME, which may be read-only
        metric = LetterScore(keep_in_memory=True, cache_dir=folder)
        return metric.compute(predictions=probabilities, references=answers)
