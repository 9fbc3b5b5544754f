"""Random contests, samples, image files and args: every outcome is right, or a UserError of one line.

`FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py` searches longer, with new examples each time.
"""

import csv
import io
import json
import os
import string
import tempfile
import unicodedata
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqa.config.args_file import read_args_file
from vqa.config.parser import field_names, parse_arguments
from vqa.core.errors import UserError
from vqa.data.answers import FORMS
from vqa.data.images import find_bad_images, open_image, oriented_size
from vqa.data.rows import read_contest
from vqa.data.submission import read_submission_form, write_submission

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
PROPERTIES = 6


def fuzz(share: float = 1.0):
    """Run a test on its part of the examples; the same ones in every run unless more are asked for."""
    return settings(
        max_examples=max(1, int(share * EXAMPLES / PROPERTIES)),
        deadline=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def one_line(error: UserError) -> bool:
    return bool(str(error).strip()) and "\n" not in str(error).strip()


# Texts that people write, and those that break readers.
NASTY = ["NA", "null", "1", "0", "a", "B", "b.", "(c)", '"', "'", "a,b", "x;y", "[1]", "{}", "=1", "\ufeff", "1.0"]
NASTY += ["é", "e\u0301", "가", "\u1100\u1161"]
TEXT = st.one_of(
    st.sampled_from(NASTY), st.text(st.sampled_from(string.printable + "가나é|\u200b"), min_size=1, max_size=9)
)
WORD = TEXT.filter(str.strip)


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


@st.composite
def contests(draw):
    """(rows of (id, question, choices, answer), how they are written)."""
    width = draw(st.integers(2, 6))
    choices = st.lists(WORD, min_size=2, max_size=width, unique_by=plain)
    rows = []
    for number in range(draw(st.integers(1, 5))):
        offered = draw(choices)
        rows.append((f"r{number}", draw(WORD), offered, draw(st.integers(0, len(offered) - 1))))
    width = max(len(offered) for _, _, offered, _ in rows)
    form = {
        "ids": draw(st.sampled_from(["id", "ID", " qid", "번호", None])),
        "question": draw(st.sampled_from(["question", "Question ", "질문"])),
        "choices": draw(st.sampled_from(["a", "A", "option_a", "choice_1", "1", "보기1", "list"])),
        "answer": draw(st.sampled_from(["answer", "Label", "정답"])),
        "kind": draw(st.sampled_from([*FORMS, "LETTER", "(letter)", "letter. text"])),
        "file": draw(st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "semicolon", "bom"])),
    }
    return rows, width, form


def written_answer(kind: str, index: int, choices: list[str]) -> str:
    letter = string.ascii_lowercase[index]
    return {
        "letter": letter,
        "LETTER": letter.upper(),
        "(letter)": f"({letter})",
        "letter. text": f"{letter}. {choices[index]}",
        "number_from_0": str(index),
        "number_from_1": str(index + 1),
        "text": choices[index],
    }[kind]


