"""The checks of doctor.py. Each prints one section, and adds blockers and warnings to the report."""

import math
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from tqdm.auto import tqdm

from vqa.config.arguments import DataArguments, ModelArguments, folds_file, reader_options
from vqa.config.recipe import RecipeArguments
from vqa.core.errors import UserError, pluralize, preview
from vqa.data.collator import Collator
from vqa.data.folds import read_folds
from vqa.data.images import (
    all_images,
    bad_images_warning,
    check_images,
    find_bad_images,
    oriented_size,
    with_crops,
    without_bad_images,
)
from vqa.data.prompt import letter_ids, shown_answer
from vqa.data.rows import LETTERS, Row, read_rows, rows_with_equal_choices
from vqa.data.splits import images_across_folds, shared_images, split_problems
from vqa.modeling.base_checks import check_base, saved_quantization
from vqa.modeling.suffix_score import SuffixCollator
from vqa.training.batching import (
    SLACK,
    Lengths,
    available_memory,
    choose_micro_batch,
    count_tokens,
)
from vqa.training.dataset import TrainDataset
from vqa.training.earlier_runs import read_split
from vqa.training.memory import (
    CUDA_BYTES,
    GIB,
    T4_BYTES,
    Batch,
    Setup,
    resident_terms,
    training_peak,
    validation_peak,
)
from vqa.training.preflight import adapter_problems, adapter_targets, check_attention, label_problems, supervised_texts
from vqa.training.speed import T4_OPERATIONS, measured_rate, seconds_a_batch


@dataclass
class Report:
    """What the checks found: `blockers` must be fixed before training, `warnings` need not."""

    blockers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        print(f"\n{title}\n{'-' * len(title)}")

    def conclude(self) -> None:
        """Print warnings and blockers; exit with code 1 if there are blockers."""
        if self.warnings:
            self.section("Warnings")
            print("\n".join(f"- {warning}" for warning in self.warnings))
        if not self.blockers:
            print("\nready")
            return
        self.section("Fix before training")
        print("\n".join(f"{number}. {blocker}" for number, blocker in enumerate(self.blockers, start=1)))
        sys.exit(1)


@dataclass
class Contest:
    """The rows of train_csv, the fold of each (None without folds), the two sides of the split, and the test rows."""

    rows: list[Row]
    folds: np.ndarray | None
    train: list[Row]
    valid: list[Row]
    test: list[Row]


def read_contest(report: Report, data: DataArguments, seed: int) -> Contest:
    """Read and check the CSVs, the folds file and every image.

    A broken training image raises UserError, as in training. A broken test image is a warning; its rows are checked
    without it, as `predict.py --skip_bad_images` answers them.
    """
    rows = read_rows(data.train_csv, data.image_root, with_answer=True, **reader_options(data))
    check_images(rows, data.train_csv)
    test = read_rows(data.test_csv, data.image_root, **reader_options(data)) if Path(data.test_csv).is_file() else []
    if not test:
        report.warnings.append(f"{data.test_csv}: no such file, so the test rows were not checked")
    if broken := find_bad_images(test, data.test_csv):
        report.warnings.append(bad_images_warning(broken, data.test_csv))
    test = without_bad_images(test, broken)
    folds = None
    if data.fold is not None:
        folds = read_folds(folds_file(data), [row["id"] for row in rows], data.train_csv)
    train, valid = read_split(data, seed, rows, folds)
    train = with_crops(train, data.image_size) if data.crops else train
    return Contest(rows, folds, train, valid, test)


def check_labels(report: Report, collate: Collator, rows: TrainDataset) -> None:
    """Whether the labels of three rows cover the right letter, and whether each letter is one token."""
    report.section("Prompt and labels")
    if isinstance(collate, SuffixCollator):
        print("score suffix: each choice is scored as the answer to the question; their order changes nothing")
        return
    try:
        ids = letter_ids(collate.processor)
    except UserError as error:
        report.blockers.append(str(error))
        return
    print("the prediction prompt is, token for token, a prefix of the training text")
    print(f"token of each letter: {', '.join(f'{letter} {token}' for letter, token in zip(LETTERS, ids))}")
    samples = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    for row, text in zip(samples, supervised_texts(collate, samples)):
        right, letter = row["choices"][row["answer"]], LETTERS[shown_answer(row)]
        print(f"{row['id']}: the right choice {right!r} is shown at {letter}; the labels cover {text!r}")
    report.blockers += label_problems(collate, samples)


