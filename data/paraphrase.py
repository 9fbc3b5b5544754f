"""Write a CSV anew with other wordings of its questions, as columns question_1, question_2, ...

    python data/paraphrase.py data/train.csv                          # data/train_paraphrased.csv
    python train_fold.py args/fold0.json --train_csv data/train_paraphrased.csv

Training asks each question in one of its wordings, drawn anew every epoch. They are made by a few narrow rules for
Korean and English (vqa/paraphrases.py); a question that no rule fits stays alone. Look at some before training on
them.
"""

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from anywhere, uninstalled

from vqa.core.errors import UserError, run_main  # noqa: E402
from vqa.core.io import atomic_write  # noqa: E402
from vqa.data.paraphrases import paraphrases  # noqa: E402
from vqa.data.table import numbered_columns, read_table  # noqa: E402

SHOWN = 5


def main() -> None:
    args = parse_args()
    source = Path(args.csv)
    output = Path(args.output or source.with_name(f"{source.stem}_paraphrased.csv"))
    table = read_table(source, ("question",))
    if numbered_columns(table, "question_"):
        raise UserError(f"{source}: it has question_1 already; give the file without, or drop those columns")
    wordings = [paraphrases(text)[: args.most] for text in tqdm(table["question"], desc="rewording", leave=False)]
    for number in range(args.most):
        added = [words[number] if number < len(words) else "" for words in wordings]
        table.insert(table.columns.get_loc("question") + 1 + number, f"question_{number + 1}", added)
    with atomic_write(output) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    tell(dict(zip(table["question"], wordings)))
    reworded = sum(map(bool, wordings))
    print(f"{output}: {reworded} of {len(table)} questions have other wordings, {sum(map(len, wordings))} in all")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="a CSV with a column `question`, such as data/train.csv")
    parser.add_argument("--most", type=int, default=3, help="wordings a question, at most (default: 3)")
    parser.add_argument("--output", help="(default: beside it, as NAME_paraphrased.csv)")
    return parser.parse_args()


def tell(wordings: dict[str, list[str]]) -> None:
    """Show some questions with their wordings."""
    for question in [question for question, words in wordings.items() if words][:SHOWN]:
        print("\n    ".join([question, *wordings[question]]))


if __name__ == "__main__":
    run_main(main)