def write_contest(folder: Path, rows, width: int, form: dict) -> Path:
    """The contest's file in its form, by libraries that are not the project's."""
    style, names = form["choices"], []
    if style != "list":
        first = style[-1]
        names = [style[:-1] + chr(ord(first) + i) for i in range(width)]
    records = []
    for row_id, question, choices, answer in rows:
        cells = {form["ids"]: row_id} if form["ids"] else {}
        cells |= {form["question"]: question}
        offered = dict(zip(names, choices + [""] * (width - len(choices)))) if names else {"choices": choices}
        if not names and form["file"] in ("csv", "tsv", "semicolon", "bom"):
            offered = {"choices": json.dumps(choices)}
        records.append(cells | offered | {form["answer"]: written_answer(form["kind"], answer, choices)})
    table, kind = pd.DataFrame(records), form["file"]
    path = folder / f"train.{'csv' if kind in ('semicolon', 'bom') else kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    else:
        mark = {"tsv": "\t", "semicolon": ";"}.get(kind, ",")
        with open(path, "w", encoding="utf-8-sig" if kind == "bom" else "utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=mark)
            writer.writerows([list(table.columns), *table.to_numpy().tolist()])
    return path


@fuzz()
@given(contests())
def test_a_contest_in_any_form_is_read_as_it_is_meant_or_refused(contest):
    rows, width, form = contest
    with tempfile.TemporaryDirectory() as folder:
        path = write_contest(Path(folder), rows, width, form)
        try:
            got = read_contest(path, with_answer=True, columns={"path": None}).rows
        except UserError as error:
            assert one_line(error) and path.name in str(error)
            return
    assert [(row["question"], row["choices"], row["answer"]) for row in got] == [
        (question, choices, answer) for _, question, choices, answer in rows
    ]
    assert [row["id"] for row in got] == [row[0] if form["ids"] else str(i) for i, row in enumerate(rows)]


MARKS = [
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\t",
    b";",
    b"\0",
    b"\xff",
    b"id",
    b"path",
    b"question",
    b"answer",
    b"a",
    b"b",
    b"[]",
    b"{}",
    b"1",
]


@fuzz()
@given(
    st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]),
    st.lists(st.sampled_from(MARKS), max_size=40),
    st.data(),
)
def test_any_bytes_are_a_table_of_sound_rows_or_refused(kind, marks, data):
    content = b"".join(marks)
    if data.draw(st.booleans()):  # a sound file with damage
        sound = b'id,path,question,a,b,answer\n1,x.jpg,what?,one,two,a\n2,,"why,\nso?",one,two,b\n'
        if kind in ("json", "jsonl"):
            records = list(csv.DictReader(io.StringIO(sound.decode())))
            lines = [json.dumps(record) for record in records]
            sound = (f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines)).encode()
        place = data.draw(st.integers(0, len(sound)))
        content = sound[:place] + content[:6] + sound[place + data.draw(st.integers(0, 4)) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"train.{kind}")
        path.write_bytes(content)
        try:
            rows = read_contest(path, with_answer=True).rows
        except UserError as error:
            assert one_line(error) and path.name in str(error)
            return
    assert len({row["id"] for row in rows}) == len(rows) >= 1
    for row in rows:
        assert row["id"].strip() and row["question"].strip() and 0 <= row["answer"] < len(row["choices"]) >= 2
        assert all(text.strip() for text in row["choices"])
        assert all(Path(image).is_relative_to(folder) for image in row["images"])


@st.composite
def samples(draw):
    """(choices of each row, probabilities, header of the sample, kind of its answers)."""
    count = draw(st.integers(2, 5))
    offered = draw(st.lists(st.lists(WORD, min_size=2, max_size=4, unique_by=plain), min_size=count, max_size=count))
    seed = draw(st.integers(0, 2**16))
    probs = np.zeros((count, 4))
    for row, choices in zip(probs, offered):
        row[: len(choices)] = np.random.default_rng(seed).dirichlet(np.ones(len(choices)))
    kind = draw(st.sampled_from([*FORMS, "LETTER", "(letter)", "probabilities", "blank"]))
    names = draw(
        st.sampled_from(["ABCD", "abcd", ["p_a", "p_b", "p_c", "p_d"], ["prob_1", "prob_2", "prob_3", "prob_4"]])
    )
    return offered, probs, kind, list(names), draw(st.sampled_from(["id", "ID", "row"])), draw(st.booleans())


@fuzz()
@given(samples(), st.randoms(use_true_random=False))
@example(([["\rx", "y"], ["y", "\rx"]], np.eye(4)[[0, 1]], "text", ["A", "B"], "id", False), Random(0))  # unquoted \r
def test_a_submission_is_in_the_form_of_its_sample_or_is_not_written(sample, random):
    offered, probs, kind, names, id_name, extra = sample
    ids = [f"t{i}" for i in range(len(offered))]
    choices, order = dict(zip(ids, offered)), random.sample(ids, len(ids))
    table = pd.DataFrame({id_name: order})
    placeholders = [random.randrange(len(choices[row_id])) for row_id in order]
    if kind == "probabilities":
        for name in names:
            table[name] = 0.25
    else:
        cells = [
            written_answer(kind, i, choices[row_id]) if kind != "blank" else ""
            for i, row_id in zip(placeholders, order)
        ]
        table["answer"] = cells
    if extra:
        table["Usage"] = ["Public"] * len(order)
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "sample.csv"), Path(folder, "submission.csv")
        table.to_csv(path, index=False, quoting=csv.QUOTE_ALL)
        try:
            form = read_submission_form(path, ids, choices)
            write_submission(output, ids, probs, form, choices)
        except UserError as error:
            assert one_line(error) and os.listdir(folder) == ["sample.csv"]
            return
        got = pd.read_csv(output, dtype=str, keep_default_na=False)
        assert list(got.columns) == list(table.columns) and list(got[id_name]) == order
        assert not extra or set(got["Usage"]) == {"Public"}
        for row_id, cells in zip(order, got.to_dict("records")):
            row = probs[ids.index(row_id)]
            if kind == "probabilities":
                assert [float(cells[name]) for name in names] == pytest.approx(row, abs=1e-15)
            else:
                best, kind_ = int(row.argmax()), "letter" if kind == "blank" else kind
                assert plain(cells["answer"]) == plain(written_answer(kind_, best, choices[row_id]))
                assert kind in ("text", "blank") or cells["answer"] == written_answer(kind, best, choices[row_id])


