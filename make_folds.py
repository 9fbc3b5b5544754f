"""Check the contest's data and write the folds file that training reads.

    python make_folds.py args/fold0.json                         # three folds of that file's train_csv
    python make_folds.py args/fold0.json --folds 5 --overwrite       # others in their place

`id,fold`, stratified by answer, byte-identical images in one fold. A folds file that is there and fits is kept: models
trained on it have to go on with it.
"""

import argparse
from pathlib import Path

import pandas as pd

from vqa.config.args_file import build_dataclass, read_args_file
from vqa.config.arguments import DataArguments, folds_file
from vqa.core.errors import pluralize, run_main
from vqa.data.folds import assign_folds, read_folds, write_folds
from vqa.data.images import check_images, find_bad_images, preview_bad_images
from vqa.data.prompt import LETTERS
from vqa.data.rows import read_rows


def main() -> None:
    args = parse_args()
    data = build_dataclass(DataArguments, read_args_file(args.args_file))
    rows = read_rows(data.train_csv, data.image_root, with_answer=True)
    check_images(rows, data.train_csv)
    if Path(data.test_csv).is_file():  # better now than after the training
        warn_of_images(read_rows(data.test_csv, data.image_root), data.test_csv)
    path, ids, answers = folds_file(data), list(rows["id"]), list(rows["answer"])
    if kept := path.is_file() and not args.overwrite:
        folds = read_folds(path, ids, data.train_csv)
    else:
        folds = assign_folds(answers, list(rows["image"]), args.folds, args.seed)
        write_folds(path, ids, folds)
    shown = pd.Series([LETTERS[answer] for answer in answers], name="answer")
    print(pd.crosstab(pd.Series(folds, name="fold"), shown, margins=True).to_string())
    print(f"{path}: {len(folds)} rows in {len(set(folds))} folds" + (", kept as it was" if kept else ""))


def warn_of_images(rows: list[dict], csv: str) -> None:
    """Say which test images cannot be read: there is time to mend them while the folds are trained."""
    if broken := find_bad_images(rows, csv):
        print(
            f"warning: {csv}: {pluralize(len(broken), 'image')} cannot be used: {preview_bad_images(broken)}; fix them "
            "or answer their rows from the text alone by predict.py --skip_bad_images"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("args_file", help="an args file: its train_csv, test_csv, image_root and folds_csv are used")
    parser.add_argument("--folds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the shuffle (default: 42)")
    parser.add_argument("--overwrite", action="store_true", help="make them anew where the file is there already")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
