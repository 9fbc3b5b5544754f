"""How many rows go through the model at once: as many as GPU memory holds.

The args say how many rows an optimiser step has (`effective_batch_size`). Each process takes its part of them. With
`auto_batch` a part is cut into the micro-batches that this GPU processes fastest, and gradient checkpointing is left
out where its memory is not needed. The mean over the step's rows stays the same.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from vqa.data.images import shown_images
from vqa.data.rows import Row
from vqa.modeling.base_checks import BNB_4BIT, saved_quantization
from vqa.modeling.shared_prefix import common_length
from vqa.modeling.vision import unwrap_base_model
from vqa.training.dataset import rotations
from vqa.training.memory import CUDA_BYTES, Batch, Setup, meta_model, training_peak
from vqa.training.speed import measured_rate, seconds_a_batch


def split_batch(batch: dict, most: int) -> list[dict]:
    """The batch in parts of at most `most` rows; image tensors hold all rows' images one after another."""
    rows = len(batch["ids"])
    if rows <= most:
        return [batch]
    num_images = batch["num_images"]
    sizes = [min(most, rows - start) for start in range(0, rows, most)]
    parts: list[dict] = [{} for _ in sizes]
    images = [sum(num_images[start : start + most]) for start in range(0, rows, most)]
    for key, value in batch.items():
        of_images = key in ("pixel_values", "image_features", "image_grid_thw", "image_sizes")
        if key == "pixel_values" and "pixel_rows" in batch:
            entries = batch["pixel_rows"]
            pieces = value.split([sum(entries[start : start + most]) for start in range(0, rows, most)])
        elif key in ("pixel_values", "image_features"):
            along = 1 if key == "image_features" else 0
            patches = batch["image_grid_thw"].prod(1)
            lengths = patches * value.shape[along] // patches.sum()
            pieces = value.split([int(chunk.sum()) for chunk in lengths.split(images)], dim=along)
        elif key in ("image_grid_thw", "image_sizes"):
            pieces = value.split(images)
        elif isinstance(value, torch.Tensor):
            pieces = value.split(sizes)
        elif isinstance(value, int):
            pieces = [value] * len(sizes)
        else:
            pieces = [value[start : start + most] for start in range(0, rows, most)]
        for part, piece, number in zip(parts, pieces, images):
            if number or not of_images:  # a part without images is as the Collator makes it
                part[key] = piece
    return parts


class MicroBatches:
    """Runs each batch in one part, and in smaller equal parts once GPU memory has run out.

    Only with `auto_batch`, in one process and on a GPU: other processes would wait for one that repeats its batch.
    The smaller size is kept for the rest of the run, and for a resumed one (batch.json).
    """

    def __init__(self, args: RecipeArguments):
        self.args, self.rows = args, args.per_device_train_batch_size
        self.can_retry = args.auto_batch and args.world_size == 1 and args.device.type == "cuda"

    def run(
        self,
        train: Callable[[dict], torch.Tensor],
        batch: dict,
        parameters: Sequence[torch.nn.Parameter],
        step: int,
    ) -> torch.Tensor:
        """The sum of `train(part)`, which runs forward and backward passes and returns the loss, over the parts.

        `parameters` are the trained ones. Their gradients from earlier batches of this step are set aside and added
        at the end, so that a part that failed halfway leaves nothing behind and no gradient is copied.
        """
        if not self.can_retry:
            return train(batch)
        earlier = [parameter.grad for parameter in parameters]
        while True:
            for parameter in parameters:
                parameter.grad = None
            try:
                loss = torch.stack([train(part) for part in split_batch(batch, self.rows)]).sum()
                break
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
            self._shrink(step)
        pairs = [(parameter, gradient) for parameter, gradient in zip(parameters, earlier) if gradient is not None]
        for parameter, gradient in pairs:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _shrink(self, step: int) -> None:
        """Take the next smaller equal part of a batch from now on."""
        size = self.args.per_device_train_batch_size
        self.rows = max(rows for rows in range(1, self.rows) if size % rows == 0)
        torch.cuda.empty_cache()
        print(f"out of GPU memory at step {step}: continuing with {self.rows} rows at once")
        config = {
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": size // self.rows * self.args.gradient_accumulation_steps,
            "gradient_checkpointing": self.args.gradient_checkpointing,
        }
        write_json(Path(self.args.output_dir, RECORD), config)


SLACK = 0.94  # of the memory: the estimate may be short, and free blocks may be too small

