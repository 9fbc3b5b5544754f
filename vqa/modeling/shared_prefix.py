"""Score several permutations of a row's choices in one pass: the model reads their common prefix once.

System turn, image and question are the same in every permutation, and they are most of the tokens. They go through
the model once; a batch of the permutations' suffixes then shares their keys and values.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vqa.core.compat import rope_positions, select_cache_rows
from vqa.data.collator import Collator
from vqa.data.prompt import render_chat
from vqa.data.rows import Row
from vqa.modeling.vision import encode_images, unwrap_base_model

PREFIX_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")  # of the Collator's batch, cut off


class PermutationCollator:
    """Turn rows with `permutations` into a batch of their prefixes and one of all their suffixes.

    The batch is that of `collate`, a Collator of prompts, each row cut off where its permutations begin to differ, and
        suffix_ids: int64 (suffixes, tokens), the rest of each permutation of each row, padded on the left;
        suffix_mask: int64 (suffixes, tokens), 0 at that padding;
        row_index: int64 (suffixes,), the row that each belongs to.
    """

    def __init__(self, collate: Collator):
        self.collate = collate

    def __call__(self, rows: list[Row]) -> dict:
        tokenizer = self.collate.processor.tokenizer
        views: list[list[Row]] = [[{**row, "permutation": p} for p in row["permutations"]] for row in rows]
        batch = self.collate([permuted[0] for permuted in views])
        masks = batch["attention_mask"].bool()
        prefix_lengths, suffixes = [], []
        for permuted, mask in zip(views, masks):
            tokens = tokenizer([self.prompt(row) for row in permuted]).input_ids
            shared = common_length(tokens)
            suffixes += [torch.tensor(ids[shared:]) for ids in tokens]
            prefix_lengths.append(int(mask.sum()) - len(tokens[0]) + shared)
        for name in PREFIX_KEYS:
            prefixes = [values[mask][:length] for values, mask, length in zip(batch[name], masks, prefix_lengths)]
            batch[name] = pad_left(prefixes, tokenizer.pad_token_id if name == "input_ids" else 0)
        return batch | {
            "suffix_ids": pad_left(suffixes, tokenizer.pad_token_id),
            "suffix_mask": pad_left([torch.ones_like(suffix) for suffix in suffixes], 0),
            "row_index": torch.tensor([i for i, permuted in enumerate(views) for _ in permuted]),
        }

    def prompt(self, row: Row) -> str:
        """The row's prompt as text, its image one token."""
        return render_chat(self.collate.processor, self.collate.conversation(row, decode=False))


def pad_left(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def common_length(sequences: list[list[int]]) -> int:
    """The number of first tokens that all have in common; at least one token of each is left over."""
    shortest = min(map(len, sequences)) - 1
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def permutation_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Logits float32 (suffixes, vocabulary) at the last position of each suffix of a PermutationCollator's batch."""
    inputs = {name: batch[name] for name in (*PREFIX_KEYS, "image_grid_thw") if name in batch}
    positions = rope_positions(unwrap_base_model(model), inputs)
    if "image_grid_thw" in batch:  # rows without an image have none
        inputs["mm_encoder_outputs"] = encode_images(model, batch)["mm_encoder_outputs"]
    cache = DynamicCache(config=unwrap_base_model(model).config.get_text_config())
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    model(**inputs, position_ids=positions, **options)

    row_index = batch["row_index"]
    select_cache_rows(cache, row_index)
    # The prefix ends in text, so its last three coordinates are equal and the suffix continues from them.
    start = positions[:, row_index, -1:] + 1
    logits = model(
        input_ids=batch["suffix_ids"],
        attention_mask=torch.cat([batch["attention_mask"][row_index], batch["suffix_mask"]], dim=1),
        position_ids=start + (batch["suffix_mask"].cumsum(1) - 1).clamp(min=0),
        **options,
    ).logits
    return logits[:, -1].float()
