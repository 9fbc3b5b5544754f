"""Check the contest's data and write the folds file that training reads.

    python make_folds.py args/fold0.json                          # three folds of that file's train_csv
    python make_folds.py args/fold0.json --folds 5 --overwrite    # replace them by five

Writes `id,fold`: stratified by answer, byte-identical images in one fold. A folds file that fits the data is kept,
since models that were trained on it need it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from vqa.config.args_file import build_dataclass, read_args_file
from vqa.config.arguments import DataArguments, folds_file, reader_options
from vqa.core.cli import add_hidden_alias, make_parser
from vqa.core.errors import run_main
from vqa.data.folds import assign_folds, read_folds, write_folds
from vqa.data.images import bad_images_warning, check_images, find_bad_images
from vqa.data.rows import LETTERS, read_contest
from vqa.data.splits import image_groups


def main() -> None:
    args = parse_args()
    data = build_dataclass(DataArguments, read_args_file(args.args_file), args.args_file)
    contest = read_contest(data.train_csv, data.image_root, with_answer=True, **reader_options(data))
    print(contest.summary())
    rows = contest.rows
    check_images(rows, data.train_csv)
    if Path(data.test_csv).is_file():
        test = read_contest(data.test_csv, data.image_root, **reader_options(data))
        print(test.summary())
        if broken := find_bad_images(test.rows, data.test_csv):
            print(f"warning: {bad_images_warning(broken, data.test_csv)}")
    path, ids, answers = folds_file(data), [row["id"] for row in rows], [row["answer"] for row in rows]
    if kept := path.is_file() and not args.overwrite:
        folds = read_folds(path, ids, data.train_csv)
    else:
        folds = assign_folds(answers, image_groups(rows, args.near_duplicates), args.folds, args.seed)
        write_folds(path, ids, folds)
    letters = pd.Series([LETTERS[answer] for answer in answers], name="answer")
    print(pd.crosstab(pd.Series(folds, name="fold"), letters, margins=True).to_string())
    print(f"{path}: {len(folds)} rows in {len(set(folds))} folds" + (" (existing file kept)" if kept else ""))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("args_file", help="an args file; its train_csv, test_csv, image_root and folds_csv are used")
    parser.add_argument("--folds", type=int, default=3, help="number of folds (default: 3)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the shuffle (default: 42)")
    parser.add_argument("--near_duplicates", action="store_true", help="keep near-duplicate images in one fold too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folds file")
    add_hidden_alias(parser, "--again", "--overwrite")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
