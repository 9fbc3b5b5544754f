"""Look at the data before training on it: one page with warnings, lengths, images, duplicates and sample rows.

    python explore.py data/train.csv data/test.csv
    python explore.py data/train.csv data/test.csv --model /kaggle/input/.../qwen2.5-vl-3b-instruct
    python explore.py data/demo/train.csv data/demo/test.csv         # outputs/demo/explore/index.html

The page needs no network and nothing beside it. Its figures lie beside it as PNG files too, and duplicates.csv with
every pair of images that are the same, byte for byte or nearly. Give all files of the contest at once: a photo that
stands in two of them is found only then. Warnings come first, on the page and in what is printed here.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from vqa.config.arguments import folds_path
from vqa.core.errors import UserError, pluralize, preview, run_main
from vqa.core.io import atomic_write, read_json, swap_root
from vqa.data.duplicates import Picture, read_pictures, same_pictures
from vqa.data.folds import read_folds
from vqa.data.images import image_tokens, preview_bad_images, target_size
from vqa.data.prompt import LETTERS
from vqa.data.rows import read_rows, rows_with_equal_choices
from vqa.data.table import read_table
from vqa.evaluation.metrics import NOISE, accuracy
from vqa.reports.charts import histogram, image_sizes
from vqa.reports.diagnostics import uniformity_test
from vqa.reports.page import Highlights, Page, card, thumbnail
from vqa.reports.question_types import OTHER, question_type
from vqa.reports.text_only_baseline import FOLDS, TextOnlyBaseline

TINY = "checkpoints/tiny"
IMAGE_SIZES = (384, 512, 768, 1024)
SHOWN_PAIRS = 24
SHOWN_ODD = 8
SECTIONS = {
    "warnings": "Warnings",
    "letters": "Letters",
    "blind": "Text alone",
    "types": "Question types",
    "lengths": "Lengths",
    "images": "Images",
    "duplicates": "Duplicates",
    "choices": "Choices",
    "rows": "Rows",
}


def main() -> None:
    args = parse_args()
    tokenizer, patch = read_model(args.model)
    warnings = Highlights()
    rows = read_data(args.csv, args.image_root, warnings)
    pictures = read_pictures(rows["image"])
    page = Page(args.output_dir or swap_root("outputs", Path(args.csv[0]).parent, below="data") / "explore")
    images = look_at_images(pictures, patch, page, warnings)  # what matters most is warned of first
    duplicates = look_at_duplicates(rows, pictures, page, warnings)
    choices = look_at_choices(rows, pictures, warnings)
    blind = look_at_blind(rows, pictures, warnings)
    page.write(
        "explore.html",
        sections=SECTIONS,
        splits=[{"name": name, "file": own["csv"].iloc[0], "rows": len(own)} for name, own in by_split(rows)],
        images=images,
        duplicates=duplicates,
        choices=choices,
        blind=blind,
        letters=look_at_letters(rows, warnings),
        types=look_at_types(rows, blind, warnings),
        lengths=look_at_lengths(rows, tokenizer, page),
        tokenizer=args.model,
        is_tiny=args.model == TINY,
        cards=sample_cards(rows, args.cards),
        tiles=tiles(rows, pictures, blind),
        warnings=warnings,
    )
    warnings.print()
    print(f"{page.folder / 'index.html'}: {len(rows)} rows")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", help="the contest's files, those with answers first: train.csv test.csv")
    parser.add_argument("--image_root", help="folder that `path` is relative to (default: the CSV's own)")
    parser.add_argument(
        "--model", default=TINY, help=f"folder of the model whose tokens are counted (default: {TINY})"
    )
    parser.add_argument("--cards", type=int, default=24, help="sample rows to show (default: 24)")
    parser.add_argument("--output_dir", help="(default: explore/ in outputs/, and the data's own place below data/)")
    return parser.parse_args()


def read_model(folder: str) -> tuple[Tokenizer, int]:
    """(tokenizer, side in pixels of a patch of the vision tower) of a model folder."""
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        raise UserError(f"--model {folder}: no tokenizer.json in it; give the folder of the base model")
    return Tokenizer.from_file(str(path)), read_json(Path(folder, "config.json"))["vision_config"]["patch_size"]


def read_data(files: list[str], image_root: str | None, warnings: Highlights) -> pd.DataFrame:
    """The rows of all files: what read_rows gives, and `csv`, `split` (a short name), `type`, `fold` and `answer`.

    `fold` and `answer` are None where there is none.
    """
    if len(set(files)) < len(files):
        raise UserError(f"{preview([f for f in files if files.count(f) > 1])}: given twice; give each file once")
    stems = Counter(Path(file).stem for file in files)
    parts = []
    for file in files:
        answered = "answer" in read_table(file, ("id",)).columns
        rows = pd.DataFrame(read_rows(file, image_root, with_answer=answered))
        rows["csv"], rows["split"] = file, Path(file).stem if stems[Path(file).stem] == 1 else file
        rows["type"] = rows["question"].map(question_type)
        rows["fold"] = read_fold_column(file, rows, warnings) if answered else None
        parts.append(rows.astype({"answer": object}) if answered else rows.assign(answer=None))
    return pd.concat(parts, ignore_index=True)


def read_fold_column(file: str, rows: pd.DataFrame, warnings: Highlights) -> np.ndarray | None:
    """The fold of each row, where a folds file lies beside the CSV and fits it."""
    path = folds_path(None, file)
    if not path.is_file():
        return None
    try:
        return read_folds(path, list(rows["id"]), file)
    except UserError as error:
        warnings.add("rows", str(error))


def by_split(rows: pd.DataFrame):
    return rows.groupby("split", sort=False)


def answered(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["answer"].notna()]


def tiles(rows: pd.DataFrame, pictures: dict[str, Picture], blind: dict) -> list[tuple[str, str]]:
    offered = sorted(set(rows["choices"].map(len)))
    shown = [(f"{len(rows):,}", "rows"), (f"{len(pictures):,}", "image files")]
    shown.append((f"{offered[0]} to {offered[-1]}" if len(offered) > 1 else str(offered[0]), "choices a row"))
    if blind["rows"]:
        shown += [
            (f"{blind['chance']:.1%}", "right by chance"),
            (f"{blind['accuracy'].value:.1%}", "right by text alone"),
        ]
    return shown


def look_at_letters(rows: pd.DataFrame, warnings: Highlights) -> list[dict]:
    found = []
    for name, own in by_split(answered(rows)):
        counts, fair, p_value = uniformity_test(own["answer"].to_numpy(dtype=int), own["choices"].map(len).to_numpy())
        shares, even = counts / len(own), fair / len(own)
        if p_value < NOISE:
            most = int((counts / fair).argmax())
            warnings.add(
                "letters",
                f"{name}: the answer is {LETTERS[most]} in {shares[most]:.1%} of the rows, where {even[most]:.1%} "
                "would be even; shuffle_choices, on by default, keeps a model from learning that",
            )
        told = "less than 0.1%" if p_value < 0.001 else f"{p_value:.1%}"
        verdict = f"{'Not e' if p_value < NOISE else 'E'}ven: a fair draw is so uneven in {told} of cases."
        found.append({"name": name, "lines": list(zip(LETTERS, counts, shares, even)), "verdict": verdict})
    return found


def look_at_blind(rows: pd.DataFrame, pictures: dict[str, Picture], warnings: Highlights) -> dict:
    """What text alone guesses of the rows with answers."""
    known = answered(rows)
    groups = pd.factorize(pd.Series([pictures[path].sha or path for path in known["image"]]))[0]
    if not len(known) or groups.max() + 1 < 10 * FOLDS:
        sentence = f"Not measured: it takes answers to rows of {10 * FOLDS} different images."
        return {"rows": 0, "sentence": sentence}
    guesser = TextOnlyBaseline(known.to_dict("records"))
    right = guesser.guesses(groups) == known["answer"].to_numpy(dtype=int)
    result = accuracy(right, {"image": groups} if groups.max() + 1 < len(groups) else None)
    chance = float((1 / known["choices"].map(len)).mean())
    told = f"{result.value:.1%} (95 % interval {result.low:.1%} to {result.high:.1%})"
    if result.low > chance:
        sentence = f"Text alone guesses {told} right; chance is {chance:.1%}."
        warnings.add("blind", f"{sentence} A model that scores no more than that has not looked at an image.")
    else:
        sentence = f"Text alone guesses {told} right, which chance ({chance:.1%}) explains: nothing was found."
    return {
        "rows": len(known),
        "sentence": sentence,
        "accuracy": result,
        "chance": chance,
        "right": pd.Series(right, index=known.index),
        "clues": [(clue, np.exp(weight)) for clue, weight in guesser.strongest_clues()] if result.low > chance else [],
    }


def look_at_types(rows: pd.DataFrame, blind: dict, warnings: Highlights) -> list[dict]:
    shares = pd.crosstab(rows["type"], rows["split"], normalize="columns")[list(dict.fromkeys(rows["split"]))]
    unknown = (rows["type"] == OTHER).mean()
    if unknown > 0.3:
        warnings.add(
            "types", f"{unknown:.0%} of the questions are of no known type; add rules to vqa/question_types.py"
        )
    right = blind["right"].groupby(rows["type"]).mean() if blind["rows"] else {}
    return [
        {
            "type": name,
            "shares": list(shares.loc[name]),
            "blind": right.get(name),
            "example": rows.loc[rows["type"] == name, "question"].iloc[0],
        }
        for name in shares.mean(axis=1).sort_values(ascending=False).index
    ]


def look_at_lengths(rows: pd.DataFrame, tokenizer: Tokenizer, page: Page) -> list[dict]:
    """Tokens of the question and of the choices; two figures."""
    questions = np.array(count_tokens(tokenizer, list(rows["question"])))
    choices = np.array(count_tokens(tokenizer, [text for texts in rows["choices"] for text in texts]))
    starts = rows["choices"].map(len).cumsum().to_numpy() - rows["choices"].map(len).to_numpy()
    kinds = {
        "question": questions,
        "longest choice": np.maximum.reduceat(choices, starts),
        "all choices": np.add.reduceat(choices, starts),
    }
    splits = {name: rows.index.get_indexer(own.index) for name, own in by_split(rows)}
    for name in ("question", "choice"):
        title, values = ("tokens of a question", questions) if name == "question" else (
            "tokens of all choices of a row", kinds["all choices"])  # fmt: skip
        page.add(f"{name}_tokens", histogram({split: values[at] for split, at in splits.items()}, title, "tokens"))
    return [
        {
            "name": name,
            "values": [value for at in splits.values() for value in np.quantile(values[at], [0.5, 0.95, 1])],
        }
        for name, values in kinds.items()
    ]


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def look_at_images(pictures: dict[str, Picture], patch: int, page: Page, warnings: Highlights) -> dict:
    """Sizes of the images, and the tokens that they cost at each budget; one figure."""
    if broken := {path: picture.problem for path, picture in pictures.items() if picture.problem}:
        warnings.add("images", f"{len(broken)} of {len(pictures)} images cannot be used: {preview_bad_images(broken)}")
    sizes = np.array([(p.width, p.height) for p in pictures.values() if not p.problem])
    side = 2 * patch
    if not len(sizes):
        return {"costs": [], "side": side}
    page.add("image_sizes", image_sizes(sizes, IMAGE_SIZES))
    different, back = np.unique(sizes, axis=0, return_inverse=True)
    costs = []
    for size in IMAGE_SIZES:
        grids = [target_size(int(w), int(h), size, patch=patch) for w, h in different]
        tokens = np.array([image_tokens(*grid, patch) for grid in grids])[back]
        middle, high = np.quantile(tokens, [0.5, 0.95])
        costs.append({"size": size, "median": middle, "high": high, "most": tokens.max(), "mean": tokens.mean()})
        costs[-1] |= {"shrunk": (sizes.prod(1) > size**2).mean(), "times": tokens.mean() / costs[0]["mean"]}
    return {"costs": costs, "side": side}


def look_at_duplicates(rows: pd.DataFrame, pictures: dict[str, Picture], page: Page, warnings: Highlights) -> dict:
    """How many images stand there twice, within and across files; all pairs go to duplicates.csv."""
    files = rows.drop_duplicates(["split", "image"]).reset_index(drop=True)
    pairs = same_pictures(files, pictures)
    for side in ("first", "second"):
        for column in ("split", "id", "image", "fold"):
            pairs[f"{side}_{column}"] = files[column].to_numpy()[pairs[side]]
    path = page.folder / "duplicates.csv"
    path.unlink(missing_ok=True)  # one of an earlier look
    if len(pairs):
        with atomic_write(path) as temporary:
            pairs.drop(columns=["first", "second"]).to_csv(temporary, index=False, lineterminator="\n")
    names, counts = list(dict.fromkeys(rows["split"])), []
    for i, first in enumerate(names):
        for second in names[i:]:
            both = pairs[(pairs["first_split"] == first) & (pairs["second_split"] == second)]
            numbers = {kind: both.loc[both["kind"] == kind, "second"].nunique() for kind in ("identical", "near")}
            counts.append(
                {"name": f"within {first}" if first == second else f"of {second}, also in {first}"} | numbers
            )
            for kind, words in (("identical", "byte for byte"), ("near", "nearly")) if first != second else ():
                if numbers[kind]:
                    warnings.add(
                        "duplicates", f"{second} shares {pluralize(numbers[kind], 'image')} with {first}, {words}"
                    )
    across = pairs[(pairs["first_split"] == pairs["second_split"]) & pairs["first_fold"].notna()]
    across = across[across["first_fold"] != across["second_fold"]]
    if len(across):
        named = preview([f"{a} and {b}" for a, b in zip(across["first_id"], across["second_id"])])
        warnings.add(
            "duplicates",
            f"{pluralize(len(across), 'pair')} of like images in different folds: {named}; scores flatter",
        )
    leading = pairs.assign(within=pairs["first_split"] == pairs["second_split"]).sort_values("within", kind="stable")
    return {"counts": counts, "pairs": [show_pair(pair) for pair in leading.head(SHOWN_PAIRS).to_dict("records")]}


def show_pair(pair: dict) -> dict:
    names = []
    for side in ("first", "second"):
        fold = "" if pd.isna(pair[f"{side}_fold"]) else f", fold {int(pair[f'{side}_fold'])}"
        names.append(f"{pair[f'{side}_id']} ({pair[f'{side}_split']}{fold})")
    kind = "byte for byte" if pair["kind"] == "identical" else "nearly"
    return {"kind": kind, "names": names, "images": [thumbnail(pair["first_image"]), thumbnail(pair["second_image"])]}


def look_at_choices(rows: pd.DataFrame, pictures: dict[str, Picture], warnings: Highlights) -> dict:
    """Rows with equal or missing choices, and the same question about the same image."""
    lines, shown = [], []
    for name, own in by_split(rows):
        counts = Counter(own["choices"].map(len))
        lines.append(f"{name}: " + ", ".join(f"{pluralize(counts[n], 'row')} of {n}" for n in sorted(counts)))
        if equal := rows_with_equal_choices(own.to_dict("records")):
            warnings.add("choices", f"{name}: {pluralize(len(equal), 'row')} with two equal choices: {preview(equal)}")
            shown += own[own["id"].isin(equal)].to_dict("records")
    asked = rows.assign(
        about=[pictures[path].sha or path for path in rows["image"]],
        asked=rows["question"].str.split().str.join(" "),
        said=[None if a is None else c[a].strip() for a, c in zip(rows["answer"], rows["choices"])],
    )
    known, open_rows = asked[asked["said"].notna()], asked[asked["said"].isna()]
    answers = known.groupby(["about", "asked"])["said"].nunique()
    if len(odd := answers[answers > 1]):
        own = known.set_index(["about", "asked"]).loc[odd.index]
        warnings.add(
            "choices", f"{pluralize(len(odd), 'question')} with two answers about one image: {preview(list(own['id']))}"
        )
        shown += own.to_dict("records")
    if len(open_rows):
        solved = open_rows.merge(
            known.drop_duplicates(["about", "asked"]), on=["about", "asked"], suffixes=("", "_known")
        )
        lines.append(f"{pluralize(len(solved), 'row')} to predict whose question and image stand in a training row")
        if len(solved):
            ids = [f"{a} by {b}" for a, b in zip(solved["id"], solved["id_known"])]
            warnings.add(
                "choices", f"{pluralize(len(solved), 'row')} to predict answered by a training row: {preview(ids)}"
            )
    return {"lines": lines, "cards": [row_card(row) for row in shown[:SHOWN_ODD]]}


def sample_cards(rows: pd.DataFrame, count: int) -> list[dict]:
    """Cards of rows drawn by seed, of every type in turn."""
    drawn = rows.sample(frac=1, random_state=0)
    turn = drawn.groupby("type").cumcount()
    return [row_card(row) for row in drawn.iloc[np.argsort(turn, kind="stable")[:count]].to_dict("records")]


def row_card(row: dict) -> dict:
    return card(row, [row["split"], row["type"]])


if __name__ == "__main__":
    run_main(main)