RECORD = "batch.json"  # in the fold's folder: a run that is resumed on as many GPUs keeps its micro-batches


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row, text and images together, and of its images alone; `patches` make an image token."""

    tokens: np.ndarray
    image_tokens: np.ndarray
    patches: int
    permutations: int = 1  # of the choices, that share a row's first tokens

    def batch(self, rows: int, statistic: Callable[[np.ndarray], float] = np.max) -> Batch:
        """A batch of `rows` rows, all as long as the longest row (or another statistic of the lengths)."""
        return Batch(
            rows, int(statistic(self.tokens)), self.patches * int(statistic(self.image_tokens)), self.permutations
        )


def count_tokens(
    rows: Sequence[Row],
    collate: Collator,
    sizes: Mapping[str, tuple[int, int]],
    show: bool = True,
    permutations: int = 1,
) -> Lengths:
    """The tokens of each row with its answer, counted without decoding an image.

    `sizes` has the upright (width, height) of every image of the rows. Of a question and its paraphrases the longest
    counts, since each epoch draws one, and crops count, which half of the epochs draw. With several `permutations` of
    the choices, what they share counts once.
    """
    images = {
        image: collate.images.shown_size(image, *sizes[image.path]) for row in rows for image in shown_images(row)
    }
    image_tokens = dict(zip(images, collate.images.tokens(images.values())))
    bar = tqdm(rows, desc="counting tokens", unit=" rows", leave=False, disable=None if show else True)
    longest: Iterable[Row] = (
        {**row, "question": max([row["question"], *row.get("paraphrases", [])], key=len)} for row in bar
    )
    texts = (
        [collate.chat_text({**row, "permutation": p}) for p in rotations([*range(len(row["choices"]))], permutations)]
        for row in longest
    )
    chunks = iter(lambda: list(itertools.islice(texts, 1000)), [])  # not all at once: only the counts are kept
    text_tokens = np.array([count for chunk in chunks for count in count_shared(collate.processor.tokenizer, chunk)])
    num_images = np.array([len(shown_images(row)) for row in rows])  # each is one <|image_pad|> in the text
    of_images = np.array([sum(image_tokens[image] for image in shown_images(row)) for row in rows])
    return Lengths(text_tokens - num_images + of_images, of_images, collate.images.patches_per_token, permutations)


def count_shared(tokenizer, texts: list[list[str]]) -> Iterator[int]:
    """For each list of texts, the number of their tokens where those that all begin with count once."""
    encoded = iter(tokenizer([text for of_row in texts for text in of_row]).input_ids)
    for of_row in texts:
        tokens = [next(encoded) for _ in of_row]
        yield sum(map(len, tokens)) - (len(tokens) - 1) * common_length(tokens)


def choose_batch_config(
    recipe: RecipeArguments, model_args: ModelArguments, lengths: Lengths, encodes_images: bool
) -> dict[str, int | bool]:
    """Micro-batch, accumulation and checkpointing for this GPU, as fields of the recipe; empty without `auto_batch`.

    `encodes_images`: whether training runs the vision tower, because its features are not stored.
    """
    record = Path(recipe.output_dir, RECORD)
    if recipe.resume_from_checkpoint and record.is_file() and fits_recipe(config := read_json(record), recipe):
        return config
    if not recipe.auto_batch or not torch.cuda.is_available():
        return {}
    setup = make_setup(model_args, recipe, meta_model(model_args, model_dtype(recipe.fp16, recipe.bf16)))
    lengths = lengths if encodes_images else replace(lengths, patches=0)
    room = SLACK * available_memory()
    config = choose_micro_batch(setup, lengths, recipe, room, measured_rate(setup))
    write_json(record, config)
    return config


def fits_recipe(config: dict[str, int | bool], recipe: RecipeArguments) -> bool:
    """Whether an earlier choice is one that this run could make: for as many rows on each GPU, within its limits."""
    size, batches = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
    checkpointing = recipe.wants_checkpointing in (None, config["gradient_checkpointing"])
    return checkpointing and size in recipe.micro_batch_sizes() and size * batches == recipe.rows_per_process()


def make_setup(args: ModelArguments, recipe: RecipeArguments, model: PeftModel) -> Setup:
    """What a run holds in memory besides its batches."""
    averages = (recipe.ema_decay > 0) + (recipe.swa_start is not None)
    optimizer = recipe.optim.value  # type: ignore[attr-defined]  # TrainingArguments makes an enum of the name
    in_4bit = args.load_in_4bit or saved_quantization(unwrap_base_model(model).config) == BNB_4BIT
    return Setup(model, in_4bit, bool(recipe.gradient_checkpointing), optimizer, averages)


def apply_batch_config(recipe: RecipeArguments, config: dict[str, int | bool]) -> None:
    """Set the fields that `choose_batch_config` chose."""
    for name, value in config.items():
        recipe.set_checkpointing(bool(value)) if name == "gradient_checkpointing" else setattr(recipe, name, value)


def available_memory() -> int:
    """Bytes that torch may allocate on this GPU; fewer where the process was limited to a share of it."""
    total = torch.cuda.get_device_properties(0).total_memory
    return int(min(total - CUDA_BYTES, total * torch.cuda.get_per_process_memory_fraction()))


def choose_micro_batch(
    setup: Setup, lengths: Lengths, recipe: RecipeArguments, room: float, rate: float
) -> dict[str, int | bool]:
    """The fastest way through a GPU's rows of a step that fits into `room` bytes and that the recipe leaves open.

    The longest rows are what has to fit. Where nothing fits by the estimate, one row at a time with checkpointing is
    tried. `rate` is the GPU's, in operations a second.
    """
    rows, checkpointing, fitting = recipe.rows_per_process(), recipe.wants_checkpointing, []
    for size in recipe.micro_batch_sizes():
        batch = lengths.batch(size)
        for recompute in (False, True) if checkpointing is None else (checkpointing,):
            candidate = replace(setup, checkpointing=recompute)
            if training_peak(candidate, batch) <= room:
                seconds = rows // size * seconds_a_batch(candidate, batch, rate)
                fitting.append((seconds, -size, recompute))  # of equal times the larger batch
    _, negative_size, recompute = min(fitting, default=(0, -1, checkpointing is not False))
    return {
        "per_device_train_batch_size": -negative_size,
        "gradient_accumulation_steps": rows // -negative_size,
        "gradient_checkpointing": recompute,
    }
