"""Look over a run before it costs a GPU hour: its args, its data and its model's shape, without loading weights.

    python doctor.py args/fold0.json
    python doctor.py args/fold0.json --image_size 512 --per_device_train_batch_size 4

Takes what train_fold.py takes, needs no GPU, and ends with `ready` (exit code 0) or with a numbered list of what to
mend (exit code 1). Warnings do not stand in the way. What cannot even be read is one line, with exit code 2.
"""

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

from vqa.config.arguments import DataArguments, ModelArguments, folds_file
from vqa.config.parser import parse_arguments
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.errors import UserError, pluralize, preview, run_main
from vqa.data.collator import Collator
from vqa.data.folds import read_folds
from vqa.data.images import check_images, oriented_size, target_size
from vqa.data.prompt import LETTERS, letter_ids, shown_answer
from vqa.data.rows import read_rows, rows_with_equal_choices
from vqa.data.splits import images_across_folds, shared_images, split_problems, split_rows
from vqa.modeling.loading import load_processor
from vqa.training.batching import (
    SLACK,
    Lengths,
    choose_micro_batch,
    count_image_tokens,
    count_tokens,
    make_setup,
    memory_room,
    rows_per_step,
)
from vqa.training.dataset import TrainDataset
from vqa.training.memory import (
    CUDA_BYTES,
    GIB,
    T4_BYTES,
    Batch,
    Setup,
    meta_model,
    resident_terms,
    training_peak,
    validation_peak,
)
from vqa.training.preflight import adapter_problems, adapter_targets, label_problems, missing_weights, supervised_texts
from vqa.training.speed import T4_OPERATIONS, measured_rate, seconds_a_batch


def main() -> None:
    model_args, data, recipe, _ = parse_arguments(sys.argv[1:], __doc__, trains=False)
    contest = read_contest(data, recipe.seed)
    processor = load_processor(model_args.model, model_args.trust_remote_code)
    collate = Collator(processor, data.image_size, data.instruction, with_answer=True)
    model = meta_model(model_args, model_dtype(recipe.fp16, recipe.bf16))
    findings = Findings()
    look_at_labels(findings, collate, TrainDataset(contest.train, data.shuffle_choices, recipe.seed))
    look_at_model(findings, model_args, model)
    train, valid = look_at_tokens(collate, contest)
    look_at_rows(findings, contest, data)
    look_at_cost(findings, make_setup(model_args, recipe, model), recipe, data, train, valid)
    findings.conclude()


@dataclass
class Findings:
    """What the sections found: what stands in the way of training, and what only deserves a look."""

    blockers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def conclude(self) -> None:
        """Print both; exit with code 1 if there is anything to mend."""
        if self.warnings:
            heading("Worth a look")
            for warning in self.warnings:
                print(f"- {warning}")
        if not self.blockers:
            print("\nready")
            return
        heading("To mend before training")
        for number, blocker in enumerate(self.blockers, start=1):
            print(f"{number}. {blocker}")
        sys.exit(1)


@dataclass
class Contest:
    """Rows of train_csv with the fold of each (None where the run has no folds), its two halves, and the test rows."""

    rows: list[dict]
    folds: np.ndarray | None
    train: list[dict]
    valid: list[dict]
    test: list[dict]


def read_contest(data: DataArguments, seed: int) -> Contest:
    """Read and check the CSVs, the folds file and every image, as training does."""
    rows = read_rows(data.train_csv, data.image_root, with_answer=True)
    test = read_rows(data.test_csv, data.image_root) if Path(data.test_csv).is_file() else []
    for these, label in ((rows, data.train_csv), (test, data.test_csv)):
        check_images(these, label)
    train, valid = split_rows(rows, data, seed)
    if data.fold is None:
        return Contest(rows, None, train, valid, test)
    folds = read_folds(folds_file(data), [row["id"] for row in rows], data.train_csv)
    return Contest(rows, folds, train, valid, test)


def look_at_labels(findings: Findings, collate: Collator, rows: TrainDataset) -> None:
    heading("Prompt and labels")
    try:
        ids = letter_ids(collate.processor)
    except UserError as error:
        findings.blockers.append(str(error))
        return
    print("the prediction prompt is, token for token, a prefix of the training text")
    print(f"letters, one token each: {', '.join(f'{letter} {number}' for letter, number in zip(LETTERS, ids))}")
    three = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    for row, text in zip(three, supervised_texts(collate, three)):
        right, letter = row["choices"][row["answer"]], LETTERS[shown_answer(row)]
        print(f"{row['id']}: the right choice {right!r} is shown at {letter}; the labels cover {text!r}")
    findings.blockers += label_problems(collate, three)


def look_at_model(findings: Findings, args: ModelArguments, model: PeftModel) -> None:
    heading("Model and adapter")
    trained, total = model.get_nb_trainable_parameters()
    print(f"{args.model}: {total:,} parameters, of which {trained:,} are trained ({trained / total:.2%})")
    print("adapter on " + ", ".join(f"{count} {name}" for name, count in adapter_targets(model).items()))
    problems = adapter_problems(model)
    print("none of it in the vision tower" if not problems else problems[0])
    findings.blockers += problems
    if missing := missing_weights(args.model):
        findings.blockers.append(f"{args.model} lacks {preview(missing)}; copy or download the model again")


