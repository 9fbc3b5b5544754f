"""Make a page about the data before training: warnings, question types, lengths, images, duplicates and sample rows.

    python explore.py data/train.csv data/test.csv
    python explore.py data/train.csv data/test.csv --model /kaggle/input/.../qwen2.5-vl-3b-instruct
    python explore.py data/demo/train.csv data/demo/test.csv         # outputs/demo/explore/index.html

Give all files of the contest at once: images that occur in two files are found only then. The warnings are also
printed here. Beside the page are the figures as PNG files, all pairs of identical or near-duplicate images
(duplicates.csv) and the answers of test rows that labelled rows give away (known_answers.csv). The page is one file
and needs no network.
"""

import argparse
from pathlib import Path

from vqa.core.cli import make_parser
from vqa.core.errors import run_main
from vqa.core.io import swap_root
from vqa.data.duplicates import read_pictures
from vqa.reports import exploration
from vqa.reports.page import Page

TINY = "checkpoints/tiny"


def main() -> None:
    args = parse_args()
    tokenizer, patch = exploration.read_tokenizer(args.model)
    page = Page(args.output_dir or swap_root("outputs", Path(args.csv[0]).parent, below="data") / "explore")
    rows = exploration.read_tables(args.csv, args.image_root, args.columns, page)
    pictures = read_pictures(list(rows["images"].explode().dropna()))
    baseline = exploration.text_only_section(rows, pictures, page)
    path = page.write(
        "explore.html",
        sections=exploration.SECTIONS,
        files=rows.groupby(["file", "split"], sort=False).size().reset_index(name="rows").to_dict("records"),
        tiles=exploration.overview(rows, pictures, baseline),
        images=exploration.images_section(pictures, patch, page),  # the warnings are in the order of these calls
        duplicates=exploration.duplicates_section(rows, pictures, page),
        choices=exploration.choices_section(rows, pictures, page),
        letters=exploration.letters_section(rows, page),
        text_only=baseline,
        types=exploration.types_section(rows, baseline, page),
        lengths=exploration.lengths_section(rows, tokenizer, page),
        model=args.model,
        is_tiny=args.model == TINY,
        cards=exploration.sample_cards(rows, args.cards),
    )
    print(f"{path}: {len(rows)} rows")


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("csv", nargs="+", help="the contest's files, labelled ones first: train.csv test.csv")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: the CSV's folder)")
    parser.add_argument("--columns", metavar="JSON", help="which column is which, as in the args file")
    parser.add_argument(
        "--model", default=TINY, help="folder of the model whose tokens are counted (default: %(default)s)"
    )
    parser.add_argument("--cards", type=int, default=24, help="number of sample rows to show (default: %(default)s)")
    parser.add_argument("--output_dir", help="folder of the page (default: data/X/train.csv -> outputs/X/explore)")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
