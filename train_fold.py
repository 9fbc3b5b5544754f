"""Train folds: an args file -> adapters, metrics and out-of-fold probabilities in checkpoints/<name>/.

accelerate launch train_fold.py args/fold0.json
accelerate launch train_fold.py args/fold0.json --learning_rate 1e-4 --max_train_rows 200
accelerate launch train_fold.py args/fold0.json args/fold1.json args/fold2.json   # one by one; the base is loaded once
python train_fold.py args/demo/fold0.json                                         # the demo; needs no GPU
"""

import sys
import time

import torch
import transformers
from accelerate import PartialState

from vqa.config.recipe import RecipeArguments
from vqa.core.compat import initial_global_step
from vqa.core.distributed import run_on_main_and_broadcast
from vqa.core.errors import run_main
from vqa.core.io import check_writable
from vqa.core.workers import WorkerCollator
from vqa.data.images import all_images, check_images, oriented_sizes, with_crops
from vqa.evaluation.reference import Reference
from vqa.modeling.feature_store import images_with_features
from vqa.modeling.positions import PositionCollator
from vqa.modeling.suffix_score import COLLATORS
from vqa.modeling.tree_attention import TreeCollator
from vqa.training.batching import apply_batch_config, choose_batch_config, count_tokens
from vqa.training.callbacks import EarlyStoppingCallback, EMACallback, FrozenWeightsCheck, SWACallback, WeightAverage
from vqa.training.checkpointing import (
    CheckpointMarkerCallback,
    ScoreHeadCallback,
    TimeLimitCallback,
    checkpoint_to_resume,
)
from vqa.training.dataset import SetEpochCallback, TrainDataset
from vqa.training.fold_run import FoldRun, parse_runs
from vqa.training.preflight import check_attention, check_before_training
from vqa.training.shared_base import SharedBase
from vqa.training.trainer import FoldTrainer

STOPPED = 3  # exit code of a run that max_hours stopped


def main() -> None:
    runs = parse_runs(sys.argv[1:], __doc__)
    runs = [run for run in runs if not read_and_check(run)]
    run_on_main_and_broadcast(lambda: check_all_images(runs))
    if not runs:
        return
    if runs[0].recipe.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    base = SharedBase(runs[0].model_args, runs[0].recipe)
    for run in runs:
        train(run, base)
        base.remove_adapter()


def read_and_check(run: FoldRun) -> bool:
    """Read the run's rows and find the checkpoint to resume. Returns whether the fold is finished already."""
    recipe, checkpoint = run.recipe, run.recipe.resume_from_checkpoint
    run_on_main_and_broadcast(lambda: check_attention(run.model_args, recipe.permutations_per_step))
    run.train_rows, run.valid_rows = run_on_main_and_broadcast(run.read_rows)
    if run_on_main_and_broadcast(run.is_finished):
        print_on_main(f"{run.folder} is finished; nothing to train")
        return True
    run_on_main_and_broadcast(lambda: check_writable(run.folder, "--output_dir"))
    recipe.resume_from_checkpoint = run_on_main_and_broadcast(
        lambda: checkpoint_to_resume(checkpoint, run.folder, recipe.effective_batch_size)
    )
    if run.data.fold is None:
        recipe.eval_strategy = "no"
    return False


def check_all_images(runs: list[FoldRun]) -> None:
    """Open every image of the runs once, before any of them is trained, but those with stored features."""
    checked: set[str] = set()
    for run in runs:
        rows = run.train_rows + run.valid_rows
        if checked.issuperset(all_images(rows)):  # as for the second fold of a contest
            continue
        checked |= images_with_features(rows, run.data.vision_cache_dir)
        check_images(rows, run.data.train_csv, checked=checked)
        checked.update(all_images(rows))


