"""The folds file: stratified, no image on both sides, the same for the same seed, refused where it does not match."""

import json

import numpy as np
import pytest
from conftest import draw_contest

import make_folds
from vqa.core.errors import UserError
from vqa.data.folds import assign_folds, read_folds, split_fold, write_folds
from vqa.data.splits import image_groups

ANSWERS = [i % 4 for i in range(120)]


@pytest.fixture
def groups(tmp_path):
    """The groups of 120 rows, every tenth with a copy of the image of the one before it."""
    rows = []
    for i in range(120):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(str(i - 1 if i % 10 == 9 else i).encode())
        rows.append({"id": str(i), "images": [str(path)]})
    return image_groups(rows)


def test_each_fold_has_its_share_of_every_answer_and_copies_stay_together(groups):
    folds = assign_folds(ANSWERS, groups, 3, 42)
    for fold in range(3):
        assert np.bincount(np.array(ANSWERS)[folds == fold]).tolist() == pytest.approx([10] * 4, abs=2)
    for i in range(9, 120, 10):
        assert folds[i] == folds[i - 1]


def test_the_same_seed_gives_the_same_folds_and_another_gives_others(groups):
    first = assign_folds(ANSWERS, groups, 3, 42)
    assert (first == assign_folds(ANSWERS, groups, 3, 42)).all()
    assert (first != assign_folds(ANSWERS, groups, 3, 43)).any()


def test_what_is_written_is_read_back_whatever_the_order_of_the_ids(tmp_path):
    write_folds(tmp_path / "folds.csv", ["x", "y", "z"], np.array([0, 2, 1]))
    assert read_folds(tmp_path / "folds.csv", ["z", "x", "y"], "train.csv").tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,fold\nx,0\n", "1 ids of train.csv are missing: y"),
        ("id,fold\nx,0\ny,1\nz,1\n", "1 ids are not in train.csv: z"),
        ("id,fold\nx,0\ny,one\n", "whole number"),
        ("id,fold\nx,0\nx,1\n", "twice"),
        ("id,part\nx,0\n", "column fold is missing"),
    ],
)
def test_a_folds_file_that_does_not_match_is_refused(tmp_path, content, message):
    (tmp_path / "folds.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_folds(tmp_path / "folds.csv", ["x", "y"], "train.csv")


def test_a_missing_folds_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="python make_folds.py"):
        read_folds(tmp_path / "folds.csv", ["x"], "train.csv")


def test_a_fold_splits_the_rows_in_two_and_an_unknown_one_is_refused():
    folds = np.array([0, 1, 2, 0, 1])
    train, valid = split_fold(folds, 1, "folds.csv")
    assert train.tolist() == [0, 2, 3] and valid.tolist() == [1, 4]
    with pytest.raises(UserError, match="fold 3 is not in folds.csv, which has folds 0 to 2"):
        split_fold(folds, 3, "folds.csv")


def test_an_answer_too_rare_for_every_fold_stands_in_the_way_of_none(groups, recwarn):
    folds = assign_folds([4] + ANSWERS[1:], groups, 3, 42)
    assert sorted(np.bincount(folds)) == pytest.approx([40] * 3, abs=2) and not recwarn.list


def test_a_broken_test_image_is_told_and_the_folds_are_made_all_the_same(tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        draw_contest(tmp_path / split, 12)
    broken = sorted((tmp_path / "test").rglob("*.jpg"))[0]
    broken.write_bytes(b"no picture")
    args = {"train_csv": str(tmp_path / "train/train.csv"), "test_csv": str(tmp_path / "test/test.csv")}
    (tmp_path / "args.json").write_text(json.dumps(args))
    monkeypatch.setattr("sys.argv", ["make_folds.py", str(tmp_path / "args.json"), "--overwrite"])
    make_folds.main()
    said = capsys.readouterr().out
    assert f"1 image cannot be used: {broken}" in said and "--skip_bad_images" in said
    assert (tmp_path / "train/folds.csv").is_file()


@pytest.mark.parametrize("folds", [0, 1, 31, 500])
def test_impossible_numbers_of_folds_are_refused(groups, folds):
    with pytest.raises(UserError, match="folds cannot"):
        assign_folds(ANSWERS, groups, folds, 42)


def test_again_is_still_read_as_overwrite_and_help_does_not_show_it(capsys):
    assert make_folds.parse_args(["args.json", "--again"]).overwrite
    with pytest.raises(SystemExit):
        make_folds.parse_args(["--help"])
    assert "--again" not in capsys.readouterr().out
