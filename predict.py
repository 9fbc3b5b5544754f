"""Adapters + a CSV -> one CSV of letter probabilities per fold, in outputs/.

    python predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2
    python predict.py checkpoints/fold? --scales 0.9 1.0 1.1 --num_permutations 4
    python predict.py checkpoints/fold? --scales 0.9 1.0 1.1 --num_permutations 4 --oof    # which of these views pay?
    python predict.py --base args/fold0.json             # the untrained base model, to compare with
    accelerate launch predict.py checkpoints/fold?       # the rows shared out among several GPUs

Each fold is asked as it was trained: its prompt, image size and base model stand in its args.json. Test-time
augmentation (TTA) averages the plain view with one view per further order of the choices, mapped back to the choices
before averaging, one per further wording of the question, and one per further image scale. What the plain view alone
says goes to plain/, to compare with.

`--oof` predicts each fold's own validation rows in the same views, and says what each view is worth, with which gate,
and which to take; ensemble.py tunes on those files where a prediction was made in the same views.

A run that was cut off goes on with the view at which it stopped, and a file that is there already, predicted by the
same weights in the same way, is left as it is.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from vqa.core.cli import non_default_args
from vqa.core.compat import string_to_bool
from vqa.core.distributed import distributed_map, run_on_main_and_broadcast
from vqa.core.errors import UserError, preview, run_main
from vqa.core.hashing import hash_files
from vqa.core.io import atomic_write, write_json
from vqa.data.collator import Collator
from vqa.data.images import check_images, find_bad_images
from vqa.data.predictions import letters, read_card, read_predictions, write_predictions
from vqa.data.prompt import LETTERS, letter_ids
from vqa.data.rows import read_rows
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import accuracy_and_log_loss, score_with_interval
from vqa.evaluation.oof import WEIGHTS
from vqa.inference.checkpoints import DTYPES, Checkpoint, base_checkpoint, check_alike, check_base, fold_checkpoint
from vqa.inference.scoring import choice_probs, generate_letters, normalize, permutation_probs
from vqa.inference.tta import (
    PERMUTATION_SETS,
    View,
    ViewPredictions,
    group_by_image,
    make_views,
    rows_with_permutations,
    stack_views,
)
from vqa.inference.tta_report import Trial, pooled
from vqa.inference.view_cache import CachedView, ViewCache, view_fingerprint
from vqa.modeling.feature_store import open_feature_store
from vqa.modeling.loading import load_adapter, load_base, load_processor
from vqa.modeling.vision import is_vision_frozen

NO_IMAGE = "image unreadable, answered from the text alone"


def main() -> None:
    args = parse_args()
    start_processes()
    runs, base_files = run_on_main_and_broadcast(lambda: read_runs(args))
    rows = run_on_main_and_broadcast(
        lambda: read_oof_rows(args, runs) if args.oof else [read_test_rows(args, runs[0])] * len(runs)
    )
    asker = Asker(runs[0], args)
    jobs = make_jobs(args, runs, rows, asker.collate, base_files)
    run_on_main_and_broadcast(lambda: check_places(jobs))
    if not args.oof:
        done = run_on_main_and_broadcast(lambda: [is_finished(job) for job in jobs])
        jobs = [job for job, finished in zip(jobs, done) if not finished]
    seen = []
    for job in jobs:
        seen.append(answer(job, asker, None if args.oof else args.gate))
        if PartialState().is_main_process:
            write_job(job, *seen[-1], asker, args)
    if args.oof and PartialState().is_main_process:
        write_report(jobs, seen, args.csv or runs[0].data.train_csv)


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
    parser.add_argument("--num_permutations", type=int, default=1, help="orders of the choices (default: 1)")
    parser.add_argument(
        "--permutation_set",
        choices=PERMUTATION_SETS,
        default="cyclic",
        help="cyclic: rotations; latin: Williams' design, in which neighbours change too (default: cyclic)",
    )
    parser.add_argument(
        "--num_paraphrases",
        type=int,
        default=1,
        help="wordings of the question, where the CSV has columns question_1, ...; data/paraphrase.py makes some "
        "(default: 1)",
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="a view with images mirrored, text and left and right too: see first what --oof says of it",
    )
    parser.add_argument(
        "--gate",
        type=float,
        metavar="MARGIN",
        help="show further views only of rows whose first and second letter are less than this apart in the plain "
        "view; --oof finds it",
    )
    parser.add_argument(
        "--oof",
        action="store_true",
        help="predict each fold's validation rows instead, to oof/, and report what each view is worth",
    )
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
    if min(args.scales) <= 0 or min(args.num_permutations, args.num_paraphrases) < 1:
        raise UserError("--scales have to be above 0, --num_permutations and --num_paraphrases at least 1")
    args.differing = non_default_args(parser, args)
    if args.oof and args.base:
        raise UserError("--oof is for folds: the base model was validated on nothing; leave --base out")
    return args


def start_processes() -> None:
    """Let the processes of `accelerate launch` find each other; alone, there is one."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("predict.py holds the whole model on each GPU; launch it with a config without FSDP")
    state = PartialState(cpu=not torch.cuda.is_available())
    if torch.cuda.device_count() > state.num_processes == 1:
        print(f"one of {torch.cuda.device_count()} GPUs is used; `accelerate launch predict.py ...` uses all")


