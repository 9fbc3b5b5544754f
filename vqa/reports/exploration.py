"""The sections of the page of `explore.py`.

Each function measures one thing, puts what deserves a warning on top of the page, and returns the values that its
section shows. Rows are a table with the columns of `read_tables`.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from vqa.config.arguments import folds_path
from vqa.core.errors import UserError, pluralize, preview
from vqa.core.io import atomic_write, read_json
from vqa.data.answers import clean
from vqa.data.columns import find_columns
from vqa.data.duplicates import Picture, same_pictures
from vqa.data.folds import read_folds
from vqa.data.images import image_tokens, preview_bad_images, target_size
from vqa.data.rows import LETTERS, Row, read_rows
from vqa.data.table import read_table
from vqa.evaluation.metrics import NOISE, accuracy
from vqa.evaluation.question_types import OTHER, question_type
from vqa.evaluation.text_only_baseline import MIN_ROWS, TextOnlyBaseline
from vqa.reports.charts import histogram, image_sizes
from vqa.reports.diagnostics import uniformity_test
from vqa.reports.page import Page, card, thumbnail

IMAGE_SIZES = (384, 512, 768, 1024)
MAX_PAIRS = 24  # shown on the page
MAX_ODD_ROWS = 8
SECTIONS = {
    "warnings": "Warnings",
    "letters": "Letters",
    "text-only": "Text-only baseline",
    "types": "Question types",
    "lengths": "Lengths",
    "images": "Images",
    "duplicates": "Duplicates",
    "choices": "Choices",
    "rows": "Rows",
}


def read_tokenizer(folder: str) -> tuple[Tokenizer, int]:
    """(tokenizer, patch size of the vision tower in pixels) of a model's folder."""
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        raise UserError(f"--model {folder}: it has no tokenizer.json. Give the folder of the base model.")
    vision = read_json(Path(folder, "config.json")).get("vision_config", {})
    if "spatial_merge_size" not in vision:  # its processor cuts tiles or pads, by a rule of its own
        raise UserError(f"--model {folder}: explore.py counts image tokens of Qwen's models only. Give one of those.")
    return Tokenizer.from_file(str(path)), vision["patch_size"]


def read_tables(files: Sequence[str], image_root: str | None, columns: str | None, page: Page) -> pd.DataFrame:
    """The rows of all files: the keys of a Row, and `file`, `split` (a short name), `type`, `fold` and `answer`.

    `columns` is the mapping of an args file, for files whose columns it has to name.
    `fold` and `answer` are None where they are unknown.
    """
    if repeated := [file for file in files if files.count(file) > 1]:
        raise UserError(f"{preview(repeated)}: given twice. Give each file once.")
    stems = Counter(Path(file).stem for file in files)
    tables = []
    for file in files:
        table = read_table(file, ())
        found = find_columns(file, list(table.columns), columns)
        labelled = any(table[name].astype(bool).any() for name in (found.answer, *found.annotators) if name)
        rows = pd.DataFrame(read_rows(file, image_root, labelled, columns=columns))
        rows["file"], rows["split"] = file, Path(file).stem if stems[Path(file).stem] == 1 else file
        rows["type"] = list(map(question_type, rows["question"], rows["choices"]))
        rows["fold"] = read_fold_column(file, rows, page) if labelled else None
        tables.append(rows.astype({"answer": object}) if labelled else rows.assign(answer=None))
    return pd.concat(tables, ignore_index=True)


def read_fold_column(file: str, rows: pd.DataFrame, page: Page) -> np.ndarray | None:
    """The fold of each row, if there is a folds file beside the CSV and it matches."""
    path = folds_path(None, file)
    if not path.is_file():
        return None
    try:
        return read_folds(path, list(rows["id"]), file)
    except UserError as error:
        page.highlight("rows", str(error))
        return None


def by_split(rows: pd.DataFrame):
    return rows.groupby("split", sort=False)


def image_keys(rows: pd.DataFrame, pictures: dict[str, Picture]) -> pd.Series:
    """A key of each row that rows with the same images share. A row without an image has its own."""
    keys = [" ".join(sorted({pictures[path].sha or path for path in paths})) for paths in rows["images"]]
    return pd.Series([key or f"row {index}" for key, index in zip(keys, rows.index)], index=rows.index)


def labelled_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["answer"].notna()]


