"""All choice orders of a row at once: what comes before the choices is read once, and every order goes on from there.

System turn, image and question are the same in every order, and they are most of the tokens. They go through the model
once; a batch of the orders' endings then shares their keys and values.
"""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from vqa.data.collator import Collator
from vqa.data.prompt import render_chat
from vqa.modeling.vision import encode_images, unwrap_base_model

PREFIX_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")  # of the Collator's batch, cut off


class PermutationCollator:
    """Turn rows that carry `orders` into a batch of their beginnings and one of all their endings.

    A row's `orders` list several of what `order` is, the choice shown at each letter. The batch is that of `collate`,
    a Collator of prompts, each row cut off where its orders begin to differ, and
        ending_ids: int64 (endings, tokens), the rest of every order of every row, padded on the left;
        ending_mask: int64 (endings, tokens), 0 at that padding;
        row_of: int64 (endings,), the row that each belongs to.
    """

    def __init__(self, collate: Collator):
        self.collate = collate

    def __call__(self, rows: list[dict]) -> dict:
        tokenizer = self.collate.processor.tokenizer
        batch = self.collate([{**row, "permutation": row["permutations"][0]} for row in rows])
        kept, suffixes = [], []
        for row, mask in zip(rows, batch["attention_mask"]):
            texts = [self.text({**row, "permutation": order}) for order in row["permutations"]]
            tokens = tokenizer(texts).input_ids
            shared = common_length(tokens)
            suffixes += [torch.tensor(ids[shared:]) for ids in tokens]
            kept.append(int(mask.sum()) - len(tokens[0]) + shared)
        rows_tokens = batch["attention_mask"].bool()
        for name in PREFIX_KEYS:
            cut = [values[real][:length] for values, real, length in zip(batch[name], rows_tokens, kept)]
            batch[name] = left_padded(cut, tokenizer.pad_token_id if name == "input_ids" else 0)
        return batch | {
            "suffix_ids": left_padded(suffixes, tokenizer.pad_token_id),
            "suffix_mask": left_padded([torch.ones_like(suffix) for suffix in suffixes], 0),
            "row_index": torch.tensor([i for i, row in enumerate(rows) for _ in row["permutations"]]),
        }

    def text(self, row: dict) -> str:
        return render_chat(self.collate.processor, self.collate.conversation(row, decode=False))


def left_padded(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value, padding_side="left")


def common_length(sequences: list[list[int]]) -> int:
    """How many first tokens all have in common, at least one of each left out."""
    shortest = min(map(len, sequences)) - 1
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def permutation_logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits (endings, vocabulary), float32, at the last position of every order of an OrdersCollator's batch."""
    inputs = {name: batch[name] for name in (*PREFIX_KEYS, "image_grid_thw") if name in batch}
    inputs["position_ids"], _ = unwrap_base_model(model).model.get_rope_index(**inputs)
    if "image_grid_thw" in batch:  # rows without an image have none
        inputs["mm_encoder_outputs"] = encode_images(model, batch)["mm_encoder_outputs"]
    cache = DynamicCache(config=unwrap_base_model(model).config.get_text_config())
    model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

    row_index = batch["row_index"]
    cache.batch_select_indices(row_index)
    # Positions go on from the last one of the beginning, which is text, so its three coordinates are the same.
    start = inputs["position_ids"][:, row_index, -1:] + 1
    return (
        model(
            input_ids=batch["suffix_ids"],
            attention_mask=torch.cat([batch["attention_mask"][row_index], batch["suffix_mask"]], dim=1),
            position_ids=start + (batch["suffix_mask"].cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        .logits[:, -1]
        .float()
    )
