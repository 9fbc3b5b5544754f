"""Adapters + a CSV -> one CSV of letter probabilities per fold, in outputs/.

    python predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2
    python predict.py checkpoints/fold? --scales 0.9 1.0 1.1 --orders 4
    python predict.py --base args/fold0.json             # the untrained base model, to compare with
    accelerate launch predict.py checkpoints/fold?       # the rows shared out among several GPUs

Each fold is asked as it was trained: its prompt, image size and base model stand in its args.json. Test-time
augmentation (TTA) averages the plain view with one view per further order of the choices, mapped back to the choices
before averaging, and one per further image scale. What the plain view alone says goes to plain/, to compare with.

A run that was cut off goes on with the view at which it stopped, and a file that is there already, predicted by the
same weights in the same way, is left as it is.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers.hf_argparser import string_to_bool

from collator import Collator
from vqa.errors import UserError, first_few, run
from vqa.features import open_features
from vqa.files import write_json
from vqa.folds import image_groups
from vqa.generation import generated
from vqa.images import check_images, unusable_images
from vqa.model import load_adapter, load_base, load_processor
from vqa.parts import Part, Parts, view_fingerprint
from vqa.predictions import letters, read_card, write_predictions
from vqa.processes import settled_once, shared_out
from vqa.prompt import letter_ids
from vqa.rows import read_rows
from vqa.runs import DTYPES, WEIGHTS, Run, base_run, check_alike, check_base, trained_run
from vqa.scoring import letter_shares, normalised
from vqa.views import Answers, View, by_image, collected, make_views
from vqa.vision import is_tower_untouched

NO_IMAGE = "image unreadable, answered from the text alone"


def main() -> None:
    args = parse_args()
    start_processes()
    runs, base_files = settled_once(lambda: read_runs(args))
    rows = settled_once(lambda: read_test_rows(args, runs[0]))
    model_args, data = runs[0].model, runs[0].data
    processor = load_processor(model_args.model, model_args.trust_remote_code)
    ids, collate = letter_ids(processor), Collator(processor, data.image_size, data.instruction)
    views = make_views(rows, collate, args.scales, args.orders)
    jobs = [make_job(item, views, args.output_dir, item.fingerprint(base_files)) for item in runs]
    jobs = settled_once(lambda: unfinished(jobs))
    if not jobs:
        return
    model = load_base(model_args.model, model_args.load_in_4bit, runs[0].dtype, model_args.trust_remote_code)
    features = open_features(model, processor, data, [])
    for number, job in enumerate(jobs):
        if job.run.adapter:  # one base in memory for all of them; PEFT's names take no dots
            model = load_adapter(model, job.run.adapter, f"run{number}")
        collate.features = features if is_tower_untouched(model) else None
        asked = Asked(model, collate, ids, args.batch_size or job.run.batch_size, args.workers)
        parts, answers = answer(job, asked)
        if PartialState().is_main_process:
            card = {"test_csv": args.csv or data.test_csv} | looked_at(job, parts, answers, asked, args)
            write_job(job, answers, card)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="*", help="folders that train_fold.py wrote")
    parser.add_argument("--base", metavar="ARGS.json", help="predict with the base model of an args file, untrained")
    parser.add_argument("--csv", help="rows to predict (default: the test_csv that the folds were trained with)")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: as in training)")
    parser.add_argument("--weights", choices=("best", *WEIGHTS), default="best", help="(default: best)")
    parser.add_argument("--model", help="folder of the base model, where it lies elsewhere than in training")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base model (default: as in training)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="image scales (default: 1.0)")
    parser.add_argument("--orders", type=int, default=1, help="orders of the choices, by rotation (default: 1)")
    parser.add_argument("--batch_size", type=int, help="rows a GPU takes at once (default: as in validation)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0)")
    parser.add_argument(
        "--check_generation",
        type=int,
        metavar="ROWS",
        default=32,
        help="hold the answers to so many rows against what transformers' `generate` writes; 0: none (default: 32)",
    )
    parser.add_argument(
        "--skip_bad_images",
        action="store_true",
        help="for a deadline: answer rows whose image cannot be read from their text alone, and mark them in the file",
    )
    parser.add_argument("--vision_cache", type=string_to_bool, help="(default, as of the next two: as in training)")
    parser.add_argument("--vision_cache_dir", help="folder of the stored vision features")
    parser.add_argument("--vision_cache_gb", type=float, help="bound of that folder, in GB")
    parser.add_argument("--output_dir", help="(default: outputs/, and the fold's own place below checkpoints/)")
    args = parser.parse_args()
    if not args.folds and not args.base:
        raise UserError("no folds given; name the folders that train_fold.py wrote, such as checkpoints/fold0")
    if min(args.scales) <= 0 or args.orders < 1:
        raise UserError("--scales have to be above 0 and --orders at least 1")
    return args


def start_processes() -> None:
    """Let the processes of `accelerate launch` find each other; alone, there is one."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("predict.py holds the whole model on each GPU; launch it with a config without FSDP")
    state = PartialState(cpu=not torch.cuda.is_available())
    if torch.cuda.device_count() > state.num_processes == 1:
        print(f"one of {torch.cuda.device_count()} GPUs is used; `accelerate launch predict.py ...` uses all")