def overview(rows: pd.DataFrame, pictures: dict[str, Picture], baseline: dict) -> list[tuple[str, str]]:
    """(number, what it counts) for the tiles at the top of the page."""
    num_choices = rows["choices"].map(len)
    low, high = num_choices.min(), num_choices.max()
    tiles = [(f"{len(rows):,}", "rows"), (f"{len(pictures):,}", "image files")]
    tiles.append((str(low) if low == high else f"{low} to {high}", "choices per row"))
    if baseline["rows"]:
        tiles.append((f"{baseline['chance']:.1%}", "accuracy by chance"))
        tiles.append((f"{baseline['accuracy'].value:.1%}", "text-only accuracy"))
    return tiles


def letters_section(rows: pd.DataFrame, page: Page) -> list[dict]:
    """How often each letter is right, and whether that is uneven beyond noise."""
    section = []
    for name, split in by_split(labelled_rows(rows)):
        num_choices = split["choices"].map(len).to_numpy()
        counts, expected, p_value = uniformity_test(split["answer"].to_numpy(dtype=int), num_choices)
        observed, even = counts / len(split), expected / len(split)
        if p_value < NOISE:
            most = int((counts / expected).argmax())
            page.highlight(
                "letters",
                f"{name}: the answer is {LETTERS[most]} in {observed[most]:.1%} of the rows; {even[most]:.1%} is "
                "expected. shuffle_choices (on by default) keeps a model from learning this.",
            )
        p_text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
        verdict = f"{'Uneven' if p_value < NOISE else 'Even within noise'} (chi-squared test, {p_text})."
        section.append({"name": name, "lines": list(zip(LETTERS, counts, observed, even)), "verdict": verdict})
    return section


def text_only_section(rows: pd.DataFrame, pictures: dict[str, Picture], page: Page) -> dict:
    """The accuracy of a classifier that reads question and choices and sees no image."""
    labelled = labelled_rows(rows)
    images = pd.factorize(image_keys(labelled, pictures))[0]
    num_images = images.max(initial=-1) + 1
    if num_images < MIN_ROWS:
        return {"rows": 0, "sentence": f"Not measured: it needs labelled rows with {MIN_ROWS} different images."}
    baseline = TextOnlyBaseline(labelled.to_dict("records"))
    correct = baseline.cross_validate(images) == labelled["answer"].to_numpy(dtype=int)
    score = accuracy(correct, {"image": images} if num_images < len(images) else None)
    chance = float((1 / labelled["choices"].map(len)).mean())
    beats_chance = score.low > chance
    interval = f"{score.value:.1%} (95 % interval {score.low:.1%} to {score.high:.1%})"
    sentence = f"Text-only accuracy is {interval}; chance is {chance:.1%}."
    if beats_chance:
        page.highlight("text-only", f"{sentence} A model with no higher accuracy does not use the images.")
    return {
        "rows": len(labelled),
        "sentence": sentence if beats_chance else f"{sentence} The difference is within noise.",
        "accuracy": score,
        "chance": chance,
        "correct": pd.Series(correct, index=labelled.index),
        "features": [(name, np.exp(w)) for name, w in baseline.top_features()] if beats_chance else [],
    }


def types_section(rows: pd.DataFrame, baseline: dict, page: Page) -> list[dict]:
    """The fraction of each question type in each file, and the text-only accuracy on it."""
    fractions = pd.crosstab(rows["type"], rows["split"], normalize="columns")[list(rows["split"].unique())]
    unknown = (rows["type"] == OTHER).mean()
    if unknown > 0.3:
        page.highlight("types", f"{unknown:.0%} of the questions match no rule in vqa/evaluation/question_types.py.")
    accuracies = baseline["correct"].groupby(rows["type"]).mean() if baseline["rows"] else {}
    examples = rows.groupby("type")["question"].first()
    return [
        {
            "type": name,
            "fractions": list(fractions.loc[name]),
            "text_only": accuracies.get(name),
            "example": examples[name],
        }
        for name in fractions.mean(axis=1).sort_values(ascending=False).index
    ]