def pictures() -> dict[str, bytes]:
    """One small file of each format; some with EXIF."""
    Image.init()  # registers every format
    image, exif = Image.effect_noise((31, 17), 90), Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, mode, options in (
        ("jpg", "RGB", {"exif": exif}),
        ("png", "RGBA", {"exif": exif}),
        ("png", "P", {}),
        ("webp", "RGB", {"exif": exif}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("tiff", "F", {}),
        ("gif", "L", {}),
        ("bmp", "1", {}),
        *([("avif", "RGB", {})] if "AVIF" in Image.SAVE else []),  # since Pillow 11.3
    ):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, {"jpg": "JPEG"}.get(name, name.upper()), **options)
        files[f"{mode}.{name}"] = buffer.getvalue()
    return files


PICTURES = pictures()
DAMAGE = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6)


@fuzz()
@given(st.sampled_from(sorted(PICTURES)), DAMAGE, st.integers(0, 400), st.booleans())
def test_what_the_check_accepts_the_loader_opens_at_the_size_of_the_header(name, damage, cut, cuts):
    data = bytearray(PICTURES[name])
    for place, value in damage:
        data[place % len(data)] = value
    data = data[: max(1, len(data) - cut)] if cuts else data
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = str(Path(folder, name))
        Path(path).write_bytes(data)
        problems = find_bad_images([{"images": [path]}], "test.csv")
        if problems:
            assert 0 < len(problems[path]) <= 80 and "\n" not in problems[path]
            return
        image = open_image(path)
        assert image.size == oriented_size(path) and image.mode in ("RGB", "RGBA") and min(image.size) > 0


USUAL = st.sampled_from(
    [True, False, None, 0, 1, -1, 2, 16, 0.5, 1e-3, 1e9, "no", "steps", "epoch", "linear", "x", ""]
)
JSON = st.recursive(
    USUAL | st.integers() | st.floats() | st.sampled_from(NASTY),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "id"]), inner, max_size=2),
    max_leaves=3,
)
FIELDS = st.sampled_from([*sorted(field_names()), "fool", "imagesize", "extends"])


@fuzz()
@given(st.dictionaries(FIELDS, USUAL | USUAL | USUAL | JSON, max_size=3))
@example({"ema_decay": None})  # found by this search, like the two below
@example({"dataloader_num_workers": []})
@example({"extends": 3})
def test_any_args_file_gives_sound_arguments_or_one_line(values):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "args.json")
        path.write_text(json.dumps({"model": "checkpoints/tiny", "use_cpu": True, "output_dir": folder} | values))
        try:
            model, data, recipe, resolved = parse_arguments([str(path)], "", trains=False)
        except UserError as error:
            assert one_line(error)
            return
        for field, kinds in (("image_size", int), ("train_csv", str), ("shuffle_choices", bool), ("instruction", str)):
            assert type(getattr(data, field)) is kinds, field
        assert type(model.lora_rank) is int and type(recipe.ema_decay) in (int, float)
        json.dumps(resolved)


@fuzz()
@given(
    st.lists(
        st.sampled_from(["{", "}", "[", "]", ":", ",", '"a"', '"extends"', '"fold"', "1", "null", "\n", "é", "\0"]),
        max_size=12,
    )
)
def test_any_text_is_an_args_file_or_one_line(pieces):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "args.json")
        path.write_text("".join(pieces), encoding="utf-8")
        try:
            assert isinstance(read_args_file(path, {"fold"}), dict)
        except UserError as error:
            assert one_line(error)
