"""Train one fold: an args file -> adapters, metrics and out-of-fold probabilities in checkpoints/<name>/.

accelerate launch train_fold.py args/fold0.json
accelerate launch train_fold.py args/fold0.json --learning_rate 1e-4 --max_train_rows 200
python train_fold.py args/demo/fold0.json          # the demo; no GPU needed
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from callbacks import EMACallback, SWACallback, WeightAverage
from collator import Collator
from vqa.arguments import DataArguments, RecipeArguments, folds_file, parse_arguments
from vqa.errors import UserError, run
from vqa.files import write_json
from vqa.folds import read_folds, split_fold
from vqa.images import check_images
from vqa.model import add_adapter, load_base, load_processor, model_dtype
from vqa.prompt import letter_ids
from vqa.rows import read_rows
from vqa.training import FoldTrainer, TellEpoch, TrainRows


def main() -> None:
    model_args, data, recipe, resolved = parse_arguments(sys.argv[1:], __doc__)
    set_seed(recipe.seed)
    checkpoint = checkpoint_to_resume(recipe)
    train_rows, valid_rows = read_fold(data, recipe)
    processor = load_processor(model_args.model)
    ids = letter_ids(processor)
    base = load_base(model_args.model, model_args.load_in_4bit, model_dtype(recipe.fp16, recipe.bf16))
    model = add_adapter(base, model_args.lora_rank, model_args.lora_alpha, model_args.lora_dropout)

    rows = TrainRows(train_rows, data.shuffle_choices, recipe.seed)
    averages = make_averages(recipe)
    trainer = FoldTrainer(
        model,
        recipe,
        data_collator=Collator(processor, data.image_size, data.instruction, with_answer=True),
        train_dataset=rows,
        eval_dataset=valid_rows,
        callbacks=[TellEpoch(rows), *averages],
        averages=averages,
        letter_ids=ids,
        prompts=Collator(processor, data.image_size, data.instruction),
    )
    start = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    finish(trainer, resolved, time.time() - start)


def read_fold(data: DataArguments, recipe: RecipeArguments) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows) of the fold; no validation rows and no validation where fold is null."""
    dataset = read_rows(data.train_csv, data.image_root, with_answer=True)
    rows = dataset.to_list()
    train, valid = np.arange(len(rows)), np.array([], dtype=int)
    if data.fold is None:
        recipe.eval_strategy = "no"
    else:
        folds_csv = folds_file(data)
        train, valid = split_fold(read_folds(folds_csv, dataset["id"], data.train_csv), data.fold, folds_csv)
    if data.max_train_rows is not None:
        if data.max_train_rows < 1:
            raise UserError(f"max_train_rows is {data.max_train_rows}; give 1 or more, or leave it out for all rows")
        train = np.sort(np.random.default_rng(recipe.seed).permutation(train)[: data.max_train_rows])
    train_rows, valid_rows = [rows[i] for i in train], [rows[i] for i in valid]
    check_images(train_rows + valid_rows, data.train_csv)
    return train_rows, valid_rows


def make_averages(recipe: RecipeArguments) -> list[WeightAverage]:
    averages = [EMACallback(recipe.ema_decay)] if recipe.ema_decay > 0 else []
    return averages + ([SWACallback(recipe.swa_start)] if recipe.swa_start < 1 else [])


def checkpoint_to_resume(recipe: RecipeArguments) -> str | None:
    """The checkpoint that the args name; with `auto` the newest in the fold's folder, if there is one."""
    wanted = recipe.resume_from_checkpoint
    if wanted == "auto":
        return get_last_checkpoint(recipe.output_dir) if Path(recipe.output_dir).is_dir() else None
    if wanted and not Path(wanted, "trainer_state.json").is_file():
        raise UserError(f"resume_from_checkpoint: {wanted} is not a checkpoint folder; give one, or `auto`")
    return wanted


def finish(trainer: FoldTrainer, resolved: dict, seconds: float) -> None:
    """Write what the fold's folder still lacks; metrics.json comes last and says that the fold is complete."""
    recipe = trainer.args
    if not trainer.eval_dataset:
        for name, weights in trainer.weight_sets():
            with weights:
                trainer.export(name)
    if not trainer.is_world_process_zero():
        return
    write_json(Path(recipe.output_dir, "args.json"), resolved)
    metric = recipe.metric_for_best_model
    sign = 1 if recipe.greater_is_better else -1
    best = max(trainer.best, key=lambda name: sign * trainer.best[name][metric], default="raw")
    metrics = {
        "train_rows": len(trainer.train_dataset),
        "valid_rows": len(trainer.eval_dataset),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "rows_per_second": round(len(trainer.train_dataset) * recipe.num_train_epochs / seconds, 2),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "best": best,
        "weights": trainer.best,
    }
    write_json(Path(recipe.output_dir, "metrics.json"), metrics)
    for name, scores in trainer.best.items():
        step = f"step {scores['step']}" + ("  <- best" if name == best else "")
        print(f"{name:4} accuracy {scores['accuracy']:.4f}  log-loss {scores['log_loss']:.4f}  {step}")
    print(f"{recipe.output_dir}: adapters, args.json, metrics.json" + (", oof.csv" if trainer.eval_dataset else ""))


if __name__ == "__main__":
    run(main)
