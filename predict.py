"""Predict a CSV with trained folds: one file of choice probabilities per fold, in outputs/.

    python predict.py checkpoints/fold0 checkpoints/fold1 checkpoints/fold2
    python predict.py checkpoints/fold? --num_permutations 4 --scales 0.9 1.0 1.1          # test-time augmentation
    python predict.py checkpoints/fold? --num_permutations 4 --scales 0.9 1.0 1.1 --oof    # which views help?
    python predict.py --base args/fold0.json             # the untrained base model, as a baseline
    python predict.py --base args/fold0.json --oof       # its out-of-fold file, to make it a member of an ensemble
    python predict.py checkpoints/fold? --oof --image_sizes 384 512 768 1024       # which image size to train with?
    python predict.py checkpoints/fold? --crops --gate 0.5       # a second, closer look where the plain view is unsure
    python predict.py checkpoints/7b/fold? --cascade checkpoints/fold? --oof       # send unsure rows to a 7B?
    python predict.py checkpoints/7b/fold? --cascade checkpoints/fold? --cascade_share 0.3
    accelerate launch predict.py checkpoints/fold?       # on several GPUs

Each fold predicts with the prompt, image size and base model that it was trained with. Test-time augmentation (TTA)
averages the plain view with one view for each further permutation of the choices, paraphrase of the question and scale
of the image, a mirrored view and one with enlarged parts of the image. The plain view alone is written to plain/.

--oof predicts each fold's validation rows and prints what each view gains: accuracy with its 95 % interval (low,
high), log-loss, the p-value of McNemar's test against the line above, and the flags to use. ensemble.py tunes on these
files if a prediction was made in the same views. The base model was trained on no row, so its out-of-fold rows are all
rows of the training CSV.

Several --image_sizes with --oof print the accuracy at each size, what training at it takes on a T4, and the size where
the gain ends. One size is used instead of training's, for --oof and for prediction.

--cascade FOLDS predicts only the rows of which those folds, of a smaller model, are unsure. The files in cascade/ have
all rows. With --oof it predicts nothing: it prints what several shares of rows gain, from the files of training.

An interrupted run continues with the view at which it stopped. A finished file is not predicted again.
"""

import argparse
from functools import partial

import torch
from accelerate import PartialState

from vqa.config.arguments import reader_options
from vqa.core.cli import add_hidden_alias, make_parser, non_default_args
from vqa.core.compat import string_to_bool
from vqa.core.distributed import check_launcher, run_on_main_and_broadcast
from vqa.core.errors import UserError, run_main
from vqa.core.workers import check_workers
from vqa.data.rows import Row
from vqa.evaluation.cascade import Cascade
from vqa.evaluation.labels import Labels
from vqa.evaluation.oof import WEIGHTS
from vqa.inference.cascade import predict_cascade, report_cascade
from vqa.inference.checkpoints import (
    DTYPES,
    Checkpoint,
    base_checkpoint,
    check_base_weights,
    check_same_settings,
    check_score_head,
    fold_checkpoint,
)
from vqa.inference.jobs import Job, make_jobs, read_oof_rows, read_test_rows, unfinished_jobs, write_outputs
from vqa.inference.predictor import Predictor
from vqa.inference.tta import PERMUTATION_SETS, View, ViewPredictions, make_views
from vqa.inference.tta_report import write_tta_report
from vqa.training.image_sizes import compare_image_sizes

RENAMED = {"num_permutations": "orders", "permutation_set": "order_set", "num_paraphrases": "wordings"}


def main() -> None:
    args, cli_args = parse_args()
    start_processes()
    cascade = Cascade(args.cascade_share, args.cascade_weight)
    if args.cascade and args.oof:  # needs no model
        report = partial(report_cascade, args.cascade, args.folds, args.weights, cascade, args.output_dir)
        return run_on_main_and_broadcast(report)
    checkpoints, base_fingerprint = run_on_main_and_broadcast(lambda: load_checkpoints(args))
    csv, folds = run_on_main_and_broadcast(lambda: read_rows(args, checkpoints))
    predictor = Predictor(checkpoints[0], args.batch_size, args.workers)
    if len(args.image_sizes) > 1:
        sizes = args.image_sizes, csv, base_fingerprint, args.output_dir
        return compare_image_sizes(predictor, checkpoints, folds, *sizes)
    if args.cascade:
        rest = cascade, folds[0], csv, base_fingerprint, args.output_dir, cli_args
        return predict_cascade(predictor, checkpoints, args.cascade, *rest)
    views = [views_of_rows(args, predictor, rows) for rows in folds]
    views = views if args.oof else views * len(checkpoints)
    jobs = make_jobs(checkpoints, views, base_fingerprint, csv, args.oof, args.gate, args.output_dir)
    results = predict_jobs(predictor, jobs, args, cli_args)
    if args.oof and PartialState().is_main_process:
        labels, ids = Labels(csv, **reader_options(checkpoints[0].data)), [row["id"] for rows in folds for row in rows]
        write_tta_report(jobs[0].path.parent, labels, ids, results)


