"""The Trainer of a fold: loss at the answer only, validation by the one score, the best adapters kept apart."""

import os
import random
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from callbacks import WeightAverage
from collator import IGNORE, Collator
from vqa.files import read_json, write_json
from vqa.predictions import write_predictions
from vqa.scoring import answer_logits, letter_logits, letter_metrics, score_rows


class TrainRows(torch.utils.data.Dataset):
    """Training rows; with `shuffle` each shows its choices in an order drawn from seed, row and epoch alone."""

    def __init__(self, rows: list[dict], shuffle: bool, seed: int):
        self.rows, self.shuffle, self.seed, self.epoch = rows, shuffle, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        if not self.shuffle:
            return row
        order = list(range(len(row["choices"])))
        random.Random(f"{self.seed} {row['id']} {self.epoch}").shuffle(order)
        return {**row, "order": order}


class TellEpoch(TrainerCallback):
    """Tells the training rows which epoch it is: accelerate tells only the sampler."""

    def __init__(self, rows: TrainRows):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.epoch = int(state.epoch or 0)


class FoldTrainer(Trainer):
    """Trains one fold and keeps, for the raw weights and for each average, the adapter that validated best.

    Args, beside Trainer's (whose `eval_dataset` is the validation fold):
        averages: the EMA and SWA callbacks in use.
        letter_ids: token id of each letter.
        prompts: collator of prompts without answers, as prediction uses it.
    """

    loss_is_scaled_for_ga = False  # compute_loss gives the mean of a batch

    def __init__(self, *args, averages: list[WeightAverage], letter_ids, prompts: Collator, **kwargs):
        super().__init__(*args, **kwargs)
        self.averages, self.letter_ids, self.prompts = averages, letter_ids, prompts
        self.best: dict[str, dict[str, float]] = {}
        record = Path(self.args.output_dir, "best.json")
        if self.args.resume_from_checkpoint and record.is_file():
            self.best = read_json(record)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the vocabulary at the labels, or over the offered letters at the answer (`loss`).

        Logits are computed from the first labelled position on, not for the whole sequence.
        """
        labels = inputs["labels"]
        first = int((labels != IGNORE).any(0).nonzero()[0])  # left padding puts every answer at the same column
        logits = answer_logits(model, inputs, keep=labels.shape[1] - first + 1)[:, :-1]
        if self.args.loss == "letter":
            offered = letter_logits(logits[:, 0], self.letter_ids, inputs["offered"])
            loss = cross_entropy(offered, inputs["answer"])
        else:
            loss = cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORE)
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Score the validation fold with the raw weights and with each average, as predict.py will."""
        metrics = {}
        for name, weights in self.weight_sets():
            with weights:
                probabilities = self._score(name)
                scores = letter_metrics(probabilities, [row["answer"] for row in self.eval_dataset])
                self._keep_if_best(name, scores, probabilities)
            prefix = metric_key_prefix if name == "raw" else f"{metric_key_prefix}_{name}"
            metrics |= {f"{prefix}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def weight_sets(self) -> list:
        """(name, context in which the model holds these weights): raw, and each average that has begun."""
        begun = [average for average in self.averages if average.updates]
        return [("raw", nullcontext())] + [(average.name, average.applied(self.model)) for average in begun]

    def _score(self, name: str) -> np.ndarray:
        """Probabilities of every validation row, its rows shared out among the processes."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        label = f"validating {name}" if rank == 0 and not self.args.disable_tqdm else None
        size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        model = self.accelerator.unwrap_model(self.model)
        own = score_rows(
            model, self.eval_dataset[rank::processes], self.prompts, self.letter_ids, size, label, workers
        )
        probabilities = np.zeros((len(self.eval_dataset), own.shape[1]))
        for start, part in enumerate(gather_object([own])):
            probabilities[start::processes] = part
        return probabilities

    def _keep_if_best(self, name: str, scores: dict[str, float], probabilities: np.ndarray) -> None:
        if name not in self.best or self._merit(scores) > self._merit(self.best[name]):
            self.best[name] = scores | {"step": self.state.global_step, "epoch": self.state.epoch}
            self.export(name, probabilities)
            if self.args.should_save:
                write_json(Path(self.args.output_dir, "best.json"), self.best)

    def best_weights(self) -> str:
        """The weights that validated best; raw where there was no validation."""
        return max(self.best, key=lambda name: self._merit(self.best[name]), default="raw")

    def _merit(self, scores: dict[str, float]) -> float:
        value = scores[self.args.metric_for_best_model]
        return value if self.args.greater_is_better else -value

    def export(self, name: str, probabilities: np.ndarray | None = None) -> None:
        """Write the adapter that the model now holds, in PEFT's form, and its out-of-fold file beside it."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir) / ("" if name == "raw" else name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix=".export-") as temporary:
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(temporary, save_embedding_layers=False)
            if probabilities is not None:
                write_predictions(Path(temporary, "oof.csv"), self.eval_dataset, probabilities)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)
