"""Add paraphrases of the questions to a CSV, as columns question_1, question_2, ...

    python data/paraphrase.py data/train.csv                          # data/train_paraphrased.csv
    python train_fold.py args/fold0.json --train_csv data/train_paraphrased.csv

Training draws one of them, or the question itself, in every epoch. The paraphrases come from a few narrow rules for
Korean and English (vqa/data/paraphrases.py); a question that fits no rule gets none. Read some before you train.
"""

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from anywhere, uninstalled

from vqa.core.cli import add_hidden_alias, make_parser  # noqa: E402
from vqa.core.errors import UserError, run_main  # noqa: E402
from vqa.data.columns import find_columns  # noqa: E402
from vqa.data.paraphrases import paraphrases  # noqa: E402
from vqa.data.table import read_table, write_table  # noqa: E402

EXAMPLES = 5  # printed


def main() -> None:
    args = parse_args()
    source = Path(args.csv)
    output = Path(args.output or source.with_name(f"{source.stem}_paraphrased.csv"))
    table = read_table(source, ())
    columns = find_columns(source, list(table.columns), labels_only=True)
    if columns.paraphrases:
        raise UserError(f"{source}: it already has a column question_1. Delete it, or give the original file.")
    if not columns.question:
        raise UserError(
            f"{source}: no column for the question (header: {', '.join(table.columns)}). Rename it to question."
        )
    most = args.num_paraphrases
    found = [paraphrases(text)[:most] for text in tqdm(table[columns.question], desc="paraphrasing", leave=False)]
    for number in range(most):
        column = [texts[number] if number < len(texts) else "" for texts in found]
        table.insert(table.columns.get_loc(columns.question) + 1 + number, f"question_{number + 1}", column)
    write_table(output, table)
    examples = [[question, *texts] for question, texts in zip(table[columns.question], found) if texts]
    for texts in examples[:EXAMPLES]:
        print("\n    ".join(texts))
    print(f"{output}: {len(examples)} of {len(table)} questions have paraphrases, {sum(map(len, found))} in total")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("csv", help="a CSV with a column `question`, such as data/train.csv")
    parser.add_argument("--num_paraphrases", type=int, default=3, help="at most this many per question (default: 3)")
    parser.add_argument("--output", help="output file (default: NAME_paraphrased.csv beside the CSV)")
    add_hidden_alias(parser, "--most", "--num_paraphrases")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