def check_model(report: Report, args: ModelArguments, model: PeftModel, permutations_per_step: int = 1) -> None:
    """Where the adapter is, and whether all files of weights are there."""
    report.section("Model and adapter")
    trained, total = model.get_nb_trainable_parameters()
    print(f"{args.model}: {total:,} parameters, {trained:,} of them trained ({trained / total:.2%})")
    print("adapter on " + ", ".join(f"{number} {name}" for name, number in adapter_targets(model).items()))
    problems = adapter_problems(model, args.lora_vision)
    where = "part of it in the vision tower (lora_vision)" if args.lora_vision else "none of it in the vision tower"
    print(problems[0] if problems else where)
    report.blockers += problems
    try:
        config = check_base(args.model, args.load_in_4bit, args.trust_remote_code)
        check_attention(args, permutations_per_step)
        print(f"all files of weights are complete; quantization: {saved_quantization(config) or 'none'}")
    except UserError as error:
        report.blockers.append(str(error))


def check_tokens(
    report: Report, collate: Collator, contest: Contest, permutations: int = 1
) -> tuple[Lengths, Lengths | None]:
    """Print the images' sizes and tokens. Returns the lengths of the training rows and of the validation rows."""
    report.section("Images and tokens")
    paths = sorted(all_images(contest.rows))
    sizes = {path: oriented_size(path) for path in tqdm(paths, desc="reading image sizes", leave=False, disable=None)}
    tokens = dict(zip(sizes, collate.images.tokens(collate.images.size(*size) for size in sizes.values())))
    by_tokens = sorted(paths, key=tokens.__getitem__)
    examples = [by_tokens[i] for i in (0, len(paths) // 2, -1) if paths]
    for name, path in zip(("smallest", "median", "largest"), examples):
        width, height = collate.images.size(*sizes[path])
        given = "{} x {}".format(*sizes[path])
        print(f"{name:8} image {given}, resized to {width} x {height}: {tokens[path]} tokens")
    larger = sum(width * height > collate.image_size**2 for width, height in sizes.values())
    more = f"images have more pixels than image_size {collate.image_size} allows and are shrunk"
    print(f"{larger} of {len(paths)} {more}" if paths else "no row has an image")
    train = count_tokens(contest.train, collate, sizes, permutations=permutations)
    median, longest = int(np.median(train.tokens)), train.tokens.max()
    print(f"tokens of a training row, text and image: median {median}, longest {longest}")
    return train, count_tokens(contest.valid, collate, sizes) if contest.valid else None


def check_rows(report: Report, contest: Contest, data: DataArguments) -> None:
    """Rows by fold and answer, equal choices, and images that are shared between splits or folds."""
    report.section("Rows")
    answers = pd.Series([LETTERS[row["answer"]] for row in contest.rows], name="answer")
    folds = pd.Series("-" if contest.folds is None else contest.folds, answers.index, name="fold")
    print(pd.crosstab(folds, answers, margins=True).to_string())
    counts = Counter(len(row["choices"]) for row in contest.rows)
    print("choices per row: " + ", ".join(f"{pluralize(counts[n], 'row')} with {n}" for n in sorted(counts)))
    for rows, csv in ((contest.rows, data.train_csv), (contest.test, data.test_csv)):
        if equal := rows_with_equal_choices(rows):
            report.warnings.append(f"{csv}: {pluralize(len(equal), 'row')} with two equal choices: {preview(equal)}")
    if pairs := shared_images(contest.test, contest.rows):
        ids, number = preview([f"{a} and {b}" for a, b in pairs]), pluralize(len(pairs), "test row")
        report.warnings.append(f"{number} with the same image as a training row: {ids}")
    if contest.folds is None:
        return
    report.blockers += split_problems(contest.train, contest.valid)
    if across := images_across_folds(contest.rows, contest.folds):
        ids, number = preview([" and ".join(ids[:2]) for ids in across]), pluralize(len(across), "image")
        report.warnings.append(f"{number} in more than one fold: {ids}. Validation scores are too high.")


def check_cost(
    report: Report,
    setup: Setup,
    recipe: RecipeArguments,
    data: DataArguments,
    train: Lengths,
    valid: Lengths | None,
) -> None:
    """Estimate memory and time on this GPU, or the memory on a T4 where there is no GPU."""
    report.section("Memory and time (estimates)")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    room, name = (available_memory(), gpu.name) if gpu else (T4_BYTES - CUDA_BYTES, "a 16 GB T4")
    rate = measured_rate(setup) if gpu else T4_OPERATIONS
    if data.vision_cache:  # the vision tower does not run in training
        train, valid = replace(train, patches=0), valid and replace(valid, patches=0)
    setup, size = fit_batch(setup, recipe, train, room, rate)
    if recipe.auto_batch:
        batches, how = recipe.rows_per_process() // size, "with" if setup.checkpointing else "without"
        split = f"{batches * size} rows is {batches} x {size}"
        print(f"auto_batch on {name}: a step of {split}, {how} gradient checkpointing")
    peaks = {"training": training_peak(setup, train.batch(size))}
    if valid and recipe.eval_strategy != "no":
        peaks["validation"] = validation_peak(setup, valid.batch(recipe.per_device_eval_batch_size))
    print("constant, GiB: " + ", ".join(f"{term} {held / GIB:.2f}" for term, held in resident_terms(setup).items()))
    print("peak with the longest rows, GiB: " + ", ".join(f"{k} {v / GIB:.1f}" for k, v in peaks.items()))
    print(f"{name} has {(room + CUDA_BYTES) / GIB:.1f} GiB; CUDA itself takes about {CUDA_BYTES / GIB:.1f}")
    worst = max(peaks, key=peaks.__getitem__)
    if peaks[worst] > room:
        remedy = "halve per_device_eval_batch_size or " if worst == "validation" else ""
        if worst == "training" and not recipe.auto_batch:
            remedy = "turn auto_batch on, halve per_device_train_batch_size, or "
        (report.blockers if gpu else report.warnings).append(
            f"{worst} peaks at about {peaks[worst] / GIB:.1f} GiB, too much for {name}: {remedy}lower image_size"
        )
    if gpu:
        minutes = training_seconds(setup, recipe, train.batch(size, np.median), len(train.tokens), rate) / 60
        print(f"training takes roughly {minutes:.0f} minutes on this GPU, without validation")
        return
    print("time: unknown without a GPU")
    fields = {"load_in_4bit": setup.load_in_4bit, "fp16": recipe.fp16, "bf16": recipe.bf16}
    if needed := [name for name, is_set in fields.items() if is_set]:
        report.warnings.append(f"this machine has no GPU; training needs one for {preview(needed)}")


def fit_batch(setup: Setup, recipe: RecipeArguments, train: Lengths, room: float, rate: float) -> tuple[Setup, int]:
    """(the setup, the rows at once) with which a GPU of `room` bytes and `rate` operations a second would train."""
    if not recipe.auto_batch:
        return setup, recipe.per_device_train_batch_size
    config = choose_micro_batch(setup, train, recipe, SLACK * room, rate)
    return replace(setup, checkpointing=bool(config["gradient_checkpointing"])), config["per_device_train_batch_size"]


def t4_cost(setup: Setup, recipe: RecipeArguments, data: DataArguments, train: Lengths) -> tuple[float, float]:
    """(hours, peak in GiB) of training on one 16 GB T4, without validation.

    Hours are at the speed of the data sheet, which a T4 does not reach: they compare runs.
    """
    train = replace(train, patches=0) if data.vision_cache else train
    setup, size = fit_batch(setup, recipe, train, T4_BYTES - CUDA_BYTES, T4_OPERATIONS)
    seconds = training_seconds(setup, recipe, train.batch(size, np.median), len(train.tokens), T4_OPERATIONS)
    return seconds / 3600, training_peak(setup, train.batch(size)) / GIB


def training_seconds(setup: Setup, recipe: RecipeArguments, batch: Batch, rows: int, rate: float) -> float:
    """Seconds of training on `rows` rows of median length on this GPU alone."""
    batches = recipe.num_train_epochs * math.ceil(rows / batch.rows)
    if recipe.max_steps > 0:
        batches = recipe.max_steps * recipe.effective_batch_size / batch.rows
    return batches * seconds_a_batch(setup, batch, operations_a_second=rate)
