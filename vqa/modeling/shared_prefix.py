"""Score several permutations of a row's choices in one pass: the model reads their common prefix once.

System turn, image and question are the same in every permutation, and they are most of the tokens. They go through
the model once; a batch of the permutations' suffixes then shares their keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vqa.core.compat import select_cache_rows
from vqa.data.collator import Collator
from vqa.data.prompt import render_chat
from vqa.data.rows import Row
from vqa.modeling.positions import token_positions
from vqa.modeling.vision import encode_images, unwrap_base_model

PREFIX_KEYS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
)  # of the Collator's batch, cut off


class PermutationCollator:
    """Turn rows with `permutations` into a batch of their prefixes and one of all their suffixes.

    The batch is that of `collate`, a Collator of prompts, each row cut off where its permutations begin to differ, and
        suffix_ids: int64 (suffixes, tokens), the rest of each permutation of each row, padded on the right: padding
            between prefix and suffix would change the states of linear attention;
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
        for name in (name for name in PREFIX_KEYS if name in batch):
            prefixes = [values[mask][:length] for values, mask, length in zip(batch[name], masks, prefix_lengths)]
            batch[name] = pad(prefixes, tokenizer.pad_token_id if name == "input_ids" else 0, "left")
        return batch | {
            "suffix_ids": pad(suffixes, tokenizer.pad_token_id, "right"),
            "suffix_mask": pad([torch.ones_like(suffix) for suffix in suffixes], 0, "right"),
            "row_index": torch.tensor([i for i, permuted in enumerate(views) for _ in permuted]),
        }

    def prompt(self, row: Row) -> str:
        """The row's prompt as text, its image one token."""
        return render_chat(self.collate.processor, self.collate.conversation(row, decode=False))


def pad(sequences: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side=side)


def common_length(sequences: list[list[int]]) -> int:
    """The number of first tokens that all have in common; at least one token of each is left over."""
    shortest = min(map(len, sequences)) - 1
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def permutation_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Logits float32 (suffixes, vocabulary) at the last token of each suffix of a PermutationCollator's batch."""
    base, row_index = unwrap_base_model(model), batch["row_index"]
    inputs = {name: batch[name] for name in (*PREFIX_KEYS, "image_grid_thw") if name in batch}
    positions = token_positions(base, batch)
    if "pixel_values" in batch or "image_features" in batch:  # rows without an image have none
        inputs["mm_encoder_outputs"] = encode_images(model, batch)["mm_encoder_outputs"]
    cache = DynamicCache(config=base.config.get_text_config())
    model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)

    select_cache_rows(cache, row_index)
    suffix_mask = batch["suffix_mask"]
    last = suffix_mask.sum(1, keepdim=True) - 1
    with head_reads(base, last):
        logits = model(
            input_ids=batch["suffix_ids"],
            attention_mask=torch.cat([batch["attention_mask"][row_index], suffix_mask], dim=1),
            # The prefix ends in text, so its last three coordinates are equal and the suffix continues from them.
            position_ids=positions[..., row_index, -1:] + suffix_mask.cumsum(1),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits[:, 0].float()


@contextmanager
def head_reads(base, columns: torch.Tensor, logits: bool = True) -> Iterator[list[torch.Tensor]]:
    """Let the output layer of `base` read the hidden states at `columns` (rows, columns) of each row, and no others.

    The list that is yielded then holds them. Without `logits` the layer computes none: its output has no columns.
    """
    read: list[torch.Tensor] = []

    def select(head, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        read.append(torch.take_along_dim(inputs[0], columns[..., None], dim=1))
        return (read[0] if logits else read[0][:, :0],)

    hook = base.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield read
    finally:
        hook.remove()
