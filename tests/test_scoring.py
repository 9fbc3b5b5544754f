"""The one score against torch, scikit-learn and scipy, and against itself in other batches."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.inference.scoring import score_rows
from vqa.training.validation import letter_metrics


def blind(processor):
    """A collator for stand-ins of the model, which do not look at images."""
    collate = Collator(processor, 140)
    return lambda rows: {key: value for key, value in collate(rows).items() if key != "pixel_values"}


def test_probabilities_are_the_softmax_over_the_offered_letters_at_the_last_position(model, processor, ids, rows):
    rows = [rows[0], {**rows[1], "choices": rows[1]["choices"][:2], "answer": 0}]
    collate = Collator(processor, 140)
    got = score_rows(model, rows, collate, ids, batch_size=2)
    for row, probabilities in zip(rows, got):
        batch = collate([row])
        offered, _ = batch.pop("offered"), batch.pop("ids")
        with torch.no_grad():
            logits = model(**batch).logits[0, -1].double()  # all positions, one row, no padding
        wanted = logits[ids][offered[0]].softmax(-1).numpy()
        assert probabilities[: len(wanted)] == pytest.approx(wanted, abs=1e-5)
        assert (probabilities[len(wanted) :] == 0).all()


@pytest.mark.slow
def test_the_score_does_not_depend_on_the_batch(model, processor, ids, rows):
    collate = Collator(processor, 140)
    scores = [score_rows(model, rows, collate, ids, size) for size in (1, 5, 24)]
    assert np.abs(scores[0] - scores[1]).max() < 1e-5 and np.abs(scores[0] - scores[2]).max() < 1e-5


def test_a_permuted_view_is_mapped_back_to_the_choices(processor, ids, rows):
    """A stand-in that likes the letter of a certain text gives every permutation the same answer."""

    class LikesText(torch.nn.Module):
        def __init__(self, text):
            super().__init__()
            self.text, self.unused = text, torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, logits_to_keep, **inputs):
            logits = torch.zeros(len(input_ids), 1, len(processor.tokenizer))
            for i, tokens in enumerate(input_ids):
                text = processor.tokenizer.decode(tokens)
                letter = text[text.index(f". {self.text}\n") - 1]
                logits[i, 0, ids["abcd".index(letter)]] = 5.0
            return type("Output", (), {"logits": logits})

    row = {**rows[0], "choices": ["one", "two", "three", "four"]}
    permuted = [{**row, "permutation": p} for p in ([0, 1, 2, 3], [1, 2, 3, 0], [3, 1, 0, 2])]
    got = score_rows(LikesText("three"), permuted, blind(processor), ids, 3)
    assert got.argmax(1).tolist() == [2, 2, 2]
    assert got[0] == pytest.approx(got[1]) and got[0] == pytest.approx(got[2])


def test_logits_that_are_not_finite_name_their_rows(processor, ids, rows):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, logits_to_keep, **inputs):
            logits = torch.zeros(len(input_ids), 1, len(processor.tokenizer))
            logits[["unlike" in processor.tokenizer.decode(tokens) for tokens in input_ids]] = float("nan")
            return type("Output", (), {"logits": logits})

    shown = [rows[0], {**rows[1], "question": "Is it unlike the others?"}, rows[2]]
    with pytest.raises(UserError, match=f"1 rows have logits that are not finite: {rows[1]['id']}\\."):
        score_rows(Broken(), shown, blind(processor), ids, 2)


def test_the_model_is_left_in_the_mode_it_was_in(model, processor, ids, rows):
    model.train()
    score_rows(model, rows[:1], Collator(processor, 140), ids, 1)
    assert model.training
    model.eval()


def test_metrics_are_scikit_learns():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 300)
    answers = generator.integers(0, 4, 300)
    padded = np.pad(probabilities, ((0, 0), (0, 6)))
    got = letter_metrics(padded, answers)
    assert got["accuracy"] == pytest.approx(accuracy_score(answers, probabilities.argmax(1)), abs=1e-12)
    assert got["log_loss"] == pytest.approx(log_loss(answers, probabilities, labels=range(4)), abs=1e-9)
