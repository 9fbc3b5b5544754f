"""Prediction files, ensembles and submissions."""

import sys

import numpy as np
import pandas as pd
import pytest
from conftest import command, write_csv

from vqa.core.errors import UserError
from vqa.data import predictions
from vqa.data.predictions import is_prediction_file, join, read_predictions, write_predictions
from vqa.data.rows import LETTERS
from vqa.data.submission import read_submission_form, write_submission


def write(path, ids, values):
    rows = [{"id": row_id, "choices": ["x"] * values.shape[1]} for row_id in ids]
    write_predictions(path, rows, np.pad(values, ((0, 0), (0, 10 - values.shape[1]))))
    return path


@pytest.fixture
def stack():
    return np.random.default_rng(0).dirichlet(np.ones(4), (3, 50))


def test_what_is_written_is_read_back_exactly(tmp_path, stack):
    path = write(tmp_path / "p.csv", [f"r{i}" for i in range(50)], stack[0])
    ids, values = read_predictions(path)
    assert ids == [f"r{i}" for i in range(50)]
    assert (values[:, :4] == stack[0]).all() and values.shape == (50, len(LETTERS))
    assert path.read_text().splitlines()[0] == "id,answer,p_a,p_b,p_c,p_d"
    assert list(pd.read_csv(path)["answer"]) == ["abcd"[i] for i in stack[0].argmax(1)]


def test_files_are_joined_by_id_not_by_position(tmp_path, stack):
    ids = [f"r{i}" for i in range(50)]
    turned = np.arange(50)[::-1]
    first = write(tmp_path / "1.csv", ids, stack[0])
    second = write(tmp_path / "2.csv", [ids[i] for i in turned], stack[1][turned])
    joined, values = join([first, second])
    assert joined == ids and (values[1][:, :4] == stack[1]).all()


def test_a_missing_and_an_extra_id_are_named(tmp_path, stack):
    three = write(tmp_path / "3.csv", ["x", "y", "z"], stack[0][:3])
    two = write(tmp_path / "2.csv", ["x", "y"], stack[0][:2])
    with pytest.raises(UserError, match="2.csv: 1 ids of .*3.csv are missing: z"):
        join([three, two])
    with pytest.raises(UserError, match="3.csv: 1 ids are not in .*2.csv: z"):
        join([two, three])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([["x", "a", "0.5", "0.4"]], "sum to 1"),
        ([["x", "a", "nan", "0.4"]], "sum to 1"),
        ([["x", "a", "1.5", "-0.5"]], "sum to 1"),
        ([["x", "a", "much", "0.4"]], "not a number"),
        ([["x", "a", "0.5", "0.5"], ["x", "a", "0.5", "0.5"]], "twice"),
    ],
)
def test_a_file_that_holds_no_probabilities_is_refused(tmp_path, cells, message):
    with pytest.raises(UserError, match=message):
        read_predictions(write_csv(tmp_path / "p.csv", cells, ["id", "answer", "p_a", "p_b"]))


def test_a_submission_follows_the_sample(tmp_path):
    sample = write_csv(tmp_path / "sample.csv", [["z", "a"], ["x", "a"]], ["id", "answer"])
    choices = {name: ["1", "2", "3", "4"] for name in "xyz"}
    form = read_submission_form(sample, ["x", "z"], choices)
    write_submission(tmp_path / "s.csv", ["x", "z"], np.eye(4)[[1, 3]], form, choices)
    assert (tmp_path / "s.csv").read_text() == "id,answer\nz,d\nx,b\n"
    assert not is_prediction_file(tmp_path / "s.csv")
    with pytest.raises(UserError, match="sample.csv: 1 of its ids have no prediction: z"):
        read_submission_form(sample, ["x"], choices)
    with pytest.raises(UserError, match="sample.csv: 1 predicted ids are not in it: y"):
        read_submission_form(sample, ["x", "y", "z"], choices)


@pytest.mark.parametrize("text", ["\ufeffid,answer,p_a,p_b\n", "answer,p_a,note,p_b,id\n", "id,answer,p_a,p_b\r\n"])
def test_both_readers_read_what_people_write(tmp_path, monkeypatch, text):
    """With a byte order mark, other columns and order, CRLF; ids that look like numbers, are NA or hold a newline."""
    path = tmp_path / "p.csv"
    cells = {"answer": "a", "p_a": "0.1", "p_b": "0.9", "note": '"x, y"'}
    names = text.strip("\ufeff\r\n").split(",")
    rows = [",".join(({"id": row_id} | cells)[name] for name in names) for row_id in ("007", "NA", '"a\nb"', "é")]
    end = "\r\n" if text.endswith("\r\n") else "\n"
    path.write_bytes((text + end.join([*rows, ""])).encode())
    assert predictions._read_with_pyarrow(path) is not None
    fast = read_predictions(path)
    monkeypatch.setattr(predictions, "_read_with_pyarrow", lambda path: None)
    slow = read_predictions(path)
    assert fast[0] == slow[0] == ["007", "NA", "a\nb", "é"]
    assert (fast[1] == slow[1]).all() and (fast[1][:, :2] == [0.1, 0.9]).all()


def test_a_file_with_other_choices_is_refused(tmp_path, stack):
    four = write(tmp_path / "4.csv", ["x", "y"], stack[0][:2])
    three = write(tmp_path / "3.csv", ["x", "y"], np.full((2, 3), 1 / 3))
    with pytest.raises(UserError, match="3.csv: it has 3 choices and .*4.csv has 4"):
        join([four, three])
    fewer = write(tmp_path / "f.csv", ["x", "y"], np.array([[0.25] * 4, [0.5, 0.25, 0.25, 0]]))
    full = write(tmp_path / "g.csv", ["x", "y"], np.full((2, 4), 0.25))
    with pytest.raises(UserError, match="1 rows have other choices than in .*g.csv: y"):
        join([full, fewer])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ensemble", "summarize"])
def test_scripts_that_only_read_tables_import_no_model_library(script):
    code = (
        f"import {script}, sys; print(sorted({{'torch', 'transformers', 'datasets', 'sklearn'}} & set(sys.modules)))"
    )
    assert command(sys.executable, "-c", code).stdout == "[]\n"
