"""Other wordings of a question: by rule, by column, and one of them an epoch."""

import importlib.util
import re
import sys
from collections import Counter

import pandas as pd
import pytest
from conftest import HEADER, ROOT, write_csv

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.data.paraphrases import RULES, paraphrases
from vqa.data.rows import read_rows
from vqa.data.splits import rows_fingerprint
from vqa.training.batching import count_tokens
from vqa.training.dataset import TrainDataset

EXPECTED = {  # written by hand; the first wording of each
    "자동차는 무슨 색인가요?": "자동차의 색깔은 무엇인가요?",
    "남자가 입은 옷은 어떤 색입니까?": "남자가 입은 옷의 색깔은 무엇인가요?",
    "별의 색은 무엇인가요?": "별은 무슨 색인가요?",
    "자동차의 색깔은 무엇인가요?": "자동차는 무슨 색인가요?",
    "사진에서 고양이는 어디에 있나요?": "사진에서 고양이의 위치는 어디인가요?",
    "사진에서 별의 위치는 어디입니까?": "사진에서 별은 어디에 있나요?",
    "사진 속 상자의 색깔은?": "사진 속 상자의 색깔은 무엇인가요?",
    "이 사진을 찍은 장소는?": "이 사진을 찍은 장소는 어디인가요?",
    "상자에 칠한 색을 고르세요.": "상자에 칠한 색은 무엇인가요?",
    "상자가 있는 위치를 고르시오.": "상자가 있는 위치는 어디인가요?",
    "이것은 무슨 동물인가요?": "이것은 어떤 동물인가요?",
    "도형은 모두 몇 개인가요?": "도형은 몇 개인가요?",
    "사과가 몇 개 보이나요?": "사과가 모두 몇 개 보이나요?",
    "이 건물은 무엇입니까?": "이 건물은 무엇인가요?",
    "여자는 무엇을 하고 있나요?": "여자는 무엇을 하고 있습니까?",
    "여자는 무엇을 하나요?": "여자는 무엇을 합니까?",
    "무엇이 보이나요?": "무엇이 보입니까?",
    "What colour is the star?": "What is the colour of the star?",
    "What color are the cars?": "What is the color of the cars?",
    "Pick the colour of the box.": "What is the colour of the box?",
    "How many people are there in the picture?": "What is the number of people in the picture?",
    "How many shapes do you see?": "How many shapes are there?",
    "Where is the cat?": "What is the location of the cat?",
    "What animal is in the photo?": "Which animal is in the photo?",
    "Who is in the photo?": "Who is in the picture?",
}
ALONE = [  # another wording would ask for something else, or be no language
    "Where is the photo taken?",
    "What is the man holding?",
    "Who is in the photo on the wall?",
    "이것은 바나나요?",
    "알맞은 것을 모두 골라 보세요.",
    "종이에 그린 도형을 세어 보세요.",
    "이 버스는 최대 몇 명까지 탈 수 있을까요?",
    "3 + 4 = ?",
]


@pytest.mark.parametrize("question", EXPECTED)
def test_a_question_is_asked_in_other_words(question):
    assert paraphrases(question)[0] == EXPECTED[question]


@pytest.mark.parametrize("question", ALONE)
def test_a_question_that_no_rule_fits_is_left_alone(question):
    assert paraphrases(question) == []


def test_particles_go_by_the_last_sound():
    assert paraphrases("책의 색은 무엇인가요?")[0].startswith("책은 ")
    assert paraphrases("TV의 색은 무엇인가요?")[0] == "TV의 색은 무엇입니까?"  # which particle cannot be told


def test_wordings_differ_from_each_other_and_every_rule_is_used():
    used = set()
    more = ["이 이미지에서 고양이를 찾아 보세요.", "What kind of fruit is in the image?", "Name the type of fruit."]
    for question in [*EXPECTED, *EXPECTED.values(), *more]:
        found = paraphrases(question)
        assert question not in found and len(found) == len(set(found))
        used |= {pattern for pattern, _ in RULES if re.fullmatch(pattern, question)}
    assert [pattern for pattern, _ in RULES if pattern not in used] == []


