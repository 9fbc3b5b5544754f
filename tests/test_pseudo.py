"""Pseudo-labels: which test rows become training rows, as what, and that none of them is validated on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import HEADER, write_csv

from vqa.config.arguments import DataArguments
from vqa.core.errors import UserError
from vqa.data.rows import read_rows
from vqa.data.splits import pseudo_rows

PREDICTIONS = ["id", "answer", "p_a", "p_b", "p_c", "p_d"]


@pytest.fixture
def data(tmp_path, contest, rows) -> DataArguments:
    """Four test rows: two pictures of the training set under other names, and two of its own; three choices in one."""
    cells = []
    for number, row in enumerate(rows[:4]):
        shutil.copy(row["images"][0], tmp_path / f"copy{number}.jpg")
        choices = row["choices"] if number != 2 else [*row["choices"][:3], ""]
        cells.append([row["id"], f"copy{number}.jpg", row["question"], *choices])
    test_csv = write_csv(tmp_path / "test.csv", cells, HEADER[:-1])
    return DataArguments(test_csv=str(test_csv), pseudo_csv=str(tmp_path / "pseudo.csv"), pseudo_min_confidence=0.75)


def predict(data: DataArguments, *lines: tuple) -> None:
    cells = [[name, "abcd"[int(np.argmax(values))], *map(str, values)] for name, *values in lines]
    write_csv(Path(data.pseudo_csv), cells, PREDICTIONS)


SURE = [
    ("row_003", 0.75, 0.25, 0, 0),
    ("row_002", 0.0, 0.125, 0.875, 0),
    ("row_001", 0.25, 0.5, 0.25, 0),
    ("row_000", 0.0, 0.0, 0.0, 1.0),
]


def test_rows_above_the_confidence_are_taken_with_their_probabilities(data, rows, capsys):
    predict(data, *SURE)
    got = pseudo_rows(data, rows[10:14])
    assert [row["id"] for row in got] == ["pseudo row_003", "pseudo row_002", "pseudo row_000"]
    assert [row["answer"] for row in got] == [0, 2, 3]
    assert [row["target"] for row in got] == [[0.75, 0.25, 0, 0], [0, 0.125, 0.875], [0, 0, 0, 1]]
    assert got[0]["question"] == rows[3]["question"] and got[0]["choices"] == rows[3]["choices"]
    assert "3 of 4 rows become training rows" in capsys.readouterr().out


def test_rows_that_show_an_image_of_a_validation_row_are_left_out_and_counted(data, rows, capsys):
    predict(data, *SURE)
    assert [row["id"] for row in pseudo_rows(data, rows[:3])] == ["pseudo row_003"]
    said = capsys.readouterr().out
    assert "1 of 4 rows become training rows" in said and "2 are left out because a validation row has" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("nobody", 1.0, 0, 0, 0), "pseudo.csv: 1 of its ids are not in .*test.csv: nobody"),
        (("row_002", 0, 0, 0.5, 0.5), "1 rows have probabilities of choices that .*test.csv does not offer: row_002"),
        (("row_001", 0.5, 0.5, 0, 0), "no rows with a confidence of 0.75 or more"),
        (("row_001", 0.5, 0.4, 0, 0), "do not sum to 1"),
    ],
)
def test_a_file_that_does_not_fit_the_test_rows_is_refused(data, line, message):
    predict(data, line)
    with pytest.raises(UserError, match=message):
        pseudo_rows(data, [])


def test_training_takes_them_and_validates_on_none(trained, script, tmp_path):
    """The test rows are the training rows: without those whose image is validated on, and a third of the others."""
    folds = pd.read_csv(trained / "data" / "folds.csv")
    lines = [
        [row_id, "a", *(["1", "0", "0", "0"] if number % 3 else ["0.5", "0.5", "0", "0"])]
        for number, row_id in enumerate(folds["id"])
    ]
    csv = write_csv(tmp_path / "pseudo.csv", lines, PREDICTIONS)
    flags = ["--max_steps", "1", "--eval_steps", "1", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    code, said, error = script("train_fold", trained / "args" / "fold0.json", "--pseudo_csv", csv, *flags)
    assert code == 0, error
    expected = sum(fold == 1 and number % 3 > 0 for number, fold in enumerate(folds["fold"]))
    assert 0 < expected < 12 and f"{expected} of 24 rows become training rows" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["train_rows"], metrics["valid_rows"]) == (12 + expected, 12)
    oof = pd.read_csv(tmp_path / "out" / "oof.csv")
    assert sorted(oof["id"]) == sorted(folds["id"][folds["fold"] == 0])
    truth = {row["id"]: row["answer"] for row in read_rows(trained / "data" / "train.csv", with_answer=True)}
    right = [truth[row_id] == "abcd".index(answer) for row_id, answer in zip(oof["id"], oof["answer"])]
    assert metrics["weights"]["raw"]["accuracy"] == pytest.approx(np.mean(right))
