"""Which rows share a batch, and how many: rows of like length, and as many as the GPU's memory holds.

What the args say is an optimiser step: `per_device_train_batch_size` times `gradient_accumulation_steps` rows. With
`auto_batch` these rows are cut into the micro-batches that this GPU gets through quickest, and gradient checkpointing
is left out where its memory is not needed. The mean over the step's rows stays the same.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm

from vqa.config.arguments import ModelArguments
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.io import read_json, write_json
from vqa.data.collator import Collator
from vqa.data.images import image_tokens, target_size
from vqa.data.prompt import LETTERS, build_messages, render_chat
from vqa.training.memory import CUDA_BYTES, Batch, Setup, meta_model, training_peak
from vqa.training.speed import measured_rate, seconds_a_batch


def rows_per_step(args) -> int:
    """Rows of an optimiser step, on all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def split_batch(batch: dict, most: int) -> list[dict]:
    """The batch in batches of at most `most` rows; image tensors, which hold all rows' images in a row, go along."""
    rows = len(batch["ids"])
    if rows <= most:
        return [batch]
    patches = batch["image_grid_thw"].prod(1)
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    parts = [{} for _ in sizes]
    for key, value in batch.items():
        if key in ("pixel_values", "image_features"):
            along = 1 if key == "image_features" else 0
            of_rows = patches * value.shape[along] // patches.sum()
            pieces = value.split([int(chunk.sum()) for chunk in of_rows.split(sizes)], dim=along)
        elif isinstance(value, torch.Tensor):
            pieces = value.split(sizes)
        else:
            pieces = [value[start : start + most] for start in range(0, rows, most)]
        for part, piece in zip(parts, pieces):
            part[key] = piece
    return parts


SLACK = 0.94  # of the memory: what the estimate may be short of, and blocks that do not fit together


RECORD = "batch.json"  # in the fold's folder: a run that goes on keeps the batches that it began with


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row, text and image together, and of its image alone; `patches` that make an image token."""

    tokens: np.ndarray
    image_tokens: np.ndarray
    patches: int

    def batch(self, rows: int, statistic=np.max) -> Batch:
        return Batch(rows, int(statistic(self.tokens)), self.patches * int(statistic(self.image_tokens)))


def count_tokens(
    rows: Sequence[dict], collate: Collator, sizes: Mapping[str, tuple[int, int]], show: bool = True
) -> Lengths:
    """How long the rows are as the model reads them, answers included, without decoding an image.

    `sizes`: image -> (width, height) of it upright, of every image that the rows show. Of several wordings of a
    question the longest counts: which one an epoch asks is drawn later.
    """
    image_tokens = count_image_tokens(sizes, collate)
    bar = tqdm(rows, desc="counting tokens", unit=" rows", leave=False, disable=not show)
    asked = (row | {"question": max([row["question"], *row.get("paraphrases", [])], key=len)} for row in bar)
    chats = (build_messages(row, {"type": "image"}, collate.instruction, collate.special) for row in asked)
    texts = (render_chat(collate.processor, chat, LETTERS[0]) for chat in chats)
    some = iter(lambda: list(itertools.islice(texts, 1000)), [])  # not all at once: only the counts are kept
    tokenizer = collate.processor.tokenizer
    text_tokens = np.array([len(ids) - 1 for part in some for ids in tokenizer(part).input_ids])  # 1: <|image_pad|>
    of_images = np.array([image_tokens[row["image"]] for row in rows])
    return Lengths(text_tokens + of_images, of_images, collate.processor.image_processor.merge_size**2)


def count_image_tokens(sizes: Mapping[str, tuple[int, int]], collate: Collator) -> dict[str, int]:
    """Image -> tokens that the pixel budget gives it."""
    patch = collate.processor.image_processor.patch_size
    grids = {path: target_size(*size, collate.image_size, patch=patch) for path, size in sizes.items()}
    return {path: image_tokens(*grid, patch) for path, grid in grids.items()}


def choose_batch_config(
    recipe: RecipeArguments, model_args: ModelArguments, lengths: Lengths, encodes_images: bool
) -> dict[str, int | bool]:
    """Micro-batch, accumulation and checkpointing for this GPU, as fields of the recipe; empty without `auto_batch`.

    `encodes_images`: whether training runs the vision tower, whose features are not stored.
    """
    record = Path(recipe.output_dir, RECORD)
    if recipe.resume_from_checkpoint and record.is_file():
        return read_json(record)
    if not recipe.auto_batch or not torch.cuda.is_available():
        return {}
    dtype = model_dtype(recipe.fp16, recipe.bf16)
    setup = make_setup(model_args, recipe, meta_model(model_args, dtype))
    lengths = lengths if encodes_images else replace(lengths, patches=0)
    rate = measured_rate(setup)
    rows = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    fields = choose_micro_batch(setup, lengths, rows, SLACK * memory_room(), rate, recipe.wants_checkpointing)
    write_json(record, fields)
    return fields


def make_setup(args: ModelArguments, recipe: RecipeArguments, model: PeftModel) -> Setup:
    """What a run holds in memory beside its batches."""
    averages = (recipe.ema_decay > 0) + (recipe.swa_start is not None)
    return Setup(model, args.load_in_4bit, bool(recipe.gradient_checkpointing), recipe.optim.value, averages)


def apply_batch_config(recipe: RecipeArguments, fields: dict[str, int | bool]) -> None:
    """Set what `fit_batches` found in the recipe."""
    for name, value in fields.items():
        recipe.set_checkpointing(value) if name == "gradient_checkpointing" else setattr(recipe, name, value)


def memory_room() -> int:
    """Bytes that torch may allocate on this GPU, as far as this process was not limited to a share of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    return int(min(total - CUDA_BYTES, total * torch.cuda.get_per_process_memory_fraction()))


def choose_micro_batch(
    setup: Setup, lengths: Lengths, rows: int, room: float, rate: float, checkpointing: bool | None
) -> dict[str, int | bool]:
    """The way through `rows` rows of a step that takes the fewest seconds of those that fit into `room` bytes.

    Judged by the longest rows; where nothing fits by the estimate, one row at a time with checkpointing is tried.
    `checkpointing`: None leaves it open. `rate` is the GPU's, in operations a second.
    """
    ways = []
    for micro in (size for size in range(1, rows + 1) if rows % size == 0):
        batch = lengths.batch(micro)
        for recomputed in (False, True) if checkpointing is None else (checkpointing,):
            way = replace(setup, checkpointing=recomputed)
            if training_peak(way, batch) <= room:
                ways.append((rows // micro * seconds_a_batch(way, batch, True, rate), -micro, recomputed))
    _, size, recomputed = min(ways, default=(0, -1, checkpointing is not False))
    return {
        "per_device_train_batch_size": -size,
        "gradient_accumulation_steps": rows // -size,
        "gradient_checkpointing": recomputed,
    }