def parse_args() -> tuple[argparse.Namespace, dict]:
    """(the arguments, those that differ from their defaults, for the experiment log)."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folds", nargs="*", help="folders that train_fold.py wrote")
    add("--base", metavar="ARGS.json", help="predict with the untrained base model of an args file")
    add("--args", metavar="ARGS.json", help="settings of adapters that were trained elsewhere: model, image_size, ...")
    add("--csv", help="rows to predict (default: the test_csv that the folds were trained with)")
    add("--image_root", help="folder that `path` is relative to (default: as in training)")
    add("--weights", choices=("best", *WEIGHTS), default="best", help="weights of each fold (default: best)")
    add("--model", help="folder of the base model, if it has moved since training")
    add("--dtype", choices=DTYPES, help="dtype of the base model (default: as in training)")
    add("--scales", type=float, nargs="+", default=[1.0], help="image scales (default: 1.0)")
    add(
        "--image_sizes",
        type=int,
        nargs="+",
        default=[],
        metavar="PIXELS",
        help="predict at this image_size instead of training's; several, with --oof: compare them and recommend one",
    )
    add("--num_permutations", type=int, default=1, metavar="N", help="permutations of the choices (default: 1)")
    add(
        "--permutation_set",
        choices=PERMUTATION_SETS,
        default="cyclic",
        help="cyclic: rotations; latin: Williams' design, in which the neighbours change too (default: cyclic)",
    )
    add(
        "--num_paraphrases",
        type=int,
        default=1,
        metavar="N",
        help="paraphrases of the question, itself included, from the CSV's columns question_1, ..., which "
        "data/paraphrase.py can write (default: 1)",
    )
    add("--flip", action="store_true", help="add a mirrored view (text in images too: check it with --oof)")
    add(
        "--crops",
        action="store_true",
        help="add a view that shows each image a second time, in 2 x 2 enlarged parts, where image_size shrinks it; "
        "five times the image tokens, so use it with --gate",
    )
    add(
        "--gate",
        type=float,
        metavar="MARGIN",
        help="use further views only for rows whose two likeliest letters are less than this apart in the plain "
        "view; --oof suggests a value",
    )
    add(
        "--cascade",
        nargs="+",
        metavar="FOLD",
        help="folds of a first, smaller model, predicted before: predict only the rows of which it is unsure, to "
        "cascade/; with --oof, compare shares of rows on out-of-fold rows",
    )
    add(
        "--cascade_share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of the rows to predict: those whose two likeliest letters are closest (default: 0.3)",
    )
    add(
        "--cascade_weight",
        type=float,
        default=1.0,
        metavar="WEIGHT",
        help="weight of these folds in the rows that they predict; the first model has the rest (default: 1)",
    )
    add("--oof", action="store_true", help="predict each fold's validation rows, to oof/, and report each view's gain")
    add("--batch_size", type=int, metavar="N", help="rows that a GPU scores at once (default: as in validation)")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add(
        "--check_generation",
        type=int,
        metavar="N",
        default=32,
        help="compare the answers to N rows with what transformers' `generate` writes; 0: none (default: 32)",
    )
    add(
        "--skip_bad_images",
        action="store_true",
        help="answer rows with an unreadable image from their text alone, and mark them in the file",
    )
    add("--vision_cache", type=string_to_bool, help="store the vision features (default: as in training)")
    add("--vision_cache_dir", help="folder of the stored vision features (default: as in training)")
    add("--vision_cache_gb", type=float, metavar="GB", help="size limit of that folder (default: as in training)")
    add("--output_dir", help="(default: outputs/ and the fold's path below checkpoints/)")
    for name, old in RENAMED.items():
        add_hidden_alias(parser, f"--{old}", f"--{name}")
    args = parser.parse_args()
    if not args.folds and not args.base:
        raise UserError("no folds given. Name the folders that train_fold.py wrote, such as checkpoints/fold0.")
    if min(args.scales) <= 0 or min(args.num_permutations, args.num_paraphrases) < 1:
        raise UserError("--scales must be above 0; --num_permutations and --num_paraphrases must be at least 1.")
    if min(args.image_sizes, default=28) < 28:
        raise UserError("--image_sizes must be at least 28.")
    if len(args.image_sizes) > 1 and not args.oof:
        raise UserError("--image_sizes: several sizes are compared on out-of-fold rows. Add --oof, or give one size.")
    if len(args.image_sizes) > 1 and has_more_views(args):
        raise UserError("--image_sizes compares sizes in the plain view. Leave out the flags of other views.")
    if args.cascade:
        shows_more = args.image_sizes or has_more_views(args) or args.gate is not None
        if args.base or args.args or shows_more or not 0 < args.cascade_share <= 1 or not 0 < args.cascade_weight <= 1:
            raise UserError(
                "--cascade takes folds in the plain view, at their own image size, and a share and a weight from 0 to "
                "1. Leave out other views, --gate, --image_sizes, --base and --args."
            )
    check_workers(args.workers, "--workers")
    if args.oof and args.base and args.folds:
        raise UserError("--oof predicts all training rows with the base model. Predict the folds in another command.")
    return args, non_default_args(parser, args)


def has_more_views(args: argparse.Namespace) -> bool:
    """Whether flags ask for views besides the plain one."""
    counts = args.num_permutations, args.num_paraphrases
    return args.flip or args.crops or max(counts) > 1 or set(args.scales) != {1.0}


def start_processes() -> None:
    """Connect the processes of `accelerate launch`, if it started several."""
    check_launcher()
    state = PartialState(cpu=not torch.cuda.is_available())
    if torch.cuda.device_count() > state.num_processes == 1:
        print(f"using one of {torch.cuda.device_count()} GPUs; `accelerate launch predict.py ...` uses all of them")


def load_checkpoints(args: argparse.Namespace) -> tuple[list[Checkpoint], str]:
    """(the checkpoints to predict with, the fingerprint of their common base model)."""
    checkpoints = [base_checkpoint(args.base, args.model, args.dtype)] if args.base else []
    checkpoints += [fold_checkpoint(folder, args.weights, args.model, args.dtype, args.args) for folder in args.folds]
    for item in checkpoints:
        check_score_head(item)
    check_same_settings(checkpoints, ("train_csv" if args.oof else "test_csv", "image_root"))
    if len(args.image_sizes) == 1:
        checkpoints = [item.at_image_size(args.image_sizes[0]) for item in checkpoints]
    for name in ("vision_cache", "vision_cache_dir", "vision_cache_gb"):
        if getattr(args, name) is not None:
            setattr(checkpoints[0].data, name, getattr(args, name))
    return checkpoints, check_base_weights(checkpoints)


def read_rows(args: argparse.Namespace, checkpoints: list[Checkpoint]) -> tuple[str, list[list[Row]]]:
    """(the CSV, its rows): with --oof a list for each checkpoint, else one list for all of them."""
    data = checkpoints[0].data
    csv = args.csv or (data.train_csv if args.oof else data.test_csv)
    source, reader = (csv, args.image_root or data.image_root, args.skip_bad_images), reader_options(data)
    if args.oof:
        return csv, read_oof_rows(*source, checkpoints, reader)
    return csv, [read_test_rows(*source, reader)]


def views_of_rows(args: argparse.Namespace, predictor: Predictor, rows: list[Row]) -> list[View]:
    """The views of `rows` that the flags ask for, the plain one first."""
    permutations = 1 if predictor.is_suffix else args.num_permutations
    if permutations < args.num_permutations:
        PartialState().print("score suffix does not depend on the choices' order: --num_permutations adds no view")
    options = predictor.collate, args.scales, permutations, args.permutation_set, args.num_paraphrases
    return make_views(rows, *options, args.flip, args.crops)


def predict_jobs(
    predictor: Predictor, jobs: list[Job], args: argparse.Namespace, cli_args: dict
) -> list[ViewPredictions]:
    """Predict the jobs that are not finished, and write their files."""
    unfinished = set(run_on_main_and_broadcast(lambda: [job.path for job in unfinished_jobs(jobs)]))
    checked = 0 if args.oof or predictor.is_suffix else args.check_generation
    results = []
    for job in (job for job in jobs if job.path in unfinished):
        predictions = predictor.predict(job)
        results.append(predictions)
        if PartialState().is_main_process:
            write_outputs(job, predictions, predictor.compare_with_generate(job, predictions, checked), cli_args)
    return results


if __name__ == "__main__":
    run_main(main)
    PartialState().destroy_process_group()  # left open, it can abort a process that has finished