def train(run: FoldRun, base: SharedBase) -> None:
    """Train one fold and fill its folder. Exits with STOPPED where max_hours stops it."""
    recipe, data, train_rows, valid_rows = run.recipe, run.data, run.train_rows, run.valid_rows
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # an earlier run of this process had its own peak
    weight_averages = make_weight_averages(recipe)
    score_head = [ScoreHeadCallback()] if run.model_args.score == "suffix" else []
    time_limit = make_time_limit(recipe, len(valid_rows) * (1 + len(weight_averages)))
    early_stopping = [EarlyStoppingCallback(patience)] if (patience := recipe.early_stopping_patience) else []
    show = PartialState().is_main_process and not recipe.disable_tqdm
    if data.crops:
        train_rows = with_crops(train_rows, data.image_size)

    collator = COLLATORS[run.model_args.score]
    collate = collator(base.processor, data.image_size, data.instruction, with_answer=True)
    prompts = collator(base.processor, data.image_size, data.instruction)
    model = base.add_adapter(run.model_args, recipe)
    run_on_main_and_broadcast(
        lambda: check_before_training(model, collate, train_rows, valid_rows, run.model_args.lora_vision)
    )
    collate.features = prompts.features = base.features(data, train_rows + valid_rows, show)
    permutations = recipe.permutations_per_step
    lengths = count_tokens(train_rows, collate, oriented_sizes(all_images(train_rows)), show, permutations)
    encodes_images = collate.features is None
    set_batches(
        recipe, run_on_main_and_broadcast(lambda: choose_batch_config(recipe, run.model_args, lengths, encodes_images))
    )
    dataset = TrainDataset(train_rows, data.shuffle_choices, recipe.seed, permutations)
    if recipe.dataloader_persistent_workers:
        dataset.epoch.share_memory_()
    trainer = FoldTrainer(
        model,
        recipe,
        data_collator=WorkerCollator(PositionCollator(TreeCollator(collate) if permutations > 1 else collate, model)),
        train_dataset=dataset,
        eval_dataset=valid_rows,
        # In this order: the limit may ask for a checkpoint, averages and head write into it, the marker completes it.
        callbacks=[
            *(SetEpochCallback(dataset), FrozenWeightsCheck(), *early_stopping, time_limit),
            *(*weight_averages, *score_head, CheckpointMarkerCallback()),
        ],
        weight_averages=weight_averages,
        letter_ids=base.letter_ids,
        prompts=prompts,
        lengths=lengths.tokens,
    )
    fingerprints = {}
    if trainer.is_world_process_zero():
        run.write_config()
        fingerprints = base.fingerprints() | {"rows": run.rows_fingerprint()}

    start = time.time()
    trainer.train(resume_from_checkpoint=recipe.resume_from_checkpoint)
    if time_limit.stopped:
        stop(
            f"{run.folder}: stopped in time at step {trainer.state.global_step} of {trainer.state.max_steps}, "
            "with a checkpoint. Keep the folder and run the same command with --resume_from_checkpoint auto "
            "(run.sh adds it)."
        )
    seconds = time.time() - start

    if not valid_rows:
        trainer.validator.export_all(model)
    elif not trainer.validator.best:  # eval_strategy "no"
        trainer.evaluate()
    if trainer.is_world_process_zero():
        warning = run.write_metrics(make_metrics(trainer, fingerprints, seconds))
        print(summary(run, trainer), *filter(None, [warning]), sep="\n")


def make_weight_averages(recipe: RecipeArguments) -> list[WeightAverage]:
    ema = [EMACallback(recipe.ema_decay)] if recipe.ema_decay > 0 else []
    swa = [SWACallback(recipe.swa_start, recipe.swa_every)] if recipe.swa_start is not None else []
    return [*ema, *swa]


def make_time_limit(recipe: RecipeArguments, scored_rows: int) -> TimeLimitCallback:
    """The callback that ends the run in time. An evaluation scores `scored_rows` rows, at most as fast as training."""
    time_limit = TimeLimitCallback(recipe.max_hours, evaluation_steps=scored_rows / recipe.effective_batch_size)
    if run_on_main_and_broadcast(time_limit.is_late):
        stop(f"{recipe.output_dir}: no time is left of max_hours. Run the same command in a new session.")
    return time_limit


def set_batches(recipe: RecipeArguments, config: dict[str, int | bool]) -> None:
    apply_batch_config(recipe, config)
    if config:
        checkpointing = "with" if recipe.gradient_checkpointing else "without"
        size, batches = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
        print_on_main(f"each step is {batches} x {size} rows on each GPU, {checkpointing} gradient checkpointing")


def make_metrics(trainer: FoldTrainer, fingerprints: dict[str, str], seconds: float) -> dict:
    steps = trainer.state.global_step
    rows = (steps - initial_global_step(trainer)) * trainer.args.effective_batch_size
    return {
        "train_rows": len(trainer.train_dataset),
        "valid_rows": len(trainer.eval_dataset),
        "steps": steps,
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 2),
        "peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
        "fingerprints": fingerprints,
        "skipped_steps": trainer.skipped_steps(),
        "best": trainer.validator.best_weights(),
        "weights": trainer.validator.best,
    }


def summary(run: FoldRun, trainer: FoldTrainer) -> str:
    best, name = trainer.validator.best, trainer.validator.best_weights()
    if name not in best:
        return f"{run.folder}: trained on {len(run.train_rows)} rows"
    scores = best[name]  # write_metrics added the reference
    return (
        f"{run.folder}: best weights {name} at step {scores['step']}, accuracy {scores['accuracy']:.4f}, "
        f"log-loss {scores['log_loss']:.4f} ({Reference(scores['chance'], scores['text_only'])})"
    )


def print_on_main(message: str) -> None:
    if PartialState().is_main_process:
        print(message, flush=True)


def stop(message: str) -> None:
    print_on_main(message)
    sys.exit(STOPPED)


if __name__ == "__main__":
    run_main(main)
    PartialState().destroy_process_group()  # left open, it may abort a process that ended well
