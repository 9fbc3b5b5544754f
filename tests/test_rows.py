"""CSV files as people really have them, and what is refused with one line."""

import pytest
from conftest import HEADER, write_csv

from vqa.core.errors import UserError
from vqa.data.rows import read_rows
from vqa.data.splits import rows_fingerprint

ROW = ["r1", "x.jpg", "q?", "one", "two", "three", "four", "c"]


def test_cells_with_commas_quotes_and_line_breaks_arrive_as_they_are(tmp_path):
    question = 'Which "sign", left\nor right?'
    path = write_csv(tmp_path / "t.csv", [["r1", "d/x.jpg", question, "a, b", 'say "x"', "3", "NA", "d"]])
    row = read_rows(path, with_answer=True)[0]
    assert row == {
        "id": "r1",
        "images": [str(tmp_path / "d/x.jpg")],
        "question": question,
        "choices": ["a, b", 'say "x"', "3", "NA"],
        "answer": 3,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, encoding, newline):
    path = tmp_path / "t.csv"
    path.write_bytes(newline.join(["id,path,question,a,b,answer", "1,x.jpg,무엇?,가,나,b", ""]).encode(encoding))
    row = read_rows(path, with_answer=True)[0]
    assert (row["id"], row["question"], row["choices"], row["answer"]) == ("1", "무엇?", ["가", "나"], 1)


def test_blank_last_choices_are_not_offered_and_other_columns_are_ignored(tmp_path):
    path = write_csv(tmp_path / "t.csv", [["r1", "x.jpg", "q", "1", "2", "", " ", "b", "note"]], HEADER + ["source"])
    assert read_rows(path, with_answer=True)[0]["choices"] == ["1", "2"]


def test_ten_choices_are_read(tmp_path):
    header = ["id", "path", "question", *"abcdefghij", "answer"]
    path = write_csv(tmp_path / "t.csv", [["r", "x.jpg", "q", *"0123456789", "j"]], header)
    row = read_rows(path, with_answer=True)[0]
    assert (len(row["choices"]), row["answer"]) == (10, 9)


def test_image_root_replaces_the_folder_of_the_csv(tmp_path):
    path = write_csv(tmp_path / "t.csv", [ROW])
    assert read_rows(path, tmp_path / "other")[0]["images"] == [str(tmp_path / "other" / "x.jpg")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "e"}, "row 1 .id r1.: answer 'e' is not offered"),
        ({"answer": ""}, "1 row without an answer in answer: r1"),
        ({"c": "", "d": "", "answer": "c"}, "answer 'c' is not offered"),
        ({"b": "", "c": "", "d": "", "answer": "a"}, "at least two"),
        ({"b": ""}, "choice b is blank"),
        ({"question": " "}, "the question is empty"),
        ({"id": ""}, "no id"),
        ({"path": "../x.jpg"}, "lead out of"),
        ({"path": "a/../../x.jpg"}, "lead out of"),
        ({"path": "/etc/x.jpg"}, "lead out of"),
        ({"path": "..\\x.jpg"}, "lead out of"),
    ],
)
def test_a_bad_cell_is_named_with_its_row(tmp_path, change, message):
    cells = [change.get(name, cell) for name, cell in zip(HEADER, ROW)]
    with pytest.raises(UserError, match=message) as error:
        read_rows(write_csv(tmp_path / "t.csv", [cells]), with_answer=True)
    assert "\n" not in str(error.value)


def test_all_escaping_paths_are_counted_and_a_few_are_named(tmp_path):
    rows = [[f"r{i}", f"../{i}.jpg", *ROW[2:]] for i in range(5)]
    with pytest.raises(UserError, match="5 image paths.*r0.*r2.*and 2 more"):
        read_rows(write_csv(tmp_path / "t.csv", rows))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("path", "no column for the path"),
        ("question", "no column for the question"),
        ("a", "no columns for the choices"),
        ("b", "no columns for the choices"),
        ("answer", "no column for the answer"),
    ],
)
def test_a_missing_column_is_named(tmp_path, column, message):
    keep = [i for i, name in enumerate(HEADER) if name != column]
    path = write_csv(tmp_path / "t.csv", [[ROW[i] for i in keep]], [HEADER[i] for i in keep])
    with pytest.raises(UserError, match=f"{message}.*header.*id.*columns"):
        read_rows(path, with_answer=True)


def test_a_gap_among_the_choice_columns_is_refused(tmp_path):
    header = ["id", "path", "question", "a", "b", "d", "answer"]
    with pytest.raises(UserError, match="'d' but no 'c'"):
        read_rows(write_csv(tmp_path / "t.csv", [["r", "x", "q", "1", "2", "3", "a"]], header))


def test_rows_are_another_run_by_the_bytes_of_their_images_and_not_by_their_place(tmp_path):
    fingerprints = []
    for folder in ("here", "mount"):
        (tmp_path / folder).mkdir()
        path = write_csv(tmp_path / folder / "t.csv", [ROW])
        fingerprints.append(rows_fingerprint(read_rows(path), []))  # no image yet
        (tmp_path / folder / "x.jpg").write_bytes(b"photo")
        fingerprints.append(rows_fingerprint(read_rows(path), []))
    (tmp_path / "mount" / "x.jpg").write_bytes(b"another photo")
    missing, here, missing_too, mount, replaced = *fingerprints, rows_fingerprint(read_rows(path), [])
    assert here == mount and missing == missing_too and len({missing, here, replaced}) == 3
    assert rows_fingerprint([], read_rows(path)) != replaced, "training and validation rows are not the same"


def test_duplicate_ids_are_named(tmp_path):
    with pytest.raises(UserError, match="1 ids occur twice: r1"):
        read_rows(write_csv(tmp_path / "t.csv", [ROW, ROW]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (",".join(HEADER).encode() + b"\n", "no rows"),
        ("id,path,question,a,b,answer\n1,x.jpg,무엇,가,나,a\n".encode("cp949"), "line 2 is not UTF-8, probably CP949"),
        ("id,path,question,a,b,answer\n1,x.jpg,q,1,2,a\n".encode("utf-16"), "UTF-16"),
        (b"id,path,question,a,b,answer\n1,x.jpg,q,1,2,a,more\n", "row 1 has 7 cells, the header 6"),
        (b"id,path,question,a,b,answer\n1,x.jpg,q,1\n", "row 1 has 4 cells, the header 6"),
        (b'id,path,question,a,b,answer\n1,x.jpg,"q,1,2,a\n', "comma-separated"),
    ],
)
def test_a_file_that_is_no_utf8_table_is_refused_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(path, with_answer=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv: no such file"):
        read_rows(tmp_path / "nowhere.csv")
