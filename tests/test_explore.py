"""explore.py on a contest with planted faults: it warns of each; the page needs no network and escapes text."""

import contextlib
import csv
import io
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import HEADER, TINY, write_csv
from parsed import Parsed, needs_nothing
from PIL import Image
from test_duplicates import picture

import explore
from vqa.data.collator import Collator
from vqa.data.duplicates import Picture, read_pictures
from vqa.reports.exploration import choices_section, count_tokens, images_section, read_tokenizer
from vqa.reports.page import Page

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with 학습.csv (120 rows with answers) and test.csv (12 rows)."""
    folder = tmp_path_factory.mktemp("planted")
    random = np.random.default_rng(0)
    for split, count in (("train", 120), ("test", 12)):
        (folder / split).mkdir()
        for number in range(count):
            image = picture(number + 1000 * (split == "test"))
            image.crop((0, 0, 240 - number % 3 * 40, 180)).save(folder / split / f"{number}.jpg")
    shutil.copy(folder / "train" / "3.jpg", folder / "test" / "0.jpg")
    Image.open(folder / "train" / "5.jpg").resize((120, 90)).save(folder / "test" / "1.jpg")
    Image.open(folder / "train" / "6.jpg").save(folder / "train" / "61.jpg", quality=40)
    (folder / "train" / "11.jpg").write_bytes((folder / "train" / "11.jpg").read_bytes()[:700])
    shutil.copy(folder / "train" / "20.jpg", folder / "train" / "21.jpg")

    def make(split, number):
        choices = [f"{word}{random.integers(1000)}" for word in ("가", "나", "다", "라")]
        answer = "a" if number % 2 else "abcd"[random.integers(4)]
        return [f"{split}_{number}", f"{split}/{number}.jpg", f"무슨 색인가요 {number}?", *choices, answer]

    train, test = [make("train", n) for n in range(120)], [make("test", n)[:-1] for n in range(12)]
    train[10][4] = train[10][3]
    train[20][2:] = ["같은 질문?", "x", "y", "z", "w", "a"]
    train[21][2:] = [" 같은  질문?", "x", "y", "z", "w", "c"]
    test[0][2] = train[3][2]
    train[30][0], train[30][2], train[30][5] = "<b>id</b>", EVIL, EVIL
    train[31][6] = ""
    write_csv(folder / "학습.csv", train)
    write_csv(folder / "test.csv", test, HEADER[:-1])
    return folder


@pytest.fixture(scope="module")
def explored(planted):
    """(what was printed, the page's HTML, its folder)"""
    output, argv = io.StringIO(), sys.argv
    sys.argv = [
        "explore.py",
        str(planted / "학습.csv"),
        str(planted / "test.csv"),
        "--output_dir",
        str(planted / "page"),
    ]
    sys.argv += ["--model", TINY, "--cards", "140"]
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # matplotlib warns of a glyph that its font lacks
            explore.main()
    finally:
        sys.argv = argv
    return output.getvalue(), (planted / "page" / "index.html").read_text(encoding="utf-8"), planted / "page"


PLANTED = [
    "학습: the answer is a in ",
    "1 of 132 images cannot be used: ",
    "학습 repeats 1 identical image",
    "학습 repeats 1 near-duplicate image",
    "test shares 1 identical image with 학습",
    "test shares 1 near-duplicate image with 학습",
    "학습: 1 row with two equal choices: train_10",
    "1 question with different answers for the same image: train_20, train_21",
    "1 unlabelled row with the question and the image of a labelled row: test_0 (see train_3)",
    "Text-only accuracy is ",
]


@pytest.mark.parametrize("warning", PLANTED)
def test_planted_faults_are_warned_of_first(explored, warning):
    said, html, _ = explored
    assert f"- {warning}" in said
    page = Parsed(html).text
    assert warning in page[: page.index("How often each letter")]


def test_nothing_else_is_warned_of(explored):
    assert explored[0].count("\n- ") + 1 == len(PLANTED)


def test_the_page_needs_no_network_and_escapes_whatever_stands_in_the_csv(explored):
    page = needs_nothing(explored[1])
    assert page.text.count(EVIL) == 2 and "<b>id</b>" in page.text


def test_pairs_and_figures_lie_beside_the_page(explored):
    _, html, folder = explored
    table = pd.read_csv(folder / "duplicates.csv")
    found = {(row.kind, row.first_id, row.second_id) for row in table.itertuples()}
    assert found == {
        ("identical", "train_3", "test_0"),
        ("near", "train_5", "test_1"),
        ("near", "train_6", "train_61"),
        ("identical", "train_20", "train_21"),
    }
    for name in ("question_tokens", "choice_tokens", "image_sizes"):
        image = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert image.std() > 5, "a chart that is not blank"


@pytest.mark.slow
def test_pairs_in_different_folds_are_warned_of(planted, script, tmp_path):
    for path in planted.iterdir():
        if path.name != "page":
            (tmp_path / path.name).symlink_to(path)
    ids = [row["id"] for row in csv.DictReader(open(planted / "학습.csv", encoding="utf-8"))]
    write_csv(tmp_path / "folds.csv", [[row_id, int(row_id == "train_61")] for row_id in ids], ["id", "fold"])
    code, said, error = script("explore", tmp_path / "학습.csv", "--model", TINY, "--output_dir", tmp_path / "page")
    assert code == 0, error
    assert (
        "- 1 pair of duplicate images in different folds: train_6 and train_61. Validation scores are too high."
        in said
    )
    write_csv(tmp_path / "folds.csv", [["other", 0]], ["id", "fold"])
    said = script("explore", tmp_path / "학습.csv", "--model", TINY, "--output_dir", tmp_path / "page")[1]
    assert "ids of" in said and "are missing" in said, "a folds file that does not fit"


def test_annotators_are_labels_too(planted, script, tmp_path):
    """The CSV has answer1, answer2, answer3 and no answer."""
    table = pd.read_csv(planted / "학습.csv", dtype=str, keep_default_na=False)
    for name in ("answer1", "answer2", "answer3"):
        table[name] = table["answer"]
    table["answer3"] = ""
    table.drop(columns="answer").to_csv(tmp_path / "votes.csv", index=False)
    flags = ("--image_root", planted, "--model", TINY, "--output_dir", tmp_path / "page")
    code, said, error = script("explore", tmp_path / "votes.csv", *flags)
    assert code == 0 and "- votes: the answer is a in " in said and "- Text-only accuracy is " in said, error
    page = Parsed((tmp_path / "page" / "index.html").read_text(encoding="utf-8")).text
    assert "accuracy by chance" in page and "No file has an answer column" not in page


def table(*rows) -> tuple[pd.DataFrame, dict]:
    """Rows (split, id, image, question, choices, answer or None) as explore.py holds them, and their pictures."""
    names = ["split", "id", "image", "question", "choices", "answer"]
    table = pd.DataFrame(rows, columns=names).assign(type="other")
    table["choices"], table["images"] = table["choices"].map(list), [[image] for image in table["image"]]
    return table.astype({"answer": object}), {image: Picture(problem="not read") for image in table["image"]}


def test_two_answers_contradict_only_if_a_row_offers_the_others_answer(tmp_path):
    for choices, found in (("xqrs", 1), ("pqrs", 0)):  # does the second row offer x, the answer of the first?
        page = Page(tmp_path)
        choices_section(*table(("t", "1", "i", "왜?", "xyzw", 0), ("t", "2", "i", " 왜? ", choices, 1)), page)
        assert len(page.highlights) == found
    page = Page(tmp_path)
    choices_section(*table(("t", "1", "i", "왜?", "xyzw", 0), ("t", "2", "other", "왜?", "xqrs", 1)), page)
    assert page.highlights == []


def test_rows_whose_right_answer_is_there_twice_are_named(tmp_path):
    page = Page(tmp_path)
    choices_section(*table(("t", "1", "i", "왜?", "xyxw", 2), ("t", "2", "j", "왜?", "xyyw", 0)), page)
    (highlight,) = page.highlights
    assert "2 rows with two equal choices: 1, 2. The right answer is there twice" in highlight.text
    assert highlight.text.endswith("in 1")


def test_answers_that_labelled_rows_give_away_are_written(tmp_path):
    train = [("train", "a", "i", "왜?", "xyzw", 1), ("train", "b", "i", "왜?", "xyzw", 2)]
    test = [
        ("test", "offers y", "i", "왜?", "pqry", None),
        ("test", "offers y and z", "i", "왜?", "zpqy", None),
        ("test", "offers y twice", "i", "왜?", "ypqy", None),
        ("test", "offers neither", "i", "왜?", "pqrs", None),
        ("test", "another image", "j", "왜?", "pqry", None),
        ("test", "another question", "i", "누구?", "pqry", None),
    ]
    page = Page(tmp_path)
    choices_section(*table(*train, *test), page)
    assert pd.read_csv(tmp_path / "known_answers.csv").to_numpy().tolist() == [["offers y", "d", "y", "a", "test"]]
    assert page.highlights[-1].text.startswith("4 unlabelled rows with the question and the image of a labelled row: ")
    choices_section(*table(*train), page)
    assert not (tmp_path / "known_answers.csv").exists(), "of an earlier call"


def test_tokens_are_those_of_the_models_own_tokenizer(processor, rows):
    texts = [row["question"] for row in rows] + ["무슨 색인가요 <|im_end|>?", "a"]
    tokenizer, patch = read_tokenizer(TINY)
    wanted = [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False).input_ids]
    assert count_tokens(tokenizer, texts) == wanted and patch == processor.image_processor.patch_size