def read_runs(args: argparse.Namespace) -> tuple[list[Checkpoint], str]:
    """(the weights to predict with, the fingerprint of the base model that all of them go with)."""
    runs = [base_checkpoint(args.base, args.model, args.dtype)] if args.base else []
    runs += [fold_checkpoint(folder, args.weights, args.model, args.dtype) for folder in args.folds]
    check_alike(runs, ("train_csv" if args.oof else "test_csv", "image_root"))
    for name in ("vision_cache", "vision_cache_dir", "vision_cache_gb"):
        if getattr(args, name) is not None:
            setattr(runs[0].data, name, getattr(args, name))
    return runs, check_base(runs)


def read_test_rows(args: argparse.Namespace, first: Checkpoint) -> list[dict]:
    """The rows to predict, each with the `hash` of its image's bytes."""
    csv = args.csv or first.data.test_csv
    return with_images(read_rows(csv, args.image_root or first.data.image_root), csv, args.skip_bad_images)


def read_oof_rows(args: argparse.Namespace, runs: Sequence[Checkpoint]) -> list[list[dict]]:
    """For each run the rows that its training validated on, with their answers: those of its out-of-fold file."""
    csv, found = args.csv or runs[0].data.train_csv, []
    rows = read_rows(csv, args.image_root or runs[0].data.image_root, with_answer=True)
    place = {row["id"]: row for row in with_images(rows, csv, args.skip_bad_images)}
    for item in runs:
        if not (item.adapter / "oof.csv").is_file():
            raise UserError(f"{item.adapter}: no oof.csv, since it was validated on no rows; --oof is for folds")
        ids, _ = read_predictions(item.adapter / "oof.csv")
        if strange := [row_id for row_id in ids if row_id not in place]:
            raise UserError(f"{csv}: {len(strange)} out-of-fold rows of {item.name} are not in it: {preview(strange)}")
        found.append([place[row_id] for row_id in ids])
    ids = [row["id"] for own in found for row in own]
    if len(set(ids)) < len(ids):
        raise UserError("two of the folds were validated on the same rows; predict the folds of one model at a time")
    return found


def with_images(rows: list[dict], csv: str, skip_bad: bool) -> list[dict]:
    """`rows` with the `hash` of their image's bytes. Bad images are refused, or left out and noted with their rows."""
    if skip_bad:
        bad = find_bad_images(rows, csv)
        rows = [{**row, "image": None, "note": NO_IMAGE} if row["image"] in bad else row for row in rows]
    else:
        check_images(
            rows, csv, "mend or replace the files, or answer their rows from the text alone: --skip_bad_images"
        )
    paths = [row["image"] for row in rows if row["image"]]
    hashes = dict(zip(paths, hash_files(paths)))
    return [{**row, "image_hash": hashes.get(row["image"])} for row in rows]