def look_at_tokens(collate: Collator, contest: Contest) -> tuple[Lengths, Lengths | None]:
    """Print what the pixel budget makes of the images. (lengths of the training rows, of the validation rows)."""
    heading("Images and tokens")
    patch = collate.processor.image_processor.patch_size
    paths = sorted({row["image"] for row in contest.rows})
    sizes = {path: oriented_size(path) for path in tqdm(paths, desc="reading image sizes", leave=False, disable=None)}
    tokens = count_image_tokens(sizes, collate)
    by_tokens = sorted(paths, key=tokens.get)
    for name, i in (("smallest", 0), ("median", len(paths) // 2), ("largest", -1)):
        size = sizes[by_tokens[i]]
        given, seen = (" x ".join(map(str, s)) for s in (size, target_size(*size, collate.image_size, patch=patch)))
        print(f"{name:8} image {given}, seen as {seen} pixels: {tokens[by_tokens[i]]} tokens")
    larger = sum(width * height > collate.image_size**2 for width, height in sizes.values())
    print(f"{larger} of {len(paths)} images have more pixels than image_size {collate.image_size} lets the model see")
    train, valid = (count_tokens(rows, collate, sizes) if rows else None for rows in (contest.train, contest.valid))
    middle, most = int(np.median(train.tokens)), train.tokens.max()
    print(f"tokens a training row, text and image: median {middle}, longest {most}")
    return train, valid


def look_at_rows(findings: Findings, contest: Contest, data: DataArguments) -> None:
    heading("Rows")
    answers = pd.Series([LETTERS[row["answer"]] for row in contest.rows], name="answer")
    folds = ["-"] * len(answers) if contest.folds is None else contest.folds
    print(pd.crosstab(pd.Series(folds, name="fold"), answers, margins=True).to_string())
    counts = Counter(len(row["choices"]) for row in contest.rows)
    print("choices a row: " + ", ".join(f"{counts[n]} rows offer {n}" for n in sorted(counts)))
    for rows, label in ((contest.rows, data.train_csv), (contest.test, data.test_csv)):
        if equal := rows_with_equal_choices(rows):
            findings.warnings.append(f"{label}: {pluralize(len(equal), 'row')} with two equal choices: {preview(equal)}")
    if pairs := shared_images(contest.test, contest.rows):
        named = preview([f"{a} and {b}" for a, b in pairs])
        findings.warnings.append(f"{pluralize(len(pairs), 'test row')} with the very image of a training row: {named}")
    elif not contest.test:
        findings.warnings.append(f"{data.test_csv}: no such file, so the test rows have not been looked at")
    if contest.folds is None:
        return
    findings.blockers += split_problems(contest.train, contest.valid)
    if across := images_across_folds(contest.rows, contest.folds):
        named = preview([" and ".join(ids[:2]) for ids in across])
        findings.warnings.append(
            f"{pluralize(len(across), 'image')} in more than one fold: {named}; the folds' scores flatter"
        )


def look_at_cost(
    findings: Findings,
    setup: Setup,
    recipe: RecipeArguments,
    data: DataArguments,
    train: Lengths,
    valid: Lengths | None,
) -> None:
    heading("Memory and time (estimates)")
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    room, name = (memory_room(), gpu.name) if gpu else (T4_BYTES - CUDA_BYTES, "a 16 GB T4")
    rate = measured_rate(setup) if gpu else T4_OPERATIONS
    if data.vision_cache:
        train, valid = (part and replace(part, patches=0) for part in (train, valid))
    size = recipe.per_device_train_batch_size
    if recipe.auto_batch:
        rows = size * recipe.gradient_accumulation_steps
        fields = choose_micro_batch(setup, train, rows, SLACK * room, rate, recipe.wants_checkpointing)
        size = fields["per_device_train_batch_size"]
        setup = replace(setup, checkpointing=fields["gradient_checkpointing"])
        how = "with" if setup.checkpointing else "without"
        print(f"auto_batch on {name}: a step of {rows} rows as {rows // size} x {size}, {how} gradient checkpointing")
    peaks = {"training": training_peak(setup, train.batch(size))}
    if valid and recipe.eval_strategy != "no":
        peaks["validation"] = validation_peak(setup, valid.batch(recipe.per_device_eval_batch_size))
    print("held throughout, GiB: " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in resident_terms(setup).items()))
    print("peak with the longest rows, GiB: " + ", ".join(f"{k} {v / GIB:.1f}" for k, v in peaks.items()))
    print(f"{name} has {(room + CUDA_BYTES) / GIB:.1f} GiB, of which CUDA itself takes about {CUDA_BYTES / GIB:.1f}")
    worst = max(peaks, key=peaks.get)
    if peaks[worst] > room:
        remedy = "halve per_device_eval_batch_size or " if worst == "validation" else ""
        if worst == "training" and not recipe.auto_batch:
            remedy = "turn auto_batch on, halve per_device_train_batch_size, or "
        (findings.blockers if gpu else findings.warnings).append(
            f"{worst} peaks at about {peaks[worst] / GIB:.1f} GiB, too much for {name}: {remedy}lower image_size"
        )
    if gpu:
        minutes = training_seconds(setup, recipe, train.batch(size, np.median), len(train.tokens), rate) / 60
        print(f"training takes roughly {minutes:.0f} minutes on this GPU, validation not included")
        return
    print("time: unknown without a GPU")
    fields = {"load_in_4bit": setup.load_in_4bit, "fp16": recipe.fp16, "bf16": recipe.bf16}
    if wanted := [name for name, is_set in fields.items() if is_set]:
        findings.warnings.append(f"there is no GPU here; training will need one for {preview(wanted)}")


def training_seconds(setup: Setup, recipe: RecipeArguments, batch: Batch, rows: int, rate: float) -> float:
    """Seconds of training on `rows` rows of median length on this GPU alone."""
    batches = recipe.num_train_epochs * math.ceil(rows / batch.rows)
    if recipe.max_steps > 0:
        batches = recipe.max_steps * rows_per_step(recipe) / batch.rows
    return batches * seconds_a_batch(setup, batch, training=True, operations_a_second=rate)


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


if __name__ == "__main__":
    run_main(main)