def lengths_section(rows: pd.DataFrame, tokenizer: Tokenizer, page: Page) -> dict[str, list[float]]:
    """Tokens of the questions and of the choices: name -> median, 95 % quantile and maximum of each file."""
    choices = rows["choices"].explode()
    tokens = pd.Series(count_tokens(tokenizer, choices), choices.index).groupby(level=0)
    questions = count_tokens(tokenizer, rows["question"])
    lengths = pd.DataFrame({"question": questions, "longest choice": tokens.max(), "all choices": tokens.sum()})
    splits = [lengths.loc[split.index] for _, split in by_split(rows)]
    for figure, column in (("question_tokens", "question"), ("choice_tokens", "all choices")):
        values = {name: split[column] for name, split in zip(rows["split"].unique(), splits)}
        page.add_figure(figure, histogram(values, f"tokens of a row: {column}", "tokens"))
    return {name: [q for split in splits for q in split[name].quantile([0.5, 0.95, 1])] for name in lengths}


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def images_section(pictures: dict[str, Picture], patch: int, page: Page) -> dict:
    """The sizes of the images, and how many tokens they cost at each pixel budget. `patch`: pixels of a side."""
    if broken := {path: picture.problem for path, picture in pictures.items() if picture.problem}:
        names = preview_bad_images(broken)
        page.highlight("images", f"{len(broken)} of {len(pictures)} images cannot be used: {names}")
    sizes = np.array([(p.width, p.height) for p in pictures.values() if not p.problem])
    section: dict = {"costs": [], "token_side": 2 * patch}
    if not len(sizes):
        return section
    page.add_figure("image_sizes", image_sizes(sizes, IMAGE_SIZES))
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
    for size in IMAGE_SIZES:
        grids = (target_size(int(width), int(height), size, patch=patch) for width, height in unique)
        tokens = pd.Series([image_tokens(*grid, patch) for grid in grids])[inverse.ravel()]  # numpy 2.0: a column
        cost = {"size": size, "median": tokens.median(), "high": tokens.quantile(0.95), "max": tokens.max()}
        cost |= {"mean": tokens.mean(), "shrunk": (sizes.prod(1) > size**2).mean()}
        section["costs"].append(cost)
    return section


def duplicates_section(rows: pd.DataFrame, pictures: dict[str, Picture], page: Page) -> dict:
    """Images that occur twice, within a file and across files. All pairs are written to duplicates.csv."""
    images = rows.explode("images").dropna(subset="images").rename(columns={"images": "image"})
    images = images.drop_duplicates(["split", "image"]).reset_index(drop=True)
    pairs = same_pictures(images, pictures)
    for side in ("first", "second"):
        for column in ("split", "id", "image", "fold"):
            pairs[f"{side}_{column}"] = images[column].to_numpy()[pairs[side]]
    path = page.folder / "duplicates.csv"
    path.unlink(missing_ok=True)  # from an earlier call
    if len(pairs):
        with atomic_write(path) as temporary:
            pairs.drop(columns=["first", "second"]).to_csv(temporary, index=False, lineterminator="\n")
    numbers = pairs.groupby(["first_split", "second_split", "kind"])["second"].nunique()
    names, counts = list(rows["split"].unique()), []
    for i, first in enumerate(names):
        for second in names[i:]:
            identical, near = (int(numbers.get((first, second, kind), 0)) for kind in ("identical", "near"))
            within = first == second
            name = f"within {first}" if within else f"{second}, also in {first}"
            counts.append({"name": name, "identical": identical, "near": near})
            for number, kind in ((identical, "identical"), (near, "near-duplicate")):
                if number:
                    found = pluralize(number, f"{kind} image")
                    text = f"{second} repeats {found}" if within else f"{second} shares {found} with {first}"
                    page.highlight("duplicates", text)
    split_pairs = pairs[
        (pairs["first_split"] == pairs["second_split"])
        & pairs["first_fold"].notna()
        & (pairs["first_fold"] != pairs["second_fold"])
    ]
    if len(split_pairs):
        ids = preview([f"{a} and {b}" for a, b in zip(split_pairs["first_id"], split_pairs["second_id"])])
        text = f"{pluralize(len(split_pairs), 'pair')} of duplicate images in different folds: {ids}."
        page.highlight("duplicates", f"{text} Validation scores are too high.")
    across_first = pairs.iloc[np.argsort(pairs["first_split"] == pairs["second_split"], kind="stable")]
    return {"counts": counts, "pairs": [pair_card(pair) for pair in across_first.head(MAX_PAIRS).to_dict("records")]}


def pair_card(pair: dict) -> dict:
    names = []
    for side in ("first", "second"):
        fold = "" if pd.isna(pair[f"{side}_fold"]) else f", fold {int(pair[f'{side}_fold'])}"
        names.append(f"{pair[f'{side}_id']} ({pair[f'{side}_split']}{fold})")
    kind = "identical" if pair["kind"] == "identical" else "near-duplicate"
    return {"kind": kind, "names": names, "images": [thumbnail(pair["first_image"]), thumbnail(pair["second_image"])]}