@dataclass(frozen=True)
class Job:
    """A run, the views of the rows that it is to answer, the file that comes of it, and what tells it from others."""

    run: Checkpoint
    views: list[View]
    path: Path
    model: str
    key: str

    @property
    def rows(self) -> list[dict]:
        return self.views[0].rows


def make_jobs(
    args: argparse.Namespace,
    runs: Sequence[Checkpoint],
    rows: Sequence[list[dict]],
    collate: Collator,
    base_files: str,
) -> list[Job]:
    """A job for each run, of its `rows`."""
    jobs, made = [], {}
    for item, own in zip(runs, rows):
        if id(own) not in made:
            made[id(own)] = make_views(
                own, collate, args.scales, args.num_permutations, args.permutation_set, args.num_paraphrases, args.flip
            )
        views = made[id(own)] if item.adapter else made[id(own)][:1]  # the base is there to compare with
        folder = Path(args.output_dir or item.output_dir, *(["oof"] if args.oof else []))
        path, model = folder / (f"{item.name}.csv" if item.adapter else "base/base.csv"), item.fingerprint(base_files)
        shown = [row for view in views for row in view.changed_rows()]
        jobs.append(Job(item, views, path, model, view_fingerprint(f"{model} {args.gate}", shown)))
    return jobs


def check_places(jobs: Sequence[Job]) -> None:
    places = [str(job.path) for job in jobs]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise UserError(f"two folders would both write {preview(twice)}; predict each with an --output_dir of its own")


def is_finished(job: Job) -> bool:
    """Whether the job's file is there as it would be written."""
    if not job.path.is_file() or read_card(job.path).get("key") != job.key:
        return False
    print(f"{job.path} is finished; nothing to predict")
    return True


class Asker:
    """The base model in memory, loaded once something is asked of it, with the adapter of one run at a time on it."""

    def __init__(self, first: Checkpoint, args: argparse.Namespace):
        processor = load_processor(first.model.model, first.model.trust_remote_code)
        self.first, self.batch_size, self.workers = first, args.batch_size or first.batch_size, args.workers
        self.letter_ids = letter_ids(processor)
        self.pixels = Collator(processor, first.data.image_size, first.data.instruction)
        self.collate = Collator(processor, first.data.image_size, first.data.instruction)
        self.model = self.features = None
        self.adapters: list[Path] = []  # in the order in which they were loaded; the last one is active

    def load(self, item: Checkpoint) -> torch.nn.Module:
        """The model with the run's weights."""
        if self.model is None:
            args = self.first.model
            self.model = load_base(args.model, args.load_in_4bit, self.first.dtype, args.trust_remote_code)
            self.features = open_feature_store(self.model, self.pixels.processor, self.first.data, [])
        if item.adapter and self.adapters[-1:] != [item.adapter]:
            self.model = load_adapter(self.model, item.adapter, f"run{len(self.adapters)}")  # PEFT's names take no dot
            self.adapters.append(item.adapter)
        self.collate.features = self.features if is_vision_frozen(self.model) else None
        return self.model

    def shares(self, item: Checkpoint, views: list[View]) -> list[np.ndarray]:
        """Shares (changed, letters) of the rows that each of `views` changes; all show the same images.

        The one place where a model is asked. The processes share the rows out.
        """
        model, first = self.load(item), views[0].rows
        changed = sorted({i for view in views for i in view.changed})
        if self.collate.features:
            shown = [first[i] for i in changed if first[i]["image"]]
            self.collate.features.add(model, shown, PartialState().is_main_process)
        label = f"{item.name}, {' + '.join(view.name for view in views)}" if PartialState().is_main_process else None
        options = self.collate, self.letter_ids, self.batch_size, label, self.workers
        if len(views) == 1:
            return [distributed_map([first[i] for i in changed], lambda rows: choice_probs(model, rows, *options))]

        def score(rows: list[dict]) -> np.ndarray:
            """(rows, views, letters), 0 where a view does not change a row."""
            found = np.zeros((len(rows), len(views), len(LETTERS)))
            for row, own, shares in zip(rows, found, permutation_probs(model, rows, *options)):
                own[row["views"]] = shares
            return found

        found = distributed_map(rows_with_permutations(views, changed), score)
        place = {i: k for k, i in enumerate(changed)}
        return [found[[place[i] for i in view.changed], v] for v, view in enumerate(views)]


