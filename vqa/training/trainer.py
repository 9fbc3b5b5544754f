"""The Trainer of a fold: loss at the answer only, validation by the one score, the best adapters kept apart."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import GradScalerKwargs
from torch.nn.functional import cross_entropy
from transformers import Trainer

from vqa.core.compat import first_repeated_row
from vqa.core.distributed import distributed_map, full_tensor
from vqa.core.errors import UserError, preview
from vqa.core.io import read_json, write_json
from vqa.data.collator import IGNORE, Collator
from vqa.data.predictions import write_predictions
from vqa.data.prompt import shown_target
from vqa.evaluation.metrics import soft_label_log_loss
from vqa.evaluation.oof import weights_folder
from vqa.inference.scoring import answer_logits, letter_logits, score_rows
from vqa.training.batching import RECORD, rows_per_step, split_batch
from vqa.training.callbacks import WeightAverage, swa_start_step, trainable_parameters
from vqa.training.checkpointing import COMPLETE
from vqa.training.dataset import LengthSortedSampler
from vqa.training.validation import letter_metrics

MAX_NON_FINITE = 5


SCALER_START = 2.0**12


class FoldTrainer(Trainer):
    """Trains one fold and keeps, for the raw weights and for each average, the adapter that validated best.

    Args, beside Trainer's (whose `eval_dataset` is the validation fold):
        averages: the EMA and SWA callbacks in use.
        letter_ids: token id of each letter.
        prompts: collator of prompts without answers, as prediction uses it.
        lengths: tokens of each training row, to group them by; by default they count as equal.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the rows of the whole step
    non_finite = 0  # losses in a row

    def __init__(
        self,
        *args,
        averages: list[WeightAverage],
        letter_ids: list[int],
        prompts: Collator,
        lengths: np.ndarray | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.lengths = np.ones(len(self.train_dataset)) if lengths is None else lengths
        self.micro_batch_size = self.args.per_device_train_batch_size
        self.model_accepts_loss_kwargs = False  # or the Trainer would count labels; get_batch_samples counts rows
        self.averages, self.letter_ids, self.prompts = averages, letter_ids, prompts
        self.best: dict[str, dict[str, float]] = {}
        record = Path(self.args.output_dir, "best.json")
        if self.args.resume_from_checkpoint and record.is_file():
            self.best = read_json(record)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed or self.args.seed
        return LengthSortedSampler(self.lengths, rows_per_step(self.args), seed, self.train_dataset.epoch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimiser step on this process, and the number of rows in that step on all processes.

        Where an epoch's rows do not divide evenly among the processes, accelerate fills its last batches up with the
        epoch's first rows. Those get `weight` 0: every row counts once an epoch, whatever the number of processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            batch["weight"] = torch.ones(len(batch["ids"]), device=device)
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            num_rows, size = len(self.train_dataset), self.args.train_batch_size
            first = first_repeated_row(num_rows, size, self.accelerator.num_processes, self.accelerator.process_index)
            batches[-1]["weight"][first:] = 0
        rows = torch.stack([batch["weight"].sum() for batch in batches]).sum()
        return batches, self.accelerator.reduce(rows)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer does; a batch that does not fit into memory goes in parts, and so do those after it.

        Only with `auto_batch` and in one process: the others would wait for one that begins its step again.
        """
        step = super().training_step
        before = [(p, None if p.grad is None else p.grad.clone()) for _, p in trainable_parameters(model)]
        while True:
            try:
                parts = split_batch(inputs, self.micro_batch_size)
                return torch.stack([step(model, part, num_items_in_batch) for part in parts]).sum()
            except torch.OutOfMemoryError:
                if not self.args.auto_batch or self.args.world_size > 1 or self.micro_batch_size == 1:
                    raise
            for parameter, gradient in before:  # of the part that failed, some layers may have theirs
                parameter.grad = gradient
            self._take_fewer_rows()

    def _take_fewer_rows(self) -> None:
        """The next smaller equal part of a batch from now on, and after a restart too."""
        size = self.args.per_device_train_batch_size
        self.micro_batch_size = max(rows for rows in range(1, self.micro_batch_size) if size % rows == 0)
        torch.cuda.empty_cache()
        print(f"out of GPU memory at step {self.state.global_step + 1}: going on with {self.most_rows} rows at once")
        fields = {
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": size // self.micro_batch_size * self.args.gradient_accumulation_steps,
            "gradient_checkpointing": self.args.gradient_checkpointing,
        }
        write_json(Path(self.args.output_dir, RECORD), fields)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy over the vocabulary at the labels, or over the offered letters at the answer (`loss`).

        Where the batch has soft labels (`target`), they are what the letter's logits are held against.
        A mean over rows: of this batch, or this batch's share of the step's mean where the step's number of rows is
        given (`num_items_in_batch`). Logits are computed from the first labelled position on, not for the whole
        sequence.
        """
        labels = inputs["labels"]
        first = int((labels != IGNORE).any(0).nonzero()[0])  # left padding puts every answer at the same column
        logits = answer_logits(model, inputs, keep=labels.shape[1] - first + 1)[:, :-1]
        if self.args.loss == "letter":
            offered = letter_logits(logits[:, 0], self.letter_ids, inputs["offered"])
            if "target" in inputs:  # 0 times the logarithm of 0 is to be 0
                offered = offered.clamp(min=torch.finfo(offered.dtype).min)
            losses = cross_entropy(offered, inputs.get("target", inputs["answer"]), reduction="none")
        else:
            labels = labels[:, first:]
            losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
            if "target" in inputs:
                target = torch.zeros_like(logits[:, 0])
                target[:, self.letter_ids] = inputs["target"]
                at_letter = cross_entropy(logits[:, 0], target, reduction="none")
                losses = torch.cat([at_letter[:, None], losses[:, 1:]], dim=1)
            losses = losses.sum(1) / (labels != IGNORE).sum(1)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # times the processes, whose gradients are averaged
            loss = (losses * inputs["weight"]).sum() / num_items_in_batch * self.accelerator.num_processes
        self._check_finite(loss.detach(), inputs["ids"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def _check_finite(self, loss: torch.Tensor, ids: list[str]) -> None:
        """Stop when the loss is not finite again and again. The fp16 scaler skips such steps without a word."""
        self.non_finite = 0 if loss.isfinite() else self.non_finite + 1
        if self.non_finite == MAX_NON_FINITE:
            raise UserError(
                f"step {self.state.global_step + 1}: the loss was not finite {MAX_NON_FINITE} times in a row, the "
                f"last time for {preview(ids)}; lower the learning rate, resume an earlier checkpoint, or use bf16"
            )

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The recipe's schedule; with `swa_lr` held at that learning rate from the step on at which SWA begins."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.swa_lr is not None:
            begin, held = swa_start_step(self.args.swa_start, num_training_steps), self.args.swa_lr
            scheduler.lr_lambdas = [  # step k of the run, counted from 1, is taken at lambda(k - 1)
                lambda step, usual=usual, peak=peak: held / peak if step + 1 >= begin else usual(step)
                for usual, peak in zip(scheduler.lr_lambdas, scheduler.base_lrs)
            ]
        return scheduler

    def skipped_steps(self) -> int:
        """Steps that the fp16 loss scaler skipped: the schedule, which checkpoints keep, does not move at those."""
        return self.state.global_step - self.lr_scheduler.last_epoch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.fp16 and "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps()
        super().log(logs, start_time)

    def _build_accelerator_args(self, **kwargs) -> dict:
        """The scaler starts low enough to let the first steps through; by default it skips some of a short run."""
        built = super()._build_accelerator_args(**kwargs)
        built["kwargs_handlers"].append(GradScalerKwargs(init_scale=SCALER_START))
        return built

    def _run_epoch(self, **kwargs):
        """As the Trainer does, but a run that goes on from its very last step is not given one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        """As the Trainer does; one that is written anew is not whole meanwhile.

        The best adapters are kept apart, so no checkpoint is kept as the best one in place of a newer.
        """
        self.state.best_global_step = self.state.best_model_checkpoint = None
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", COMPLETE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Score the validation fold with the raw weights and with each average, as predict.py will."""
        metrics = {}
        for name, weights in self.weight_sets():
            with weights:
                probabilities = self._score(name)
                scores = letter_metrics(probabilities, [row["answer"] for row in self.eval_dataset])
                if "annotators" in self.eval_dataset[0]:
                    shares = np.array([shown_target({"target": row["annotators"]}) for row in self.eval_dataset])
                    scores["annotator_log_loss"] = float(soft_label_log_loss(probabilities, shares).mean())
                self._keep_if_best(name, scores, probabilities)
            prefix = metric_key_prefix if name == "raw" else f"{metric_key_prefix}_{name}"
            metrics |= {f"{prefix}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        if self.args.should_save:
            write_json(Path(self.args.output_dir, "history.json"), self.validations())
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validations(self) -> list[dict[str, float]]:
        """What every validation so far logged. Checkpoints keep it (its keys sorted), so a resumed run has it too."""
        return [dict(sorted(logs.items())) for logs in self.state.log_history if "eval_log_loss" in logs]

    def weight_sets(self) -> list:
        """(name, context in which the model holds these weights): raw, and each average that has begun."""
        begun = [average for average in self.averages if average.updates]
        return [("raw", nullcontext())] + [(average.name, average.average_parameters(self.model)) for average in begun]

    def _score(self, name: str) -> np.ndarray:
        """Probabilities of every validation row, its rows shared out among the processes."""
        show = self.is_world_process_zero() and not self.args.disable_tqdm
        label = f"validating {name}" if show else None
        size, workers = self.args.per_device_eval_batch_size, self.args.dataloader_num_workers
        model = self.accelerator.unwrap_model(self.model)
        return distributed_map(
            self.eval_dataset,
            lambda rows: score_rows(model, rows, self.prompts, self.letter_ids, size, label, workers),
        )

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
        model = self.accelerator.unwrap_model(self.model)
        adapter = {name: full_tensor(parameter) for name, parameter in trainable_parameters(model)}
        if not self.args.should_save:
            return
        folder = weights_folder(self.args.output_dir, name)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.args.output_dir, prefix=".export-") as temporary:
            model.save_pretrained(temporary, state_dict=adapter, save_embedding_layers=False)
            if probabilities is not None:
                write_predictions(Path(temporary, "oof.csv"), self.eval_dataset, probabilities)
            for file in Path(temporary).iterdir():
                os.replace(file, folder / file.name)
