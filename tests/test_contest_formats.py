"""Contests in the forms in which they come: every one is understood, or refused with the field to set.

The answer of a row is the choice that names the colour of its box, so the right index is known without our reader.
"""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from vqa.core.errors import UserError
from vqa.data.rows import read_contest, read_rows
from vqa.data.submission import read_submission_form, write_submission

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
OTHERS = ("yellow", "pink", "brown", "gray", "cyan", "white")
ROWS = 12
LETTERS = "abcdefghijkl"


def box_colour(row: int) -> str:
    return COLOURS[row % len(COLOURS)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder with img/00.png ...: one coloured box each."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "img").mkdir()
    for row in range(ROWS):
        image = Image.new("RGB", (60, 48), "white")
        ImageDraw.Draw(image).rectangle([4, 4, 20 + row, 30], fill=box_colour(row))
        image.save(folder / "img" / f"{row:02d}.png")
    return folder


def offered(row: int, count: int = 4) -> list[str]:
    """The choices of a row; the right one moves from the first place to the last and back."""
    choices = list(OTHERS[: count - 1])
    choices.insert(row % count, box_colour(row))
    return choices


def standard(row: int, count: int = 4) -> dict:
    choices = offered(row, count)
    answer = LETTERS[choices.index(box_colour(row))]
    return {
        "id": f"r{row}",
        "path": f"img/{row:02d}.png",
        "question": f"What colour is box {row}?",
        **dict(zip(LETTERS, choices)),
        "answer": answer,
    }


def table(change=lambda row: row, count: int = 4) -> pd.DataFrame:
    return pd.DataFrame([change(standard(row, count)) for row in range(ROWS)])


def renamed(**names):
    return lambda row: {names.get(key, key): value for key, value in row.items()}


def with_answer(form):
    """The answer as `form` writes it, given its index and the choices."""

    def change(row):
        choices = [row[letter] for letter in "abcd"]
        return row | {"answer": form("abcd".index(row["answer"]), choices)}

    return change


def without(*names):
    return lambda row: {key: value for key, value in row.items() if key not in names}


def as_list(row):
    return without(*"abcd")(row) | {"choices": [row[letter] for letter in "abcd"]}


def check(rows, count: int = 4) -> None:
    """Every row has its question, its choices in order, its box and the right answer."""
    assert len(rows) == ROWS
    for number, row in enumerate(rows):
        assert row["question"] == f"What colour is box {number}?"
        assert row["choices"] == offered(number, count)
        assert row["choices"][row["answer"]] == box_colour(number)
        (path,) = row["images"]
        with Image.open(path) as image:
            assert image.getpixel((6, 6)) == Image.new("RGB", (1, 1), box_colour(number)).getpixel((0, 0))


UNDERSTOOD = {
    "standard": table(),
    "capital answers": table(with_answer(lambda i, c: "ABCD"[i])),
    "answers in brackets": table(with_answer(lambda i, c: f"({'ABCD'[i]})")),
    "answers with their text": table(with_answer(lambda i, c: f"{'ABCD'[i]}. {c[i]}")),
    "answers as text": table(with_answer(lambda i, c: c[i])),
    "answers from 0": table(with_answer(lambda i, c: i)),
    "answers from 1": table(with_answer(lambda i, c: i + 1)),
    "answers as floats": table(with_answer(lambda i, c: float(i))),
    "answers as circled numbers": table(with_answer(lambda i, c: "①②③④"[i])),
    "capital choices": table(renamed(**dict(zip("abcd", "ABCD")))),
    "option columns": table(renamed(**{letter: f"option_{letter}" for letter in "abcd"})),
    "numbered choices": table(renamed(**{letter: f"choice_{i}" for i, letter in enumerate("abcd", 1)})),
    "bare numbers as choices": table(renamed(**{letter: str(i) for i, letter in enumerate("abcd", 1)})),
    "capital headers": table(renamed(id="Id", path="Path", question="Question", answer="Answer")),
    "blanks in the header": table(renamed(path=" path", question="question ", answer=" answer")),
    "image column": table(renamed(path="image")),
    "camel case": table(renamed(id="questionId", path="imagePath")),
    "Korean headers": table(
        renamed(id="번호", path="이미지", question="질문", a="보기1", b="보기2", c="보기3", d="보기4", answer="정답")
    ),
    "no ids": table(without("id")),
    "no extension": table(lambda row: row | {"path": row["path"][:-4]}),
    "other case of the extension": table(lambda row: row | {"path": row["path"].replace(".png", ".PNG")}),
    "backslashes": table(lambda row: row | {"path": row["path"].replace("/", "\\")}),
    "blanks around the path": table(lambda row: row | {"path": f" {row['path']} "}),
    "bare file names": table(lambda row: row | {"path": Path(row["path"]).name}),
    "choices as a JSON list": table(lambda row: as_list(row) | {"choices": json.dumps(as_list(row)["choices"])}),
    "choices as a Python list": table(lambda row: as_list(row) | {"choices": str(as_list(row)["choices"])}),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_contest_is_understood_without_a_flag(name, pictures, tmp_path):
    UNDERSTOOD[name].to_csv(tmp_path / "train.csv", index=False)
    check(read_rows(tmp_path / "train.csv", pictures, with_answer=True))


@pytest.mark.parametrize("form", ["tsv", "semicolon", "json", "jsonl", "parquet", "jsonl with lists", "utf-8-sig"])
def test_a_file_of_another_format_is_read(form, pictures, tmp_path):
    rows = table(as_list) if form.endswith("lists") else table()
    path = tmp_path / f"train.{form.split()[0] if form not in ('semicolon', 'utf-8-sig') else 'csv'}"
    if form == "parquet":
        rows.to_parquet(path)
    elif form == "json":
        path.write_text(json.dumps(rows.to_dict("records"), ensure_ascii=False))
    elif form.startswith("jsonl"):
        rows.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        separator = {"tsv": "\t", "semicolon": ";"}.get(form, ",")
        rows.to_csv(path, index=False, sep=separator, encoding="utf-8-sig" if form == "utf-8-sig" else "utf-8")
    check(read_rows(path, pictures, with_answer=True))


def test_file_names_in_the_other_unicode_form_are_found(pictures, tmp_path):
    (tmp_path / "img").mkdir()
    for row in range(ROWS):
        name = unicodedata.normalize("NFD", f"가{row:02d}.png")
        (tmp_path / "img" / name).write_bytes((pictures / "img" / f"{row:02d}.png").read_bytes())
    table(lambda row: row | {"path": row["path"].replace("img/", "img/가")}).to_csv(
        tmp_path / "train.csv", index=False
    )
    check(read_rows(tmp_path / "train.csv", None, with_answer=True))


def test_eleven_choices_are_all_used(pictures, tmp_path):
    table(count=11).to_csv(tmp_path / "train.csv", index=False)
    check(read_rows(tmp_path / "train.csv", pictures, with_answer=True), count=11)


def test_numbers_that_could_start_at_0_or_at_1_are_refused_with_the_field_to_set(pictures, tmp_path):
    rows = table(with_answer(lambda i, c: i))
    rows[rows["answer"].isin([1, 2])].to_csv(tmp_path / "train.csv", index=False)
    with pytest.raises(UserError, match="answer_form.*number_from_0 or number_from_1"):
        read_rows(tmp_path / "train.csv", pictures, with_answer=True)
    rows = read_rows(tmp_path / "train.csv", pictures, with_answer=True, answer_form="number_from_0")
    assert all(row["choices"][row["answer"]] == box_colour(int(row["id"][1:])) for row in rows)


def test_two_columns_that_could_be_the_image_are_refused_with_the_mapping(pictures, tmp_path):
    table(lambda row: without("path")(row) | {"image": row["path"], "file": "x"}).to_csv(
        tmp_path / "train.csv", index=False
    )
    with pytest.raises(UserError, match='2 columns could be the path: image; file.*"columns"'):
        read_rows(tmp_path / "train.csv", pictures, with_answer=True)
    check(read_rows(tmp_path / "train.csv", pictures, with_answer=True, columns={"path": "image"}))


@pytest.mark.parametrize("separator", [None, ";", "|", ", "])
def test_every_image_of_a_row_is_used_in_order(separator, pictures, tmp_path):
    def two(row):
        second = f"img/{(int(row['id'][1:]) + 1) % ROWS:02d}.png"
        return row | ({"path": f"{row['path']}{separator}{second}"} if separator else {"path_2": second})

    table(two).to_csv(tmp_path / "train.csv", index=False)
    contest = read_contest(tmp_path / "train.csv", pictures, with_answer=True)
    assert [row["images"] for row in contest.rows] == [
        [str(pictures / f"img/{number % ROWS:02d}.png") for number in (row, row + 1)] for row in range(ROWS)
    ]
    assert "12 rows with several images" in contest.summary()


def test_rows_without_an_image_are_text_only_and_counted(pictures, tmp_path):
    table(lambda row: row | {"path": "" if row["id"] in ("r0", "r5") else row["path"]}).to_csv(
        tmp_path / "train.csv", index=False
    )
    contest = read_contest(tmp_path / "train.csv", pictures, with_answer=True)
    assert [row["id"] for row in contest.rows if not row["images"]] == ["r0", "r5"]
    assert "2 rows without an image" in contest.summary()


def test_row_numbers_serve_as_ids_and_the_summary_says_so(pictures, tmp_path):
    table(without("id")).to_csv(tmp_path / "train.csv", index=False)
    contest = read_contest(tmp_path / "train.csv", pictures, with_answer=True)
    assert [row["id"] for row in contest.rows] == [str(number) for number in range(ROWS)]
    assert "id: row number" in contest.summary()


@pytest.mark.parametrize(("name", "cell"), [("id", ["r"]), ("question", {"text": "?"}), ("a", ["red"])])
def test_a_list_where_text_belongs_is_refused(name, cell, pictures, tmp_path):
    rows = [standard(row) for row in range(ROWS)]
    rows[3][name] = cell
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 4"):
        read_rows(tmp_path / "train.json", pictures, with_answer=True)


def test_a_test_file_with_blank_answers_is_read(pictures, tmp_path):
    table(lambda row: row | {"answer": ""}).to_csv(tmp_path / "test.csv", index=False)
    assert len(read_rows(tmp_path / "test.csv", pictures)) == ROWS


SAMPLES = {
    "small letters": (lambda i: {"id": i, "answer": "a"}, lambda k, c: "abcd"[k]),
    "another column": (lambda i: {"id": i, "label": "a"}, lambda k, c: "abcd"[k]),
    "capitals": (lambda i: {"Id": i, "Answer": "A"}, lambda k, c: "ABCD"[k]),
    "brackets": (lambda i: {"id": i, "answer": "(A)"}, lambda k, c: f"({'ABCD'[k]})"),
    "numbers from 0": (lambda i: {"id": i, "answer": 0}, lambda k, c: str(k)),
    "blank": (lambda i: {"id": i, "answer": ""}, lambda k, c: "abcd"[k]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_submission_has_the_columns_and_the_form_of_its_sample(name, tmp_path):
    cell, wanted = SAMPLES[name]
    ids = [f"r{row}" for row in range(ROWS)]
    sample = pd.DataFrame([cell(row_id) for row_id in reversed(ids)])
    sample.to_csv(tmp_path / "sample_submission.csv", index=False)
    choices = {f"r{row}": offered(row) for row in range(ROWS)}
    picked = np.arange(ROWS) % 4
    form = read_submission_form(tmp_path / "sample_submission.csv", ids, choices)
    write_submission(tmp_path / "submission.csv", ids, np.eye(4)[picked], form, choices)
    got = pd.read_csv(tmp_path / "submission.csv", dtype=str)
    assert list(got.columns) == list(sample.columns)
    assert list(got.iloc[:, 0]) == ids[::-1]
    assert list(got.iloc[:, 1]) == [wanted(picked[row], offered(row)) for row in reversed(range(ROWS))]


@pytest.mark.parametrize("placeholder", [lambda row: offered(row)[0], lambda row: "red"])
def test_a_submission_of_texts_writes_the_text_of_each_rows_choice(placeholder, tmp_path):
    ids, choices = [f"r{row}" for row in range(ROWS)], {f"r{row}": offered(row) for row in range(ROWS)}
    pd.DataFrame({"id": ids, "answer": [placeholder(row) for row in range(ROWS)]}).to_csv(
        tmp_path / "sample.csv", index=False
    )
    form = read_submission_form(tmp_path / "sample.csv", ids, choices)
    write_submission(tmp_path / "out.csv", ids, np.eye(4)[np.arange(ROWS) % 4], form, choices)
    assert list(pd.read_csv(tmp_path / "out.csv")["answer"]) == [box_colour(row) for row in range(ROWS)]


def test_a_sample_with_a_column_per_choice_gets_the_probabilities_and_keeps_its_other_columns(tmp_path):
    ids = [f"r{row}" for row in range(ROWS)]
    sample = pd.DataFrame({"id": ids, "A": 0.25, "B": 0.25, "C": 0.25, "D": 0.25, "usage": "Public"})
    sample.to_csv(tmp_path / "sample.csv", index=False)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(4), ROWS)
    form = read_submission_form(tmp_path / "sample.csv", ids, {})
    write_submission(tmp_path / "out.csv", ids, probabilities, form)
    got = pd.read_csv(tmp_path / "out.csv", float_precision="round_trip")
    assert list(got.columns) == list(sample.columns) and set(got["usage"]) == {"Public"}
    assert got[list("ABCD")].to_numpy() == pytest.approx(probabilities, abs=0)


@pytest.mark.parametrize("placeholder", ["1", "?", "①"])
def test_a_sample_that_cannot_be_understood_is_shown_and_refused(placeholder, tmp_path):
    ids, choices = [f"r{row}" for row in range(ROWS)], {f"r{row}": offered(row) for row in range(ROWS)}
    pd.DataFrame({"id": ids, "answer": placeholder}).to_csv(tmp_path / "sample.csv", index=False)
    with pytest.raises(UserError, match=f"first rows are: id, answer: r0, {placeholder}.*--answer_form"):
        read_submission_form(tmp_path / "sample.csv", ids, choices).form.write(0, offered(0))
