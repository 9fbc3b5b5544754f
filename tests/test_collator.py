"""Labels against an oracle of their own: decode what is labelled, and decode the batch around it."""

import copy

import pytest
import torch

from vqa.data.collator import IGNORE, Collator
from vqa.data.rows import LETTERS

QUESTIONS = [
    "무슨 색인가요?",
    "What colour is it?",
    "Is the assistant b red? assistant\nb",
    "답은 b 인가요? " * 20,
]


@pytest.fixture
def batch_rows(rows):
    return [{**rows[i], "question": question} for i, question in enumerate(QUESTIONS)]


def test_only_the_letter_and_the_end_of_turn_are_labelled(processor, batch_rows):
    batch = Collator(processor, 140, with_answer=True)(batch_rows)
    tokenizer = processor.tokenizer
    for row, ids, labels in zip(batch_rows, batch["input_ids"], batch["labels"]):
        assert tokenizer.decode(labels[labels != IGNORE]) == "abcd"[row["answer"]] + "<|im_end|>"
        # The oracle: in the decoded text, what the last assistant turn holds.
        turn = tokenizer.decode(ids).rsplit("<|im_start|>assistant\n", 1)[1]
        assert turn == tokenizer.decode(labels[labels != IGNORE]) + "\n"
        assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])


def test_padding_and_image_tokens_are_never_labelled_and_padding_is_masked(processor, batch_rows):
    batch = Collator(processor, 140, with_answer=True)(batch_rows)
    tokenizer = processor.tokenizer
    image, pad = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|endoftext|>"])
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert (ids == pad).any() and (mask[ids == pad] == 0).all() and (mask[ids != pad] == 1).all()
    assert mask[:, -1].all(), "padding is on the left"
    assert (labels[(ids == image) | (ids == pad)] == IGNORE).all()


def test_every_key_of_the_processor_is_passed_on(processor, batch_rows):
    batch = Collator(processor, 140)(batch_rows)
    processors = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert set(batch) == processors | {"ids", "num_images", "offered"}
    assert batch["image_grid_thw"].prod(1).sum() == len(batch["pixel_values"])


def test_nothing_is_truncated(processor, batch_rows):
    long = [{**batch_rows[0], "question": "긴 질문 " * 2000}]
    ids = Collator(processor, 140)(long)["input_ids"][0]
    assert processor.tokenizer.decode(ids).count("긴 질문") == 2000


def test_rows_are_not_changed(processor, batch_rows):
    before = copy.deepcopy(batch_rows)
    Collator(processor, 140, with_answer=True)(batch_rows)
    assert batch_rows == before


def test_a_shuffled_row_is_labelled_with_the_letter_that_shows_its_answer(processor, rows):
    row = {**rows[0], "permutation": [3, 2, 1, 0]}
    batch = Collator(processor, 140, with_answer=True)([row])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    letter = processor.tokenizer.decode(batch["labels"][batch["labels"] != IGNORE][:1])
    assert f"\n{letter}. {row['choices'][row['answer']]}\n" in text
    assert batch["answer"].tolist() == ["abcd".index(letter)]


def test_a_row_with_fewer_choices_offers_only_their_letters(processor, rows):
    batch = Collator(processor, 140)([{**rows[0], "choices": ["x", "y"]}])
    assert batch["offered"].tolist() == [[True, True] + [False] * (len(LETTERS) - 2)]


def test_the_image_is_resized_once_to_the_budget_and_not_again(processor, rows):
    processor = copy.deepcopy(processor)
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}  # would shrink it once more
    batch = Collator(processor, 140)(rows[:8])
    grids = batch["image_grid_thw"][:, 1:] * 14
    assert (grids.prod(1) <= 140**2).all() and (grids % 28 == 0).all()
    scaled = Collator(processor, 140)([{**row, "scale": 1.5} for row in rows[:8]])
    assert (scaled["image_grid_thw"].prod(1) > batch["image_grid_thw"].prod(1)).all()
