"""Permutations that share a prefix, against each permutation scored separately."""

import itertools

import numpy as np
import pytest
import torch

from vqa.data.collator import Collator
from vqa.inference.scoring import normalize, permutation_probs, score_rows
from vqa.modeling.shared_prefix import PermutationCollator, common_length


def with_permutations(rows):
    """Rows of several shapes: two to four choices, one to six permutations, images of several sizes."""
    shaped = []
    for i, row in enumerate(rows):
        choices = row["choices"][: 2 + i % 3]
        permutations = list(itertools.permutations(range(len(choices))))[: 1 + i % 6]
        question = row["question"] + " 다시 한번 말하면?" * (i % 4)
        shaped.append(
            {**row, "question": question, "choices": choices, "permutations": permutations, "scale": (1.0, 0.7)[i % 2]}
        )
    return shaped


@pytest.mark.slow
def test_every_permutation_has_the_probabilities_that_it_has_alone(model, processor, ids, rows):
    rows, collate = with_permutations(rows[:12]), Collator(processor, 140)
    together = [normalize(probs) for probs in permutation_probs(model, rows, collate, ids, batch_size=5)]
    assert [len(values) for values in together] == [len(row["permutations"]) for row in rows]
    for row, values in zip(rows, together):
        alone = score_rows(model, [{**row, "permutation": p} for p in row["permutations"]], collate, ids, batch_size=3)
        assert np.abs(values - alone).max() < 1e-5
        assert values.sum(1) == pytest.approx(1)


def test_prefix_and_suffix_are_the_tokens_of_each_permutation(processor, rows):
    rows, collate = with_permutations(rows[:7]), Collator(processor, 140)
    batch = PermutationCollator(collate)(rows)
    suffixes = iter(zip(batch["suffix_ids"], batch["suffix_mask"].bool(), batch["row_index"]))
    for i, row in enumerate(rows):
        prefix = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        for permutation in row["permutations"]:
            suffix, mask, row_index = next(suffixes)
            prompt = collate([{**row, "permutation": permutation}])["input_ids"][0]
            assert torch.equal(torch.cat([prefix, suffix[mask]]), prompt) and row_index == i
    longest = max(int(mask.sum()) for mask in batch["suffix_mask"])
    assert batch["suffix_ids"].shape[1] == longest < batch["input_ids"].shape[1]


def test_all_but_the_last_token_can_be_common():
    assert common_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_length([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert common_length([[1, 2, 3]]) == 2
    assert common_length([[5, 2], [1, 2]]) == 0
