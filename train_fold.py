"""Train one fold: an args file -> adapters, metrics and out-of-fold probabilities in checkpoints/<name>/.

accelerate launch train_fold.py args/fold0.json
accelerate launch train_fold.py args/fold0.json --learning_rate 1e-4 --max_train_rows 200
python train_fold.py args/demo/fold0.json          # the demo; no GPU needed
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import enable_full_determinism, set_seed

from vqa.config.arguments import DataArguments
from vqa.config.parser import non_default_fields, parse_arguments
from vqa.config.recipe import RecipeArguments
from vqa.core.compat import initial_global_step
from vqa.core.distributed import run_on_main_and_broadcast
from vqa.core.dtypes import model_dtype
from vqa.core.errors import UserError, preview, run_main
from vqa.core.hashing import checkpoint_fingerprint, frozen_fingerprint, rows_fingerprint, trainable_fingerprint
from vqa.core.io import read_json, write_json
from vqa.data.collator import Collator
from vqa.data.images import check_images, oriented_sizes
from vqa.data.predictions import join
from vqa.data.prompt import letter_ids
from vqa.data.rows import read_rows
from vqa.data.splits import split_rows
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import score_with_interval
from vqa.evaluation.oof import weights_folder
from vqa.modeling.feature_store import open_feature_store
from vqa.modeling.loading import add_adapter, load_base, load_processor
from vqa.training.batching import apply_batch_config, choose_batch_config, count_tokens, rows_per_step
from vqa.training.callbacks import EMACallback, SWACallback, WeightAverage
from vqa.training.checkpointing import CheckpointMarkerCallback, TimeLimitCallback, checkpoint_to_resume
from vqa.training.dataset import SetEpochCallback, TrainDataset
from vqa.training.preflight import check_before_training
from vqa.training.trainer import FoldTrainer

STOPPED = 3  # exit code of a run that was stopped in time
# Fields that a run may go on with in another form: they change where and how fast it runs, not what comes out.
CHANGE_NOTHING = {
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "logging_steps",
    "per_device_eval_batch_size",
    "report_to",
    "save_total_limit",
    "test_csv",
    "vision_cache",
    "vision_cache_dir",
    "vision_cache_gb",
}


def main() -> None:
    model_args, data, recipe, resolved = parse_arguments(sys.argv[1:], __doc__)
    (enable_full_determinism if recipe.full_determinism else set_seed)(recipe.seed)
    resolved |= {"resume_from_checkpoint": None, "max_hours": None}  # of this session, not of the run
    train_rows, valid_rows = run_on_main_and_broadcast(lambda: read_split(data, recipe.seed))
    rows_used = rows_fingerprint(train_rows, valid_rows)
    if run_on_main_and_broadcast(lambda: is_finished(recipe, resolved, rows_used)):
        return
    averages = make_averages(recipe)
    stop = TimeLimitCallback(recipe.max_hours, steps_worth(recipe, len(valid_rows) * (1 + len(averages))))
    if run_on_main_and_broadcast(stop.is_late):
        if PartialState().is_main_process:
            print(f"{recipe.output_dir}: no time is left of max_hours; run the same command in a new session")
        sys.exit(STOPPED)
    wanted, folder = recipe.resume_from_checkpoint, recipe.output_dir
    recipe.resume_from_checkpoint = run_on_main_and_broadcast(lambda: checkpoint_to_resume(wanted, folder))
    run_on_main_and_broadcast(lambda: check_images(train_rows + valid_rows, data.train_csv))
    if data.fold is None:
        recipe.eval_strategy = "no"
    processor = load_processor(model_args.model, model_args.trust_remote_code)
    ids = letter_ids(processor)
    dtype = model_dtype(recipe.fp16, recipe.bf16)
    base = load_base(model_args.model, model_args.load_in_4bit, dtype, model_args.trust_remote_code)
    model = add_adapter(base, model_args.lora_rank, model_args.lora_alpha, model_args.lora_dropout)
    collate = Collator(processor, data.image_size, data.instruction, with_answer=True)
    run_on_main_and_broadcast(lambda: check_before_training(model, collate, train_rows, valid_rows))

    prompts = Collator(processor, data.image_size, data.instruction)
    show = PartialState().is_main_process and not recipe.disable_tqdm
    collate.features = prompts.features = open_feature_store(model, processor, data, [train_rows + valid_rows], show)
    lengths = count_tokens(train_rows, collate, oriented_sizes(row["image"] for row in train_rows), show)
    set_batches(
        recipe,
        run_on_main_and_broadcast(lambda: choose_batch_config(recipe, model_args, lengths, collate.features is None)),
    )
    rows = TrainDataset(train_rows, data.shuffle_choices, recipe.seed)
    trainer = FoldTrainer(
        model,
        recipe,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=valid_rows,
        callbacks=[
            SetEpochCallback(rows),
            stop,
            *averages,
            CheckpointMarkerCallback(),
        ],  # in this order: each leans on the last
        averages=averages,
        letter_ids=ids,
        prompts=prompts,
        lengths=lengths.tokens,
    )
    if trainer.is_world_process_zero():
        write_json(Path(recipe.output_dir, "args.json"), resolved)
        write_json(Path(recipe.output_dir, "rows.json"), {"fingerprint": rows_used})
    weights_before = fingerprints(model) | {"files": checkpoint_fingerprint(model_args.model), "rows": rows_used}
    start = time.time()
    trainer.train(resume_from_checkpoint=recipe.resume_from_checkpoint)
    if stop.stopped:
        say_how_to_go_on(trainer)
    finish(trainer, weights_before, time.time() - start, resolved)


def is_finished(recipe: RecipeArguments, resolved: dict, rows_used: str) -> bool:
    """Whether the fold's folder holds this very run, complete. Another run's folder is not written over."""
    folder = Path(recipe.output_dir)
    if not (folder / "args.json").is_file():
        return False
    before = read_json(folder / "args.json")
    keys = (before.keys() | resolved.keys()) - CHANGE_NOTHING
    other = sorted(key for key in keys if before.get(key) != resolved.get(key))
    if not other and (folder / "rows.json").is_file():
        other = ["rows"] if read_json(folder / "rows.json")["fingerprint"] != rows_used else []
    if not recipe.resume_from_checkpoint or other:
        what = f"a run with another {preview(other)}" if other else "this run"
        raise UserError(
            f"{folder} holds {what} already; go on with it by --resume_from_checkpoint auto and the same args, give "
            "another --output_dir, or remove the folder"
        )
    if (folder / "metrics.json").is_file():
        print(f"{folder} is finished; nothing to train")
        return True
    return False


def read_split(data: DataArguments, seed: int) -> tuple[list[dict], list[dict]]:
    """(training rows, validation rows), read from train_csv."""
    return split_rows(read_rows(data.train_csv, data.image_root, with_answer=True), data, seed)


def steps_worth(recipe: RecipeArguments, rows: int) -> float:
    """How many optimiser steps take about as long as scoring `rows` rows does, at most: no gradients are needed."""
    return rows / rows_per_step(recipe)


def set_batches(recipe: RecipeArguments, fields: dict) -> None:
    apply_batch_config(recipe, fields)
    if fields and PartialState().is_main_process:
        checkpointing = "with" if recipe.gradient_checkpointing else "without"
        size, batches = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
        print(f"a step is {batches} x {size} rows on each GPU, {checkpointing} gradient checkpointing")


def make_averages(recipe: RecipeArguments) -> list[WeightAverage]:
    averages = [EMACallback(recipe.ema_decay)] if recipe.ema_decay > 0 else []
    return averages + ([SWACallback(recipe.swa_start, recipe.swa_every)] if recipe.swa_start is not None else [])


def fingerprints(model: torch.nn.Module) -> dict[str, str]:
    """Of the base and of the fresh adapter: what every fold has to start from."""
    return {"base": frozen_fingerprint(model), "initial_adapter": trainable_fingerprint(model)}


def say_how_to_go_on(trainer: FoldTrainer) -> None:
    """End a run that was stopped in time."""
    state, recipe = trainer.state, trainer.args
    if trainer.is_world_process_zero():
        print(
            f"stopped in time at step {state.global_step} of {state.max_steps} with a checkpoint in "
            f"{recipe.output_dir}; keep that folder, and go on by the same command with --resume_from_checkpoint auto "
            "(bash run.sh does so by itself)"
        )
    sys.exit(STOPPED)


def finish(trainer: FoldTrainer, weights_before: dict[str, str], seconds: float, resolved: dict) -> None:
    """Log the run, write what its folder still lacks; metrics.json comes last and says that the fold is complete."""
    if frozen_fingerprint(trainer.model) != weights_before["base"]:
        raise RuntimeError("training has changed weights of the base model, which is to stay as it is")
    recipe, step = trainer.args, trainer.state.global_step
    if not trainer.eval_dataset:
        for name, weights in trainer.weight_sets():
            with weights:
                trainer.export(name)
    elif not trainer.best:  # eval_strategy "no"
        trainer.evaluate()
    if not trainer.is_world_process_zero():
        return
    rows = (step - initial_global_step(trainer)) * rows_per_step(recipe)
    metrics = {
        "train_rows": len(trainer.train_dataset),
        "valid_rows": len(trainer.eval_dataset),
        "steps": step,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 2),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "fingerprints": weights_before,
        "skipped_steps": trainer.skipped_steps(),
        "best": trainer.best_weights(),
        "weights": trainer.best,
    }
    metrics["run"] = log_training(recipe.output_dir, metrics, resolved)
    write_json(Path(recipe.output_dir, "metrics.json"), metrics)
    for name, scores in trainer.best.items():
        mark = f"step {scores['step']}" + ("  <- best" if name == metrics["best"] else "")
        print(f"{name:4} accuracy {scores['accuracy']:.4f}  log-loss {scores['log_loss']:.4f}  {mark}")
    print(f"{recipe.output_dir}: adapters, args.json, metrics.json" + (", oof.csv" if trainer.eval_dataset else ""))


def log_training(folder: str, metrics: dict, resolved: dict) -> str:
    """Add the run to the experiment log, and to the scores of each of its weights their number of rows and interval.

    Returns the run's id in the log.
    """
    truth, out_of_fold = Labels(resolved["train_csv"]), {}
    for name, scores in metrics["weights"].items():
        ids, (probabilities,) = join([weights_folder(folder, name) / "oof.csv"])
        out_of_fold[name] = ids, probabilities
        scores |= score_with_interval(probabilities, truth.answers(ids), truth.clusters(ids))
    return log_run(
        "training",
        folder,
        non_default_fields(resolved),
        metrics["seconds"],
        metrics["fingerprints"]["rows"],
        metrics["weights"].get(metrics["best"]),
        resolved["train_csv"],
        out_of_fold.get(metrics["best"]),
    )


if __name__ == "__main__":
    run_main(main)
    PartialState().destroy_process_group()  # left open, it may abort a process that has ended well
