"""Draw the bench contest: 20,000 training and 10,000 test rows, large enough to see a difference of one point.

    python benchmarks/bench_contest.py                                        # data/bench
    python benchmarks/bench_contest.py --train_rows 300 --test_rows 200 --output_dir /tmp/bench

It has the files of the demo contest, and kinds.csv with the kind of each question. In training 5 % of the labels are
wrong. In both parts one row in fifty shows the picture of an earlier row, and the test has more of the kinds that need
resolution. Test rows are scored with test_answers.csv alone.
"""

import argparse
import csv
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from anywhere, uninstalled

from bench_scenes import CONTEST, HOME, KINDS, Domain, ask, draw, make_scene  # noqa: E402

from vqa.core.cli import make_parser  # noqa: E402
from vqa.core.io import atomic_write  # noqa: E402
from vqa.data.rows import LETTERS  # noqa: E402

HEADER = ["id", "path", "question", "a", "b", "c", "d"]
DOMAINS = {"home": HOME, "contest": CONTEST}
MIX = {  # how many of a hundred rows have each of KINDS
    "train": (18, 16, 14, 14, 14, 14, 10),
    "test": (24, 20, 10, 16, 10, 10, 10),
}
WRONG_LABELS = 0.05  # of the training rows
REPEATS = 0.02  # rows with the picture of an earlier row; for a quarter of them as a file of its own
FILES = ("train.csv", "test.csv", "sample_submission.csv", "test_answers.csv", "kinds.csv")


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    for name in FILES:  # written last, so that a folder that has them is complete
        (folder / name).unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train = draw_rows("train", args.train_rows, folder, args)
    test = draw_rows("test", args.test_rows, folder, args)
    write_csv(folder / "train.csv", [*HEADER, "answer"], [[*row.cells, LETTERS[row.label]] for row in train])
    write_csv(folder / "test.csv", HEADER, [row.cells for row in test])
    write_csv(folder / "sample_submission.csv", ["id", "answer"], [[row.cells[0], "a"] for row in test])
    write_csv(folder / "test_answers.csv", ["id", "answer"], [[row.cells[0], LETTERS[row.answer]] for row in test])
    write_csv(folder / "kinds.csv", ["id", "kind"], [[row.cells[0], row.kind] for row in [*train, *test]])
    print(f"{folder}: {len(train)} training and {len(test)} test rows")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--train_rows", type=int, default=20000, help="number of training rows (default: 20000)")
    parser.add_argument("--test_rows", type=int, default=10000, help="number of test rows (default: 10000)")
    parser.add_argument(
        "--domain", choices=DOMAINS, default="contest", help="home: what the base model learned (default: contest)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of all rows (default: 42)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw (default: all cores)")
    parser.add_argument("--output_dir", default="data/bench", help="folder to write (default: data/bench)")
    return parser.parse_args()


class DrawnRow:
    """Row `number` of a split. It depends on seed, split and number alone.

    cells: those of HEADER. kind: one of KINDS. answer: index of the right choice. label: the answer in the CSV.
    scene: what the picture shows. image: the picture, None where the row has none.
    """

    def __init__(self, split: str, number: int, seed: int, domain: Domain):
        row_id = f"{split}_{number:05d}"
        rng = random.Random(f"{seed} {row_id}")
        shown, own_file = number, True
        if rng.random() < REPEATS and number > 1 and not self._repeats(split, number - 1, seed):
            shown, own_file = number - 1, rng.random() < 0.25
        picture = random.Random(f"{seed} {split} picture {shown}")
        drawn_for = picture.choices(KINDS, MIX[split])[0]
        self.scene = make_scene(picture, domain, drawn_for)
        own_file |= drawn_for == "no_image"  # the earlier row may have no file
        others = [kind for kind in KINDS if kind not in (drawn_for, "no_image") and self.scene.allows(kind)]
        self.kind = drawn_for if shown == number else rng.choice(others or ["count"])
        question = ask(rng, self.scene, domain, self.kind)
        self.answer = self.label = question.answer
        if split == "train" and rng.random() < WRONG_LABELS:
            self.label = rng.choice([i for i in range(len(question.choices)) if i != self.answer])
        has_image = self.kind != "no_image" or rng.random() < 0.5  # else a picture that has nothing to do with it
        path = f"images/{split}_{number if own_file else shown:05d}.jpg" if has_image else ""
        self.cells = [row_id, path, question.text, *question.choices]
        self.image = draw(picture, self.scene, domain) if has_image and own_file else None

    @staticmethod
    def _repeats(split: str, number: int, seed: int) -> bool:
        return random.Random(f"{seed} {split}_{number:05d}").random() < REPEATS


def draw_rows(split: str, count: int, folder: Path, args: argparse.Namespace) -> list[DrawnRow]:
    """The rows of a split without their pictures, which are written to the folder."""
    write = partial(write_row, split=split, folder=folder, seed=args.seed, domain=DOMAINS[args.domain])
    with ProcessPoolExecutor(args.workers) as pool:
        drawn = pool.map(write, range(1, count + 1), chunksize=32)
        return list(tqdm(drawn, desc=f"drawing {split}", total=count, disable=None))


def write_row(number: int, split: str, folder: Path, seed: int, domain: Domain) -> DrawnRow:
    row = DrawnRow(split, number, seed, domain)
    if row.image:
        row.image.save(folder / row.cells[1], quality=85)
        row.image = None  # the parent needs the rest only
    return row


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    main()