def read_runs(args: argparse.Namespace) -> tuple[list[Run], str]:
    """(the weights to predict with, the fingerprint of the base model that all of them go with)."""
    runs = [base_run(args.base, args.model, args.dtype)] if args.base else []
    runs += [trained_run(folder, args.weights, args.model, args.dtype) for folder in args.folds]
    check_alike(runs, ("test_csv", "image_root"))
    for name in ("vision_cache", "vision_cache_dir", "vision_cache_gb"):
        if getattr(args, name) is not None:
            setattr(runs[0].data, name, getattr(args, name))
    return runs, check_base(runs)


def read_test_rows(args: argparse.Namespace, first: Run) -> list[dict]:
    """The rows to predict, each with the `hash` of its image's bytes."""
    csv = args.csv or first.data.test_csv
    return with_images(read_rows(csv, args.image_root or first.data.image_root).to_list(), csv, args.skip_bad_images)


def with_images(rows: list[dict], csv: str, skip_bad: bool) -> list[dict]:
    """`rows` with the `hash` of their image's bytes. Bad images are refused, or left out and noted with their rows."""
    if skip_bad:
        bad = unusable_images(rows, csv)
        rows = [{**row, "image": None, "note": NO_IMAGE} if row["image"] in bad else row for row in rows]
    else:
        check_images(rows, csv)
    paths = [row["image"] for row in rows if row["image"]]
    hashes = dict(zip(paths, image_groups(paths)))
    return [{**row, "hash": hashes.get(row["image"])} for row in rows]


@dataclass(frozen=True)
class Job:
    """A run, the views of the rows that it is to answer, the file that comes of it, and what tells it from others."""

    run: Run
    views: list[View]
    path: Path
    model: str
    key: str


def make_job(item: Run, views: list[View], output_dir: str | None, model: str) -> Job:
    views = views if item.adapter else views[:1]  # the base is there to compare with
    path = Path(output_dir or item.output_dir, f"{item.name}.csv" if item.adapter else "base/base.csv")
    return Job(item, views, path, model, view_fingerprint(model, [row for v in views for row in v.changed_rows()]))


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs whose file is not there as they would write it."""
    places = [str(job.path) for job in jobs]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise UserError(f"two folders would both write {first_few(twice)}; predict them in two commands")
    left = [job for job in jobs if not job.path.is_file() or read_card(job.path).get("key") != job.key]
    for job in jobs:
        if job not in left:
            print(f"{job.path} is finished; nothing to predict")
    return left


@dataclass(frozen=True)
class Asked:
    """The model that is asked, and how its batches are made."""

    model: torch.nn.Module
    collate: Collator
    letter_ids: list[int]
    batch_size: int
    workers: int

    def shares(self, views: list[View], label: str) -> list[np.ndarray]:
        """Shares (changed, letters) of the rows that each of `views` changes; all show the same images.

        The one place where a model is asked. The processes share the rows out.
        """
        if self.collate.features:
            rows = {row["image"]: row for view in views for row in view.changed_rows() if row["image"]}
            self.collate.features.add(self.model, list(rows.values()), PartialState().is_main_process)

        def score(view: View) -> Callable[[list[dict]], np.ndarray]:
            told = f"{label}, {view.name}" if PartialState().is_main_process else None
            return lambda rows: letter_shares(
                self.model, rows, self.collate, self.letter_ids, self.batch_size, told, self.workers
            )

        return [shared_out(view.changed_rows(), score(view)) for view in views]


def answer(job: Job, asked: Asked) -> tuple[list[Part], Answers]:
    """What the job's weights say of its rows in each view; what a run that was cut off has kept is not asked again."""
    parts = []
    for views in by_image(job.views):
        parts += answer_views(Parts(job.path, job.model), views, asked, job.run.name)
    return parts, collected(job.views, [normalised(part.shares) for part in parts])


