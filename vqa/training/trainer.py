"""The Trainer of a fold: loss at the answer's tokens only, and validation by the score that prediction uses."""

import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import GradScalerKwargs
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer

from vqa.config.recipe import RecipeArguments
from vqa.core.compat import first_repeated_row
from vqa.core.io import write_json
from vqa.core.workers import TIMEOUT
from vqa.data.collator import Collator
from vqa.data.rows import Row
from vqa.inference.scoring import answer_logits
from vqa.modeling.families import language_model
from vqa.modeling.suffix_score import suffix_scores
from vqa.modeling.tree_attention import tree_logits
from vqa.modeling.vision import unwrap_base_model
from vqa.training.batching import MicroBatches
from vqa.training.callbacks import (
    LogCallback,
    NoInputGradients,
    ProgressBar,
    WeightAverage,
    swa_start_step,
    trainable_parameters,
)
from vqa.training.checkpointing import COMPLETE
from vqa.training.dataset import LengthSortedSampler, TrainDataset
from vqa.training.loss import FiniteLossCheck, answer_loss, choice_loss, permutation_loss
from vqa.training.validation import Validator

INITIAL_SCALE = 2.0**12  # of the fp16 loss scaler


class FoldTrainer(Trainer):
    """Trains one fold and keeps, for the raw weights and for each average, the adapter that validated best.

    Args, beside Trainer's (whose `eval_dataset` is the list of validation rows):
        weight_averages: the EMA and SWA callbacks in use.
        letter_ids: token id of each letter.
        prompts: collator of prompts without answers, as prediction uses it.
        lengths: tokens of each training row, to sort the rows of a step by; by default all count as equal.
    """

    args: RecipeArguments
    train_dataset: TrainDataset
    eval_dataset: list[Row]
    lr_scheduler: LambdaLR
    loss_is_scaled_for_ga = True  # compute_loss divides by the rows of the whole step

    def __init__(
        self,
        *args,
        weight_averages: list[WeightAverage],
        letter_ids: list[int],
        prompts: Collator,
        lengths: np.ndarray | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # or the Trainer would count labels; get_batch_samples counts rows
        self.lengths = np.ones(len(self.train_dataset)) if lengths is None else lengths
        self.letter_ids = torch.tensor(letter_ids, device=self.args.device)
        self.validator = Validator(self.args, self.eval_dataset, prompts, letter_ids, weight_averages)
        self.micro_batches = MicroBatches(self.args)
        self.loss_check = FiniteLossCheck()
        self.trained: list[torch.nn.Parameter] = []  # found in the first step: there are thousands of modules
        for dict_printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(dict_printer)
        self.add_callback(LogCallback())
        self.add_callback(NoInputGradients())
        if not self.args.disable_tqdm and sys.stderr.isatty():
            self.add_callback(ProgressBar())

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSortedSampler(self.lengths, self.args.effective_batch_size, seed, self.train_dataset.epoch)

    def get_train_dataloader(self):
        """As the Trainer's, but a worker process that hangs ends the run."""
        loader = super().get_train_dataloader()
        loader.timeout = TIMEOUT if loader.num_workers else 0
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimiser step on this process, and the number of rows in that step on all processes.

        Where an epoch's rows do not divide evenly among the processes, accelerate fills the last batches with the
        epoch's first rows. Those get `weight` 0: every row counts once an epoch, whatever the number of processes.
        The number of rows does not depend on the rows' own weights, so the run minimises the weighted sum of losses.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own_weights = [batch.get("weight") for batch in batches]
        for batch in batches:
            batch["weight"] = torch.ones(len(batch["ids"]), device=device)
        if self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last:
            num_rows, size = len(self.train_dataset), self.args.train_batch_size
            first = first_repeated_row(num_rows, size, self.accelerator.num_processes, self.accelerator.process_index)
            batches[-1]["weight"][first:] = 0
        rows = torch.stack([batch["weight"].sum() for batch in batches]).sum()
        for batch, weights in zip(batches, own_weights):
            if weights is not None:
                batch["weight"] *= weights.to(device)
        return batches, self.accelerator.reduce(rows)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the Trainer's, in smaller batches after GPU memory has run out (`MicroBatches`)."""
        step, number = super().training_step, self.state.global_step + 1
        self.trained = self.trained or [parameter for _, parameter in trainable_parameters(model)]
        loss = self.micro_batches.run(lambda part: step(model, part, num_items_in_batch), inputs, self.trained, number)
        if self.accelerator.sync_gradients:  # the last batch of the optimiser step
            self.loss_check.check(number)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of the batch's rows, or this batch's part of the step's mean; see vqa/training/loss.py.

        `num_items_in_batch` is the step's number of rows. Logits are computed at the answer's tokens only.
        """
        if "choice_end" in inputs:
            logits = suffix_scores(model, inputs)
            losses = choice_loss(logits, inputs["answer"], inputs.get("target"))
        elif "letter_of" in inputs:
            _, permutations, tokens = inputs["read"].shape
            logits = tree_logits(model, inputs, inputs["read"].flatten(1)).unflatten(1, (permutations, tokens))
            weight = self.args.consistency_weight
            losses = permutation_loss(logits, inputs, self.letter_ids, self.args.loss, weight)
        else:
            answer_tokens = inputs["labels"].shape[1] - inputs["answer_start"]
            # Each position predicts the next token.
            logits = answer_logits(model, inputs, keep=answer_tokens + 1)[:, :-1]
            losses = answer_loss(logits, inputs, self.letter_ids, self.args.loss)
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # times the number of processes, since DDP averages their gradients
            loss = (losses * inputs["weight"]).sum() / num_items_in_batch * self.accelerator.num_processes
        self.loss_check.add(loss, inputs["ids"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def create_optimizer(self, model=None):
        """The Trainer's; the vision tower and its projector get the rate `vision_learning_rate`, if it is set."""
        optimizer = super().create_optimizer(model)
        if (rate := self.args.vision_learning_rate) is not None:
            base = unwrap_base_model(cast(torch.nn.Module, self.model))
            others = set(base.parameters()) - set(language_model(base).parameters())
            for group in list(optimizer.param_groups):
                vision = [parameter for parameter in group["params"] if parameter in others]
                group["params"] = [parameter for parameter in group["params"] if parameter not in others]
                optimizer.add_param_group({**group, "params": vision, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The recipe's schedule; with `swa_lr`, that constant learning rate from the first averaged step on."""
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if self.args.swa_lr is not None and self.args.swa_start is not None:
            start, swa_lr = swa_start_step(self.args.swa_start, num_training_steps), self.args.swa_lr
            share = swa_lr / self.args.learning_rate
            scheduler.lr_lambdas = [  # the k-th step that is taken, counted from 1, has the rate of schedule(k - 1)
                lambda step, schedule=schedule: share if step + 1 >= start else schedule(step)
                for schedule in scheduler.lr_lambdas
            ]
        return scheduler

    def skipped_steps(self) -> int:
        """Steps that the fp16 loss scaler skipped: the schedule, which checkpoints keep, does not advance at those."""
        return self.state.global_step - self.lr_scheduler.last_epoch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.fp16 and "loss" in logs:
            logs["skipped_steps"] = self.skipped_steps()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Score the validation fold with the raw weights and with each average, as predict.py will."""
        model = self.accelerator.unwrap_model(self.model)
        metrics: dict[str, float] = {}
        for name, scores in self.validator.evaluate(model, self.state).items():
            prefix = metric_key_prefix if name == "raw" else f"{metric_key_prefix}_{name}"
            metrics |= {f"{prefix}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        if self.args.should_save:
            # log_history is part of every checkpoint (its keys sorted), so a resumed run has the earlier lines too.
            history = [dict(sorted(logs.items())) for logs in self.state.log_history if "eval_log_loss" in logs]
            write_json(Path(self.args.output_dir, "history.json"), history)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _build_accelerator_args(self, **kwargs) -> dict:
        """With a loss scale that is low enough for the first steps; the usual one skips some of a short run."""
        arguments = super()._build_accelerator_args(**kwargs)
        arguments["kwargs_handlers"].append(GradScalerKwargs(init_scale=INITIAL_SCALE))
        return arguments

    def _run_epoch(self, *args, **kwargs):
        """As the Trainer's, but a run that resumes from its last step, or stopped early, takes no further step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """As the Trainer's; a checkpoint that is written again counts as incomplete meanwhile.

        The best adapters are exported, so no old checkpoint is kept as the best one.
        """
        self.state.best_global_step = self.state.best_model_checkpoint = None
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", COMPLETE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)