def answer(job: Job, asker: Asker, gate: float | None) -> tuple[list[CachedView], ViewPredictions]:
    """What the job's weights say of its rows in each view, which may be kept of a run that was cut off."""
    views, parts = [], []
    groups = group_by_image(job.views) if gate is None else [job.views[:1], *group_by_image(job.views[1:])]
    for together in groups:
        if gate is not None and parts:
            unsure = stack_views(views[:1], [normalize(parts[0].shares)]).unsure(gate)
            together = [view.only(unsure) for view in together]
        views += together
        parts += answer_views(job, together, asker)
    return parts, stack_views(views, [normalize(part.shares) for part in parts])


def answer_views(job: Job, views: list[View], asker: Asker) -> list[CachedView]:
    """A part for each of `views`, which show the same images: as it was kept, or asked for now and kept."""
    kept = ViewCache(job.path, job.model)
    parts = run_on_main_and_broadcast(lambda: [kept.read(view.changed_rows()) for view in views])
    missing = [view for view, part in zip(views, parts) if part is None]
    start = time.time()
    shares = iter(asker.shares(job.run, missing) if missing else [])
    seconds = (time.time() - start) / max(1, len(missing))
    for i, view in enumerate(views):
        if parts[i] is None:
            parts[i] = CachedView(next(shares), seconds)
            if PartialState().is_main_process:
                kept.write(view.changed_rows(), parts[i])
    return parts


def write_job(
    job: Job, parts: list[CachedView], answers: ViewPredictions, asker: Asker, args: argparse.Namespace
) -> None:
    """The mean of the views and, in plain/, what the plain view says where there are more; beside each a JSON card."""
    path, alone = job.path, job.path.parent / "plain" / job.path.name
    card = make_card(job, parts, args) | compare_with_generate(job, answers, asker, args)
    for old in (alone, alone.with_suffix(".json"), path.with_suffix(".json")):  # of an earlier run
        old.unlink(missing_ok=True)
    if len(job.views) > 1:
        write_file(alone, job.rows, answers.probabilities[0], card | {"views": answers.names[:1], "gate": None})
    mean = answers.mean(gate=args.gate)
    write_file(path, job.rows, mean, card | {"key": job.key, "run": log_prediction(job, mean, card["seconds"], args)})
    if not args.oof:  # kept there, they let other sets of these views be tried at no cost
        ViewCache(path, job.model).remove()
    forwards = answers.asked(range(len(job.views)), args.gate).sum(0).mean()
    print(
        f"{path}: {len(job.rows)} rows, {card['weights']} weights, {forwards:.2f} forwards a row, {card['seconds']} s"
    )
    print(f"  {card['letter_mass']:.2%} of the probability is on the letters offered", end="")
    if generate := card.get("generate"):
        print(f"; `generate` writes the same letter for {generate['agreeing']} of {generate['rows']} rows", end="")
    print()
    if blind := card["without_image"]:
        print(f"  {len(blind)} rows were answered without their image, which cannot be read: {preview(blind)}")


def write_file(path: Path, rows: list[dict], probabilities: np.ndarray, card: dict) -> None:
    """A prediction file and, after it, its card; where answers are known, with the scores."""
    write_predictions(path, rows, probabilities)
    if "answer" in rows[0]:
        card = card | {"scores": accuracy_and_log_loss(probabilities, [row["answer"] for row in rows])}
    write_json(path.with_suffix(".json"), card)


