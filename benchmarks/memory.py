"""Measure peak GPU memory and time of training steps, and compare them with the estimates of vqa/training.

    python benchmarks/memory.py --configs QWEN_FOLDER --models 3B 7B --sizes 384 768 --batches 1 8 --output mem.jsonl
    python benchmarks/memory.py --models checkpoints/tiny --sizes 112 --batches 2         # a dry run; no GPU needed

The models have random weights in the shapes of `config_3B.json` and so on in QWEN_FOLDER (which also has Qwen's
vocabulary), in 4 bits on a GPU. Adapter, Trainer, EMA and SWA are those of train_fold.py. Each measurement is one JSON
line. Every image has the full pixel budget.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere
from clock import ON_GPU, Clock, fresh_memory, peak, write_line  # noqa: E402
from random_model import write_random_model  # noqa: E402

from vqa.config.arguments import ModelArguments, adapter_options  # noqa: E402
from vqa.config.recipe import RecipeArguments  # noqa: E402
from vqa.core.dtypes import model_dtype  # noqa: E402
from vqa.core.errors import UserError, run_main  # noqa: E402
from vqa.data.collator import Collator  # noqa: E402
from vqa.data.prompt import letter_ids  # noqa: E402
from vqa.inference.scoring import score_rows  # noqa: E402
from vqa.modeling.loading import add_adapter, load_base, load_processor  # noqa: E402
from vqa.modeling.positions import PositionCollator  # noqa: E402
from vqa.training.callbacks import EMACallback, SWACallback  # noqa: E402
from vqa.training.dataset import SetEpochCallback, TrainDataset  # noqa: E402
from vqa.training.memory import (
    GIB,
    Batch,
    Setup,
    base_bytes,
    meta_model,
    trained_parameters,
    training_peak,
    validation_peak,
)
from vqa.training.speed import measured_rate, seconds_a_batch  # noqa: E402
from vqa.training.trainer import FoldTrainer  # noqa: E402

ACCUMULATION = 2  # batches per step, so that gradients exist at the peak of the second one
EVAL_BATCH = 16
FOR_EVER = 10**6  # steps: the clock ends no training
CHOICES = ["빨간 우산을 쓴 사람", "파란 자전거를 탄 아이", "노란 버스 두 대", "초록색 간판"]


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        picture = draw_picture(Path(temporary))
        for name in args.models:
            with model_folder(name, args.configs, args.folder) as folder:
                measure_model(name, folder, args, picture, Path(temporary))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="folder of config_3B.json, ... and Qwen's vocabulary")
    parser.add_argument("--models", nargs="+", default=["3B", "7B"], help="names in it, or model folders")
    parser.add_argument("--sizes", type=int, nargs="+", default=[384, 768], help="image_size (default: 384 768)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows per batch (default: 1 8)")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps (default: 3)")
    parser.add_argument("--folder", help="for the temporary weights (default: the system's)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    return parser.parse_args()


def draw_picture(folder: Path) -> Path:
    path = folder / "picture.jpg"
    Image.effect_noise((1000, 1000), 80).convert("RGB").save(path)
    return path


@contextmanager
def model_folder(name: str, configs: Path | None, place: str | None) -> Iterator[str]:
    """The folder of a model: `name` itself, or random weights that are deleted at the end of the block."""
    if Path(name, "config.json").is_file():
        yield name
        return
    if configs is None or not (configs / f"config_{name}.json").is_file():
        raise UserError(f"{name} is not a model folder, and --configs {configs} has no config_{name}.json")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        start = time.time()
        write_random_model(configs / f"config_{name}.json", folder)
        if ON_GPU:
            torch.cuda.empty_cache()
        print(f"{name}: random weights written in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        yield folder


def measure_model(name: str, folder: str, args: argparse.Namespace, picture: Path, temporary: Path) -> None:
    """Measure one model with every size and batch. The base is loaded once; each measurement has a new adapter."""
    start = time.time()
    model_args, dtype = ModelArguments(model=folder, load_in_4bit=ON_GPU), model_dtype(fp16=ON_GPU)
    processor = load_processor(folder)
    base = load_base(folder, ON_GPU, dtype)
    print(f"{name}: loaded in {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    shape = meta_model(model_args, dtype)
    for size in args.sizes:
        for batch_size in args.batches:
            model = add_adapter(base, **adapter_options(model_args))
            recipe = make_recipe(temporary / "run", args.steps, batch_size)
            setup = Setup(shape, ON_GPU, checkpointing=True, optimizer=recipe.optim.value)
            line = {"model": name, "image_size": size, "batch": batch_size}
            line |= measure(model, processor, recipe, setup, size, picture)
            write_line(line, args.output)
            base = model.unload()
            del model


def make_recipe(folder: Path, steps: int, batch_size: int) -> RecipeArguments:
    return RecipeArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=EVAL_BATCH,
        effective_batch_size=batch_size * ACCUMULATION,
        gradient_checkpointing=True,
        fp16=ON_GPU,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def measure(model, processor, recipe: RecipeArguments, setup: Setup, size: int, picture: Path) -> dict:
    """Train and validate a few batches: peaks in GiB, seconds per batch without the first step, and the estimates."""
    question = "사진의 왼쪽에 보이는 것은 무엇인가요?"
    rows = [
        {"id": str(i), "images": [str(picture)], "question": question, "choices": CHOICES, "answer": i % 4}
        for i in range(max(EVAL_BATCH, recipe.per_device_train_batch_size * ACCUMULATION))
    ]
    train_rows, averages, clock = TrainDataset(rows, True, 42), [EMACallback(), SWACallback()], Clock(FOR_EVER, 0)
    collate, prompts = Collator(processor, size, with_answer=True), Collator(processor, size)
    ids, example = letter_ids(processor), collate(rows[:1])
    trainer = FoldTrainer(
        model,
        recipe,
        data_collator=PositionCollator(collate, model),
        train_dataset=train_rows,
        eval_dataset=[],
        callbacks=[SetEpochCallback(train_rows), *averages, clock],
        weight_averages=averages,
        letter_ids=ids,
        prompts=prompts,
    )
    shape = Batch(recipe.per_device_train_batch_size, example["input_ids"].shape[1], len(example["pixel_values"]))
    with fresh_memory():
        before = torch.cuda.memory_allocated() / GIB if ON_GPU else None
        trainer.train()
        training = peak(3)
    with fresh_memory():
        score_rows(trainer.accelerator.unwrap_model(trainer.model), rows[:EVAL_BATCH], prompts, ids, EVAL_BATCH)
        validation = peak(3)
    eval_shape = Batch(EVAL_BATCH, shape.tokens, shape.patches)
    return {
        "tokens": shape.tokens,
        "patches": shape.patches,
        "averaged_steps": averages[0].updates,  # 0: the loss scaler skipped every step, so the optimiser has no state
        **compare("", training, training_peak(setup, shape) / GIB),
        **compare("start_", before, (base_bytes(setup) + 4 * trained_parameters(setup)) / GIB),
        **compare("validation_", validation, validation_peak(setup, eval_shape) / GIB),
        "seconds": round(min(clock.times(), default=0.0) / ACCUMULATION, 3),
        "estimated_seconds": estimated_seconds(setup, shape),
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
    }


def compare(prefix: str, measured: float | None, estimated: float) -> dict:
    ratio = measured and round(estimated / measured, 3)
    return {
        f"{prefix}measured_gib": measured and round(measured, 3),
        f"{prefix}estimated_gib": round(estimated, 3),
        f"{prefix}ratio": ratio,
    }


def estimated_seconds(setup: Setup, shape: Batch) -> float | None:
    if not ON_GPU:
        return None
    return round(seconds_a_batch(setup, shape, operations_a_second=measured_rate(setup)), 3)


if __name__ == "__main__":
    run_main(main)
