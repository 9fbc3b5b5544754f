"""Make a page about the out-of-fold results of one model, or of several side by side.

    python analyze.py checkpoints/*/                       # every finished fold; other folders are skipped
    python analyze.py checkpoints/fold* checkpoints/7b/fold*
    python analyze.py checkpoints/demo/*/                  # outputs/demo/analyze/index.html

Each row is scored by the one model that was not trained on it. Folders whose names differ only in the number after
"fold" are the folds of one model. The highlights are also printed here. The figures are written beside the page as PNG
files, and the rows whose label is probably wrong to mislabelled.csv. The page is one file and needs no network.
"""

import argparse
import os

from vqa.core.cli import make_parser
from vqa.core.errors import pluralize, run_main
from vqa.core.io import swap_root
from vqa.data.rows import LETTERS
from vqa.evaluation.labels import Labels
from vqa.reports import analysis
from vqa.reports.groups import TYPE, group_rows
from vqa.reports.page import Page
from vqa.reports.results import find_finished_folds, load_results, training_csv


def main() -> None:
    args = parse_args()
    folders, skipped = find_finished_folds(args.folds)
    train_csv, image_root, reader = training_csv(folders)
    results = load_results(folders, Labels(args.train_csv or train_csv, **reader))
    rows = analysis.read_result_rows(results, args.image_root or image_root, reader)
    groups = group_rows(rows)
    common_folder = os.path.commonpath([folder.parent.absolute() for folder in folders])
    page = Page(args.output_dir or swap_root("outputs", common_folder, below="checkpoints") / "analyze")
    path = page.write(
        "analyze.html",
        sections=analysis.SECTIONS,
        results=results,
        letter_names=LETTERS,
        scores=analysis.scores_section(results, page),  # the highlights are in the order of these calls
        groups=analysis.groups_section(results, groups, page),
        weights=analysis.weights_section(results, page),
        models=analysis.models_section(results, rows, page),
        label_issues=analysis.label_issues_section(results, rows, page),
        letters=analysis.letters_section(results, rows, page),
        calibration=analysis.calibration_section(results, page),
        folds=analysis.folds_section(results, groups[TYPE]),
        errors=analysis.errors_section(results, rows),
        skipped=[str(folder) for folder in skipped],
    )
    print(f"{path}: {pluralize(len(results.ids), 'row')}, {pluralize(len(folders), 'fold')}")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("folds", nargs="+", help="folders that train_fold.py wrote, such as checkpoints/*/")
    parser.add_argument("--train_csv", help="the rows and their answers (default: the one used in training)")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: the one used in training)")
    parser.add_argument("--output_dir", help="folder of the page (default: checkpoints/X/fold0 -> outputs/X/analyze)")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
