"""Orders that share their beginning, against each order on its own."""

import itertools

import numpy as np
import pytest
import torch

from vqa.data.collator import Collator
from vqa.inference.scoring import normalize, permutation_probs, score_rows
from vqa.modeling.shared_prefix import PermutationCollator, common_length


def with_orders(rows):
    """Rows of several shapes: two to four choices, one to six orders, images of several sizes."""
    shaped = []
    for i, row in enumerate(rows):
        choices = row["choices"][: 2 + i % 3]
        orders = list(itertools.permutations(range(len(choices))))[: 1 + i % 6]
        question = row["question"] + " 다시 한번 말하면?" * (i % 4)
        shaped.append(
            {**row, "question": question, "choices": choices, "permutations": orders, "scale": (1.0, 0.7)[i % 2]}
        )
    return shaped


def test_every_order_has_the_probabilities_that_it_has_alone(model, processor, ids, rows):
    rows, collate = with_orders(rows[:12]), Collator(processor, 140)
    together = [normalize(shares) for shares in permutation_probs(model, rows, collate, ids, batch_size=5)]
    assert [len(values) for values in together] == [len(row["permutations"]) for row in rows]
    for row, values in zip(rows, together):
        alone = score_rows(
            model, [{**row, "permutation": order} for order in row["permutations"]], collate, ids, batch_size=3
        )
        assert np.abs(values - alone).max() < 1e-5
        assert values.sum(1) == pytest.approx(1)


def test_beginning_and_ending_are_the_tokens_of_each_order(processor, rows):
    rows, collate = with_orders(rows[:7]), Collator(processor, 140)
    batch = PermutationCollator(collate)(rows)
    endings = iter(zip(batch["suffix_ids"], batch["suffix_mask"].bool(), batch["row_index"]))
    for i, row in enumerate(rows):
        beginning = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        for order in row["permutations"]:
            ending, real, row_index = next(endings)
            whole = collate([{**row, "permutation": order}])["input_ids"][0]
            assert torch.equal(torch.cat([beginning, ending[real]]), whole) and row_index == i
    longest = max(int(mask.sum()) for mask in batch["suffix_mask"])
    assert batch["suffix_ids"].shape[1] == longest < batch["input_ids"].shape[1]


def test_all_but_the_last_token_can_be_common():
    assert common_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_length([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert common_length([[1, 2, 3]]) == 2
    assert common_length([[5, 2], [1, 2]]) == 0