@pytest.fixture
def reworded() -> list[dict]:
    return [
        {"id": f"r{i}", "question": "q", "paraphrases": ["q1", "q2"], "choices": list("wxyz"), "answer": 0}
        for i in range(300)
    ]


def test_one_wording_is_drawn_an_epoch_by_seed_row_and_epoch_alone(reworded):
    drawn, alone = (
        TrainDataset(reworded, True, 42),
        TrainDataset([{**row, "paraphrases": []} for row in reworded], True, 42),
    )
    epochs = []
    for epoch in (0, 1, 0):
        drawn.epoch.fill_(epoch)
        alone.epoch.fill_(epoch)
        epochs.append([drawn[i]["question"] for i in reversed(range(300))][::-1])
        assert [drawn[i]["permutation"] for i in range(300)] == [alone[i]["permutation"] for i in range(300)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert set(Counter(epochs[0]).keys()) == {"q", "q1", "q2"}
    assert all(70 < times < 130 for times in Counter(epochs[0]).values())  # 100 each, within four standard deviations
    assert {TrainDataset(reworded, False, 42)[i]["question"] for i in range(300)} == {"q", "q1", "q2"}
    assert epochs[0] != [TrainDataset(reworded, True, 43)[i]["question"] for i in range(300)]


def test_columns_of_wordings_are_read_and_tell_a_run_from_another(tmp_path):
    cells = [["r1", "x.jpg", "q?", "other?", " ", "one", "two", "three", "", "c"]]
    header = [*HEADER[:3], "question_1", "question_2", *HEADER[3:]]
    (row,) = read_rows(write_csv(tmp_path / "t.csv", cells, header), with_answer=True)
    assert row["paraphrases"] == ["other?"] and row["choices"] == ["one", "two", "three"]
    assert rows_fingerprint([row], []) != rows_fingerprint([{**row, "paraphrases": ["another?"]}], [])


def test_the_longest_wording_counts_for_the_length_of_a_row(rows, processor):
    collate, long = Collator(processor, 112, with_answer=True), "In this picture, what is the colour of the box?"
    several = [{**rows[0], "question": "q?", "paraphrases": [long, "other?"]}, {**rows[1], "paraphrases": []}]
    alone = [{**rows[0], "question": long}, rows[1]]
    sizes = oriented_sizes(all_images(several))
    got = count_tokens(several, collate, sizes, show=False).tokens.tolist()
    assert got == [int(collate([row])["attention_mask"].sum()) for row in alone]


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("paraphrase", ROOT / "data" / "paraphrase.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["paraphrase.py", *map(str, args)])
        module.main()

    return call


def test_the_tool_writes_a_csv_that_training_reads(tmp_path, tool, capsys):
    questions = ["자동차는 무슨 색인가요?", "3 + 4,\n= ?", "Where is the cat?"]
    path = write_csv(tmp_path / "train.csv", [[f"r{i}", "x.jpg", q, *"wxyz", "a"] for i, q in enumerate(questions)])
    tool(path, "--num_paraphrases", "2")
    assert "2 of 3 questions have paraphrases, 3 in total" in capsys.readouterr().out
    written = tmp_path / "train_paraphrased.csv"
    rows = read_rows(written, with_answer=True)
    assert [row["question"] for row in rows] == questions
    assert [row["paraphrases"] for row in rows] == [paraphrases(question)[:2] for question in questions]
    before, after = (pd.read_csv(file, dtype=str) for file in (path, written))
    pd.testing.assert_frame_equal(before, after[before.columns])
    with pytest.raises(UserError, match="already has a column question_1"):
        tool(written)


def test_the_flag_of_the_last_release_still_works_and_help_does_not_show_it(tmp_path, tool, capsys):
    path = write_csv(tmp_path / "train.csv", [["r", "x.jpg", "자동차는 무슨 색인가요?", *"wxyz", "a"]])
    tool(path, "--most", "1")
    assert list(pd.read_csv(tmp_path / "train_paraphrased.csv").columns) == [*HEADER[:3], "question_1", *HEADER[3:]]
    with pytest.raises(SystemExit):
        tool("--help")
    assert "--most" not in capsys.readouterr().out
