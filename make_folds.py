"""Write the folds file that training reads: `id,fold`, stratified by answer, byte-identical images in one fold.

python make_folds.py args/fold0.json                 # three folds of that file's train_csv
python make_folds.py args/fold0.json --folds 5       # any args file of the contest will do
"""

import argparse

import pandas as pd

from vqa.arguments import DataArguments, folds_file, read_args_file, section
from vqa.errors import run
from vqa.folds import assign_folds, write_folds
from vqa.images import check_images
from vqa.prompt import LETTERS
from vqa.rows import read_rows


def main() -> None:
    args = parse_args()
    data = section(DataArguments, read_args_file(args.args_file))
    rows = read_rows(data.train_csv, data.image_root, with_answer=True)
    check_images(rows.to_list(), data.train_csv)
    folds = assign_folds(rows["answer"], rows["image"], args.folds, args.seed)
    write_folds(folds_file(data), rows["id"], folds)
    answers = [LETTERS[answer] for answer in rows["answer"]]
    print(pd.crosstab(pd.Series(folds, name="fold"), pd.Series(answers, name="answer"), margins=True).to_string())
    print(f"{folds_file(data)}: {len(folds)} rows in {args.folds} folds")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("args_file", help="an args file: its train_csv, image_root and folds_csv are used")
    parser.add_argument("--folds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the shuffle (default: 42)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
