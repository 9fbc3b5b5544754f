"""What text alone guesses: a planted give-away is found, chance is not beaten, an image's rows help each other not."""

import numpy as np
import pytest

from vqa.evaluation.metrics import accuracy
from vqa.reports.text_only_baseline import TextOnlyBaseline

WORDS = [a + b for a in "가나다라마바사" for b in "고노도로모보소오조초코토포호"]
QUESTIONS = ["무슨 색인가요?", "What is on the table?", "몇 개인가요?", "어디에 있나요?"]


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows of two to five random choices, the answer drawn evenly."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        choices = [str(word) for word in random.choice(WORDS, random.integers(2, 6), replace=False)]
        answer = int(random.integers(len(choices)))
        rows.append({"question": QUESTIONS[number % 4], "choices": choices, "answer": answer})
    return rows


def share_right(rows, groups) -> np.ndarray:
    return TextOnlyBaseline(rows).guesses(groups) == np.array([row["answer"] for row in rows])


def test_chance_is_not_beaten_where_nothing_is_given_away():
    rows = make_rows(500)
    right = accuracy(share_right(rows, range(500)))
    assert right.low < np.mean([1 / len(row["choices"]) for row in rows]) < right.high


@pytest.mark.slow
@pytest.mark.parametrize("clue", ["the longest choice", "stands in the question", "letter b", "“정답”"])
def test_a_planted_giveaway_is_found_and_named(clue):
    rows = make_rows(500)
    for row in rows[:350]:
        choices, answer = row["choices"], row["answer"]
        if clue == "the longest choice":
            choices[answer] += f" {choices[answer]}"
        elif clue == "stands in the question":
            row["question"] += f" {choices[answer]}"
        elif clue == "letter b":
            choices[answer], choices[1] = choices[1], choices[answer]
            row["answer"] = 1
        else:
            choices[answer] = "정답"
    order = np.random.default_rng(1).permutation(500)
    rows = [rows[i] for i in order]
    assert accuracy(share_right(rows, range(500))).low > 0.6
    assert clue in [name for name, _ in TextOnlyBaseline(rows).strongest_clues(5)]


def test_rows_of_one_image_do_not_help_each_other():
    rows = make_rows(200)
    copies, images = [row for row in rows for _ in range(3)], np.repeat(np.arange(200), 3)
    assert share_right(copies, np.arange(600)).mean() > 0.6, "a copy in training tells the answer"
    assert accuracy(share_right(copies, images)).low < np.mean([1 / len(row["choices"]) for row in rows]) + 0.02