def choices_section(rows: pd.DataFrame, pictures: dict[str, Picture], page: Page) -> dict:
    """Rows with equal choices, rows that contradict each other, unlabelled rows whose answer a labelled row has."""
    texts = [[clean(choice) for choice in choices] for choices in rows["choices"]]
    rows = rows.assign(
        texts=texts,
        text=[None if pd.isna(answer) else own[int(answer)] for answer, own in zip(rows["answer"], texts)],
        image_key=image_keys(rows, pictures),
        question_key=rows["question"].map(clean),
    )
    lines, odd_rows = [], []
    for name, split in by_split(rows):
        counts = split["choices"].map(len).value_counts().sort_index()
        lines.append(f"{name}: " + ", ".join(f"{pluralize(n, 'row')} with {k} choices" for k, n in counts.items()))
        equal = split[[len(set(own)) < len(own) for own in split["texts"]]]
        if len(equal):
            text = f"{name}: {pluralize(len(equal), 'row')} with two equal choices: {preview(list(equal['id']))}"
            if ambiguous := [row.id for row in equal.itertuples() if row.texts.count(row.text) > 1]:
                text += f". The right answer is there twice, so the letter is a guess, in {preview(ambiguous)}"
            page.highlight("choices", text)
            odd_rows += equal.to_dict("records")
    keys = ["image_key", "question_key"]
    asked = [group for _, group in rows[rows.duplicated(keys, keep=False)].groupby(keys, sort=False)]
    if contradicting := [group for group in asked if contradicts(group)]:
        same = pd.concat(contradicting).dropna(subset="text")
        number, ids = pluralize(len(contradicting), "question"), preview(list(same["id"]))
        page.highlight("choices", f"{number} with different answers for the same image: {ids}")
        odd_rows += same.to_dict("records")
    known = known_answers(asked, page)
    lines += [known] if rows["text"].isna().any() else []
    return {"lines": lines, "cards": [row_card(row) for row in odd_rows[:MAX_ODD_ROWS]]}


def contradicts(group: pd.DataFrame) -> bool:
    """Whether a row has another answer than a second one although it offers the second one's answer."""
    labelled = group[group["text"].notna()]
    answers = set(labelled["text"])
    return any((answers - {row.text}) & set(row.texts) for row in labelled.itertuples())


def known_answers(asked: list[pd.DataFrame], page: Page) -> str:
    """Write known_answers.csv: the unlabelled rows that a labelled row answers. Returns a sentence about them.

    `asked` are the rows of one image and question. An answer is known where the unlabelled row offers exactly one of
    the labelled rows' answers, and once.
    """
    seen, known = [], []
    for group in asked:
        labelled = group[group["text"].notna()]
        for row in group[group["text"].isna()].itertuples() if len(labelled) else ():
            seen.append(f"{row.id} (see {labelled['id'].iloc[0]})")
            places = [i for i, text in enumerate(row.texts) if text in set(labelled["text"])]
            if len(places) == 1:
                source = labelled.loc[labelled["text"] == row.texts[places[0]], "id"].iloc[0]
                known.append([row.id, LETTERS[places[0]], row.texts[places[0]], source, row.split])
    path = page.folder / "known_answers.csv"
    path.unlink(missing_ok=True)  # from an earlier call
    sentence = f"{pluralize(len(seen), 'unlabelled row')} with the question and the image of a labelled row"
    if seen:
        text = f"{sentence}: {preview(seen)}"
        if known:
            with atomic_write(path) as temporary:
                table = pd.DataFrame(known, columns=["id", "answer", "answer_text", "labelled_id", "split"])
                table.to_csv(temporary, index=False, lineterminator="\n")
            text += f". {len(known)} of their answers are in known_answers.csv, for ensemble.py --known_answers"
        page.highlight("choices", text)
    return sentence


def sample_cards(rows: pd.DataFrame, number: int) -> list[dict]:
    """Cards of rows drawn with a fixed seed, one of each question type in turn."""
    drawn = rows.sample(frac=1, random_state=0)
    turn = drawn.groupby("type").cumcount()
    return [row_card(row) for row in drawn.iloc[np.argsort(turn, kind="stable")[:number]].to_dict("records")]


def row_card(row: dict) -> dict:
    """`row` is a Row with the further columns `split` and `type`."""
    return card(cast(Row, row), [row["split"], row["type"]])