def answer_views(kept: Parts, views: list[View], asked: Asked, label: str) -> list[Part]:
    """A part for each of `views`, which show the same images: as it was kept, or asked for now and kept."""
    parts = settled_once(lambda: [kept.read(view.changed_rows()) for view in views])
    missing = [view for view, part in zip(views, parts) if part is None]
    start = time.time()
    shares = iter(asked.shares(missing, label) if missing else [])
    seconds = (time.time() - start) / max(1, len(missing))
    for i, (view, part) in enumerate(zip(views, parts)):
        if part is None:
            parts[i] = Part(next(shares), seconds)
            if PartialState().is_main_process:
                kept.write(view.changed_rows(), parts[i])
    return parts


def looked_at(job: Job, parts: list[Part], answers: Answers, asked: Asked, args: argparse.Namespace) -> dict:
    """What the card notes of the answers: seconds, mass on the letters, rows without an image, `generate`."""
    rows, found = job.views[0].rows, {"seconds": round(sum(part.seconds for part in parts), 1)}
    found["letter_mass"] = float(parts[0].shares.sum(1).mean())
    found["without_image"] = [row["id"] for row in rows if not row["image"]]
    drawn = [i for i, row in enumerate(rows) if row["image"]]
    drawn = np.random.default_rng(0).permutation(drawn)[: args.check_generation]
    if len(drawn):
        pixels = Collator(asked.collate.processor, asked.collate.image_size, asked.collate.instruction)
        texts = generated(asked.model, [rows[i] for i in drawn], pixels, asked.batch_size)
        agreeing = sum(text == letter for text, letter in zip(texts, letters(answers.probabilities[0][drawn])))
        found["generate"] = {"rows": len(drawn), "agreeing": agreeing}
    return found


def write_job(job: Job, answers: Answers, card: dict) -> None:
    """The mean of the views and, in plain/, what the plain view says where there are more; beside each a JSON card."""
    rows, path, alone = job.views[0].rows, job.path, job.path.parent / "plain" / job.path.name
    item = job.run
    card |= {"adapter": item.adapter and str(item.adapter), "weights": item.weights, "validation": item.validation}
    for old in (alone, alone.with_suffix(".json"), path.with_suffix(".json")):  # of an earlier run
        old.unlink(missing_ok=True)
    if len(job.views) > 1:
        write_predictions(alone, rows, answers.probabilities[0])
        write_json(alone.with_suffix(".json"), card | {"views": answers.names[:1]})
    write_predictions(path, rows, answers.mean())
    write_json(path.with_suffix(".json"), card | {"views": answers.names, "key": job.key})  # says that all is there
    Parts(path, job.model).remove()
    print(f"{path}: {len(rows)} rows, {item.weights} weights, {len(job.views)} views, {card['seconds']} s")
    print(f"  {card['letter_mass']:.2%} of the probability is on the letters offered", end="")
    if generate := card.get("generate"):
        print(f"; `generate` writes the same letter for {generate['agreeing']} of {generate['rows']} rows", end="")
    print()
    if blind := card["without_image"]:
        print(f"  {len(blind)} rows were answered without their image, which cannot be read: {first_few(blind)}")


if __name__ == "__main__":
    run(main)
    PartialState().destroy_process_group()  # left open, it may abort a process that has ended well