def test_image_tokens_are_those_that_the_model_gets(processor, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1300, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    pictures = read_pictures([str(tmp_path / "x.png")])
    found = images_section(pictures, 14, Page(tmp_path))["costs"]
    for line in found:
        row = {"id": "x", "images": [str(tmp_path / "x.png")], "question": "?", "choices": ["a", "b"]}
        grid = Collator(processor, line["size"])([row])["image_grid_thw"]
        assert line["median"] == int(grid.prod()) // processor.image_processor.merge_size**2
        assert line["shrunk"] == (900 * 1300 > line["size"] ** 2)


def test_what_cannot_be_read_is_one_line(script, planted, tmp_path):
    code, _, error = script("explore", planted / "test.csv", "--model", tmp_path)
    assert (code, error.count("\n")) == (2, 1) and "no tokenizer.json" in error
    (tmp_path / "tokenizer.json").write_text(Path(TINY, "tokenizer.json").read_text(encoding="utf-8"), "utf-8")
    (tmp_path / "config.json").write_text('{"vision_config": {"patch_size": [14, 14]}}')  # as InternVL's
    code, _, error = script("explore", planted / "test.csv", "--model", tmp_path)
    assert (code, error.count("\n")) == (2, 1) and "Qwen's models only" in error
    code, _, error = script("explore", planted / "test.csv", planted / "test.csv", "--model", TINY)
    assert (code, error.count("\n")) == (2, 1) and "given twice" in error
