"""Draw the demo contest in the form of a real one: train.csv, test.csv, sample_submission.csv and pictures.

    python data/make_demo.py                          # data/demo
    python data/make_demo.py --train_rows 2000 --output_dir data/bigger

Questions are in Korean and English. test_answers.csv has the answers of the test rows, for scoring only.
"""

import argparse
import csv
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from anywhere, uninstalled

from vqa.core.cli import make_parser  # noqa: E402
from vqa.core.io import atomic_write  # noqa: E402
from vqa.data.rows import LETTERS  # noqa: E402
from vqa.data.synthetic import CONTEST, draw_row  # noqa: E402

HEADER = ["id", "path", "question", "a", "b", "c", "d"]


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    train, train_answers = draw_rows("train", args.train_rows, folder, args.seed)
    test, test_answers = draw_rows("test", args.test_rows, folder, args.seed)
    write_csv(folder / "train.csv", HEADER + ["answer"], [row + [letter] for row, letter in zip(train, train_answers)])
    write_csv(folder / "test.csv", HEADER, test)
    write_csv(folder / "sample_submission.csv", ["id", "answer"], [[row[0], "a"] for row in test])
    write_csv(folder / "test_answers.csv", ["id", "answer"], [[row[0], x] for row, x in zip(test, test_answers)])
    print(f"{folder}: {len(train)} training and {len(test)} test rows")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--train_rows", type=int, default=600, help="number of training rows (default: 600)")
    parser.add_argument("--test_rows", type=int, default=500, help="number of test rows (default: 500)")
    parser.add_argument("--seed", type=int, default=42, help="seed of all rows (default: 42)")
    parser.add_argument("--output_dir", default="data/demo", help="folder to write (default: data/demo)")
    return parser.parse_args()


def draw_rows(split: str, count: int, folder: Path, seed: int) -> tuple[list[list[str]], list[str]]:
    """(cells of each row, letters of the answers); also writes the pictures."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{number:04d}" for number in range(1, count + 1)]
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(write_row, split=split, folder=folder, seed=seed), names, chunksize=16)
        rows = list(tqdm(drawn, desc=f"drawing {split}", total=count, disable=None))
    return [cells for cells, _ in rows], [letter for _, letter in rows]


def write_row(row_id: str, split: str, folder: Path, seed: int) -> tuple[list[str], str]:
    """(cells of the row, letter of its answer), which depend on seed and id only; also writes the picture."""
    image, row = draw_row(random.Random(f"{seed} {row_id}"), CONTEST)
    image.save(folder / split / f"{row_id}.jpg", quality=88)
    return [row_id, f"{split}/{row_id}.jpg", row["question"], *row["choices"]], LETTERS[row["answer"]]


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