def log_prediction(job: Job, probabilities: np.ndarray, seconds: float, args: argparse.Namespace) -> str:
    """Add the prediction to the experiment log, with what its weights score in these views; its id there."""
    run_id, data = job.run.logged
    truth, known = args.csv or job.run.data.train_csv, {}
    if args.oof:
        ids, answers = [row["id"] for row in job.rows], np.array([row["answer"] for row in job.rows])
        scores = score_with_interval(probabilities, answers, Labels(truth).clusters(ids))
        known = {"scores": scores, "truth": truth, "out_of_fold": (ids, probabilities)}
    elif len(job.views) == 1 and job.run.validation:  # training has scored the plain view
        known = {"scores": job.run.validation, "truth": job.run.data.train_csv}
    return log_run("prediction", job.path, args.differing, seconds, data, parents=[run_id], **known)


def make_card(job: Job, parts: list[CachedView], args: argparse.Namespace) -> dict:
    """What stands beside a prediction file: where its weights come from, and how the rows were asked."""
    item = job.run
    csv = {"train_csv": args.csv or item.data.train_csv} if args.oof else {"test_csv": args.csv or item.data.test_csv}
    return csv | {
        "adapter": item.adapter and str(item.adapter),
        "weights": item.weights,
        "validation": item.validation,
        "model": job.model,
        "data": item.logged[1],
        "views": [view.name for view in job.views],
        "gate": args.gate,
        "seconds": round(sum(part.seconds for part in parts), 1),
        "letter_mass": float(parts[0].shares.sum(1).mean()),
        "without_image": [row["id"] for row in job.rows if not row["image"]],
    }


def compare_with_generate(job: Job, answers: ViewPredictions, asker: Asker, args: argparse.Namespace) -> dict:
    """How often transformers' `generate` writes the plain view's letter, on rows drawn by seed."""
    drawn = [i for i, row in enumerate(job.rows) if row["image"]]
    drawn = np.random.default_rng(0).permutation(drawn)[: 0 if args.oof else args.check_generation]
    if not len(drawn):
        return {}
    texts = generate_letters(asker.load(job.run), [job.rows[i] for i in drawn], asker.pixels, asker.batch_size)
    agreeing = sum(text == letter for text, letter in zip(texts, letters(answers.probabilities[0][drawn])))
    return {"generate": {"rows": len(drawn), "agreeing": agreeing}}


def write_report(jobs: list[Job], seen: list[tuple[list[CachedView], ViewPredictions]], csv: str) -> None:
    """What each view is worth on the out-of-fold rows of all folds: printed, and in tta.json and tta.csv."""
    rows, truth = [row for job in jobs for row in job.rows], Labels(csv)
    together, ids = pooled([answers for _, answers in seen]), [row["id"] for row in rows]
    seconds = dict.fromkeys(together.names, 0.0)
    for job, (parts, _) in zip(jobs, seen):
        for view, part in zip(job.views, parts):
            seconds[view.name] += part.seconds
    trial = Trial(together, truth.answers(ids), truth.clusters(ids), np.array(list(seconds.values())))
    report = {
        "rows": len(rows),
        "views": trial.table(),
        "position_bias": trial.position_bias(),
        "recommendation": trial.recommendation(),
    }
    print(f"\neach view added to those before it, on {len(rows)} out-of-fold rows of {csv}:")
    print(pd.DataFrame(report["views"]).to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    print("\nhow often each letter is right, and is chosen:")
    print(pd.DataFrame(report["position_bias"]).to_string(index=False, float_format="{:.3f}".format))
    print(f"\n{report['recommendation']}")
    folder = jobs[0].path.parent
    write_json(folder / "tta.json", report)
    with atomic_write(folder / "tta.csv") as temporary:
        pd.DataFrame(report["views"]).to_csv(temporary, index=False, lineterminator="\n")


if __name__ == "__main__":
    run_main(main)
    PartialState().destroy_process_group()  # left open, it may abort a process that has ended well
