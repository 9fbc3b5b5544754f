"""The text-only baseline: it finds a planted cue, and does not beat chance without one or by an image's other rows."""

import numpy as np
import pytest

from vqa.evaluation.metrics import accuracy
from vqa.evaluation.text_only_baseline import TextOnlyBaseline

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


def correct(rows, groups) -> np.ndarray:
    return TextOnlyBaseline(rows).cross_validate(groups) == np.array([row["answer"] for row in rows])


def test_it_does_not_beat_chance_where_the_text_has_no_cue():
    rows = make_rows(500)
    score = accuracy(correct(rows, range(500)))
    assert score.low < np.mean([1 / len(row["choices"]) for row in rows]) < score.high


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["longest choice", "occurs in the question", "letter b", "“정답”"])
def test_a_planted_cue_is_found_and_named(feature):
    rows = make_rows(500)
    for row in rows[:350]:
        choices, answer = row["choices"], row["answer"]
        if feature == "longest choice":
            choices[answer] += f" {choices[answer]}"
        elif feature == "occurs in the question":
            row["question"] += f" {choices[answer]}"
        elif feature == "letter b":
            choices[answer], choices[1] = choices[1], choices[answer]
            row["answer"] = 1
        else:
            choices[answer] = "정답"
    order = np.random.default_rng(1).permutation(500)
    rows = [rows[i] for i in order]
    assert accuracy(correct(rows, range(500))).low > 0.6
    assert feature in [name for name, _ in TextOnlyBaseline(rows).top_features(5)]


def test_rows_of_one_image_do_not_help_each_other():
    rows = make_rows(200)
    copies, images = [row for row in rows for _ in range(3)], np.repeat(np.arange(200), 3)
    assert correct(copies, np.arange(600)).mean() > 0.6, "a copy in training gives the answer away"
    assert accuracy(correct(copies, images)).low < np.mean([1 / len(row["choices"]) for row in rows]) + 0.02
