"""The bench contest: the same files each time, answers that follow from the pictures, and no help from the text."""

import random
import sys
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
from bench_base import NOTHING, PROBES, BenchBatches
from bench_contest import FILES, MIX, DrawnRow, main
from bench_scenes import ALPHABET, CONTEST, HOME, KINDS, SIDES, Domain, ask, make_scene
from make_tiny import DrawnBatches  # bench_base makes it importable
from PIL import Image

from vqa.data.images import target_size
from vqa.data.rows import read_rows
from vqa.evaluation.text_only_baseline import TextOnlyBaseline


def draw_contest(folder, monkeypatch, *flags: str) -> dict[str, bytes]:
    """Name -> bytes of every file."""
    command = ["bench_contest.py", "--train_rows", "40", "--test_rows", "20", "--output_dir", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", command)
    main()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_number_of_processes_changes_no_byte_and_the_seed_does(tmp_path, monkeypatch):
    one = draw_contest(tmp_path / "one", monkeypatch, "--workers", "1")
    two = draw_contest(tmp_path / "two", monkeypatch, "--workers", "2")
    other = draw_contest(tmp_path / "other", monkeypatch, "--workers", "2", "--seed", "7")
    assert one == two
    assert one["train.csv"] != other["train.csv"]
    assert set(FILES) < set(one)

    train = read_rows(tmp_path / "one/train.csv", with_answer=True)
    test = read_rows(tmp_path / "one/test.csv")
    assert (len(train), len(test)) == (40, 20)
    for path in {path for row in [*train, *test] for path in row["images"]}:  # every path of the CSVs leads to a file
        with Image.open(path) as image:
            assert image.mode == "RGB" and 224 <= min(image.size) <= max(image.size) <= 280
            assert target_size(*image.size, 252) == image.size  # the native budget loses nothing


@pytest.fixture(scope="module")
def rows() -> dict[str, list[DrawnRow]]:
    """Many rows of each split, without pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench_contest.draw", lambda *_: Image.new("L", (1, 1)))
        return {split: [DrawnRow(split, number, 42, CONTEST) for number in range(1, 1201)] for split in MIX}


def test_five_percent_of_the_labels_are_wrong_in_training_only(rows):
    wrong = {split: np.mean([row.label != row.answer for row in found]) for split, found in rows.items()}
    assert wrong["test"] == 0
    assert wrong["train"] == pytest.approx(0.05, abs=0.02)  # three standard errors of 1,200 rows


def test_the_test_has_more_questions_that_need_resolution(rows):
    kinds = {split: Counter(row.kind for row in found) for split, found in rows.items()}
    assert set(kinds["train"]) == set(kinds["test"]) == set(KINDS)
    for split, found in kinds.items():
        assert [found[kind] / 1200 for kind in KINDS] == pytest.approx(np.array(MIX[split]) / 100, abs=0.04)
    assert all(kinds["test"][kind] > kinds["train"][kind] for kind in ("text", "small"))


def test_one_row_in_fifty_shows_an_earlier_picture(rows):
    for found in rows.values():
        paths = [row.cells[1] for row in found]
        scenes = [row.scene for row in found]
        again = sum(a == b for a, b in zip(scenes, scenes[1:]))
        assert again / 1200 == pytest.approx(0.02, abs=0.012)
        shared = sum(path != "" and path == before for path, before in zip(paths[1:], paths))
        assert 0 < shared < again  # the others are files of their own with the same bytes
        assert paths.count("") / 1200 == pytest.approx(0.05, abs=0.02)


def test_a_copy_of_a_picture_has_its_bytes(rows):
    number = next(
        i
        for i in range(1, 1200)
        if rows["train"][i].scene == rows["train"][i - 1].scene
        and rows["train"][i].image
        and rows["train"][i - 1].image
    )
    first, second = (DrawnRow("train", i, 42, CONTEST) for i in (number, number + 1))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.cells[1] != second.cells[1]


@pytest.mark.parametrize("domain", [HOME, CONTEST])
def test_answers_follow_from_the_scene(domain: Domain):
    """The answer, from the question's text and the scene alone."""
    rng = random.Random(3)
    named = {  # word -> canonical name
        part: {word: name for words in domain.words.values() for name, word in words[part].items()}
        for part in ("colour", "shape")
    }
    for number in range(600):
        kind = KINDS[number % len(KINDS)]
        scene = make_scene(rng, domain, kind)
        question = ask(rng, scene, domain, kind)
        right = question.choices[question.answer]
        assert len(set(question.choices)) == 4
        if kind == "text":
            assert right == scene.code and set(right) <= set(ALPHABET)
        elif kind == "count":
            assert int(right) == len(scene.figures)
        elif kind == "small":
            part = next(part for part in named if right in named[part])
            assert named[part][right] == getattr(scene.badge, part)
        elif kind in ("colour", "shape"):
            other = {"colour": "shape", "shape": "colour"}[kind]
            fits = {getattr(figure, kind) for figure in scene.figures if figure.at == question.looks_at}
            assert fits == {named[kind][right]}
            shown = next(figure for figure in scene.figures if figure.at == question.looks_at)
            assert [getattr(f, other) for f in scene.figures].count(getattr(shown, other)) == 1
        elif kind == "relation":
            shown = next(figure for figure in scene.figures if figure.at == question.looks_at)
            language = next(words for words in domain.words.values() if right in words["shape"].values())
            sides = [side for side in SIDES if language["side"][side] in question.text]
            side = max(sides, key=lambda side: len(language["side"][side]))
            beside = [figure.shape for figure in scene.figures if is_beside(figure, shown, side)]
            assert beside == [named["shape"][right]]


def is_beside(figure, shown, side: str) -> bool:
    """Whether a figure is next to another on that side, by their pixels."""
    x, y = figure.at[0] - shown.at[0], figure.at[1] - shown.at[1]
    along, across = {"left": (-x, y), "right": (x, y), "above": (-y, x), "below": (y, x)}[side]
    return 0 < along < 110 and abs(across) < 20


def test_no_code_stands_out_among_the_choices(rows):
    """Each has as many characters in common with the others as every other, so that nobody picks the middle one."""
    for row in rows["test"]:
        if row.kind == "text":
            codes = row.cells[3:]
            common = [sum(a == b for other in codes for a, b in zip(code, other)) for code in codes]
            assert len(set(common)) == 1, codes


def test_the_text_alone_does_not_give_the_answers_away(rows):
    """Also not where the classifier of the project may learn from a thousand rows."""
    texts = [
        {"question": row.cells[2], "choices": row.cells[3:], "answer": row.answer}
        for row in rows["test"]
        if row.kind != "no_image"
    ]
    found = TextOnlyBaseline(texts).cross_validate(range(len(texts)))
    right = found == [row["answer"] for row in texts]
    kinds = [row.kind for row in rows["test"] if row.kind != "no_image"]
    by_kind = {kind: right[[k == kind for k in kinds]].mean() for kind in set(kinds)}
    assert right.mean() < 0.30, by_kind
    assert max(by_kind.values()) < 0.40, by_kind


@pytest.mark.parametrize("batches", [DrawnBatches, BenchBatches])
def test_a_training_batch_ends_with_the_replies(batches, processor, model):
    """Also the batches of checkpoints/make_tiny.py."""
    batch = batches(processor, model, Namespace(seed=1, steps=1, batch_size=12, contest_share=0.5))[0]
    decode = processor.tokenizer.decode
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        prompt, reply = decode(ids[labels == NOTHING]), decode(labels[labels != NOTHING])
        assert prompt.endswith("<|im_start|>assistant\n")
        assert reply.endswith("<|im_end|>")
        letter = reply.removesuffix("<|im_end|>")
        if "Answer with the letter only." in prompt:
            assert f"\n{letter}. " in prompt
    for row, last, end, token in batch["right_choice"].tolist():  # the hint leads to the choice of the reply's letter
        ids, letter = batch["input_ids"][row].tolist(), batch["labels"][row, last + 1].item()
        line = decode(ids[: end + 1]).rsplit("\n", 1)[1]
        assert line.startswith(f"{decode([letter])}. ")
        assert token in ids[: end + 1]


def test_the_hints_lead_to_what_the_question_is_about(processor, model):
    batch = BenchBatches(processor, model, Namespace(seed=2, steps=1, batch_size=32, contest_share=0.5))[0]
    pictured = (batch["input_ids"] == processor.image_token_id).any(1)
    assert len(batch["images"]) == len(batch["probed"]) == pictured.sum() < 32
    number = pictured.cumsum(0) - 1
    thing = {"text": 3, "small": 2, "relation": 1, "colour": 1, "shape": 1}
    for row, _, key in batch["looks_at"].tolist():
        ids, kind = batch["input_ids"][row], KINDS[batch["kinds"][row]]
        token = key - int((ids == processor.image_token_id).nonzero()[0])
        assert ids[key] == processor.image_token_id
        found = dict(zip(PROBES, batch["probed"][number[row], token].tolist()))
        assert found["thing"] == thing[kind], kind
