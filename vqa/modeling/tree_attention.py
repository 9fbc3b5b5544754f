"""Several suffixes of one prefix in one forward pass, each with the result that it has alone.

A row of the batch is one sequence: `prefix, suffix 1, ..., suffix K`. A token sees the prefix and its own suffix up to
itself (tree attention), and every suffix continues the positions of the prefix. So system turn, image and question
are computed once, also in the backward pass. A KV cache (vqa/modeling/shared_prefix.py) does the same for scoring.
"""

import torch
from torch import nn
from transformers import AutoConfig

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.prompt import render_chat, shown_answer, shown_target
from vqa.data.rows import LETTERS, Row
from vqa.modeling.base_checks import check_model_path
from vqa.modeling.families import FAMILIES, family_of_type
from vqa.modeling.positions import ROPE_KEYS, TOKEN_KEYS, token_positions
from vqa.modeling.shared_prefix import common_length, head_reads, pad
from vqa.modeling.vision import encode_images, unwrap_base_model

ANSWER_TOKENS = 2  # that have a label: the letter and the end of the turn
ALIGNMENT = 8  # SDPA's memory-efficient kernel copies a mask whose rows do not begin at multiples of 8 numbers


def pack_suffixes(batch: dict, prefix_lengths: list[int], suffixes: list[list[list[int]]], pad_token_id: int) -> dict:
    """A Collator's batch with each row cut off after its prefix and followed by its suffixes.

    Args:
        batch: of the Collator, padded on the left.
        prefix_lengths: tokens of each row's prefix, image tokens included; a prefix ends in text.
        suffixes: the token ids of each row's suffixes, without images; rows may have different numbers of them.

    Changed keys: input_ids and mm_token_type_ids (rows, tokens), padded on the right; no attention_mask. New ones:
        segment: int64 (rows, tokens): 0 in the prefix, k in the k-th suffix, -1 at padding;
        suffix_end: int64 (rows, most suffixes), the column of each suffix's last token, -1 where a row has fewer.
    """
    of_tokens = {name: batch[name] for name in TOKEN_KEYS if name in batch}
    packed: dict[str, list[torch.Tensor]] = {name: [] for name in (*of_tokens, "segment", "suffix_end")}
    for i, (length, of_row) in enumerate(zip(prefix_lengths, suffixes)):
        lengths = torch.tensor([length, *map(len, of_row)])
        suffix_ids = torch.tensor([token for ids in of_row for token in ids])
        mask = batch["attention_mask"][i].bool()
        for name, values in of_tokens.items():
            suffix = suffix_ids if name == "input_ids" else torch.zeros_like(suffix_ids)
            packed[name].append(torch.cat([values[i][mask][:length], suffix]))
        packed["segment"].append(torch.arange(len(lengths)).repeat_interleave(lengths))
        packed["suffix_end"].append(lengths.cumsum(0)[1:] - 1)
    padding = {"input_ids": pad_token_id, "segment": -1, "suffix_end": -1}
    kept = {name: values for name, values in batch.items() if name != "attention_mask"}
    return kept | {name: pad(values, padding.get(name, 0), "right") for name, values in packed.items()}


class TreeCollator:
    """Turn rows with `permutations` into a batch of `pack_suffixes`: a suffix for each permutation of the choices.

    The Collator's keys stay, of the first permutation where they differ, except labels and answer_start. New ones:
        read: int64 (rows, permutations, tokens), the columns whose logits are needed: the last of each prompt, and
            with answers that of the letter, which predicts the end of the turn;
    without answers:
        row_index: int64 (all permutations,), the row that each belongs to;
    and with answers:
        labels: int64 (rows, permutations, 2), the token ids of letter and end of the turn;
        answer: int64 (rows, permutations), index of the right letter;
        target: float32 (rows, permutations, letters), if a row has a soft label;
        letter_of: int64 (rows, permutations, letters), the letter at which each choice is shown.
    A row with fewer permutations than another repeats its first one in them; `suffix_end` is -1 there.
    """

    def __init__(self, collate: Collator):
        self.collate = collate

    def __call__(self, rows: list[Row]) -> dict:
        views: list[list[Row]] = [[{**row, "permutation": p} for p in row["permutations"]] for row in rows]
        batch = self.collate([permuted[0] for permuted in views])
        lengths, suffixes, labels = [], [], []
        for permuted, mask in zip(views, batch["attention_mask"]):
            tokens, answers = self.tokens(permuted)
            shared = common_length([ids[: len(ids) - len(answer)] for ids, answer in zip(tokens, answers)])
            unread = max(len(answers[0]) - 1, 0)  # nothing is predicted from what follows the letter
            lengths.append(int(mask.sum()) - len(tokens[0]) + shared)
            suffixes.append([ids[shared : len(ids) - unread] for ids in tokens])
            labels.append([answer[:ANSWER_TOKENS] for answer in answers])
        packed = pack_suffixes(batch, lengths, suffixes, self.collate.processor.tokenizer.pad_token_id)
        before = 1 if self.collate.with_answer else 0
        packed["read"] = packed["suffix_end"][..., None] + torch.arange(-before, 1)
        if not self.collate.with_answer:
            packed["row_index"] = (packed["suffix_end"] >= 0).nonzero()[:, 0]
        else:
            del packed["answer_start"]
            packed["labels"] = repeat_first(labels)
            packed["answer"] = repeat_first([[shown_answer(row) for row in permuted] for permuted in views])
            packed["letter_of"] = repeat_first([[letter_of(row) for row in permuted] for permuted in views])
            if "target" in batch:
                targets = [[shown_target(row) for row in permuted] for permuted in views]
                packed["target"] = repeat_first(targets).float()
        return packed

    def tokens(self, views: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
        """Of each permutation of a row the token ids, its image one token, and those of its answer, if any."""
        collate = self.collate
        letters = [shown_answer(row) if collate.with_answer else None for row in views]
        answers = [[] if letter is None else collate.answers[letter] for letter in letters]
        chats = [collate.conversation(row, decode=False) for row in views]
        texts = [
            render_chat(collate.processor, chat, None if letter is None else LETTERS[letter])
            for chat, letter in zip(chats, letters)
        ]
        return collate.processor.tokenizer(texts).input_ids, answers


def repeat_first(values: list[list]) -> torch.Tensor:
    """A tensor of the lists of all rows, where a shorter list repeats its first entry."""
    most = max(map(len, values))
    return torch.tensor([of_row + of_row[:1] * (most - len(of_row)) for of_row in values])


def letter_of(row: Row) -> list[int]:
    """The letter at which each choice is shown, (10,); those that the row does not offer stay where they are."""
    shown = [*row["permutation"], *range(len(row["permutation"]), len(LETTERS))]
    return sorted(range(len(shown)), key=shown.__getitem__)


def tree_logits(model: nn.Module, batch: dict, columns: torch.Tensor, hidden: bool = False) -> torch.Tensor:
    """Logits float32 (rows, columns, vocabulary) of a batch of `pack_suffixes` at `columns` (rows, columns) alone.

    `hidden`: instead of them the hidden states (rows, columns, hidden) that the output layer would read. What is
    returned for a column of -1 has no meaning.
    """
    base = unwrap_base_model(model)
    inputs = {name: batch[name] for name in ROPE_KEYS if name in batch}
    if "pixel_values" in batch or "image_features" in batch:  # rows without an image have none
        inputs["mm_encoder_outputs"] = encode_images(model, batch)["mm_encoder_outputs"]
    inputs["position_ids"] = token_positions(base, batch)
    inputs["attention_mask"] = tree_mask(batch["segment"], base.dtype)
    with head_reads(base, columns.clamp(min=0), logits=not hidden) as hidden_states:
        output = model(**inputs, use_cache=False).logits
    return (hidden_states[0] if hidden else output).float()


def tree_permutation_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Logits float32 (all permutations, vocabulary) at the last token of each prompt of a TreeCollator's batch."""
    return tree_logits(model, batch, batch["suffix_end"])[batch["suffix_end"] >= 0]


def tree_mask(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What SDPA adds to attention scores, (rows, 1, tokens, tokens): 0 where a token sees another one, else -inf."""
    rows, tokens = segment.shape
    seen = ((segment[:, None] == 0) | (segment[:, None] == segment[..., None])).tril()
    mask = torch.zeros(rows, 1, tokens, tokens + -tokens % ALIGNMENT, dtype=dtype, device=segment.device)
    return mask[..., :tokens].masked_fill_(~seen[:, None], float("-inf"))


def check_tree_attention(model: str, field: str, trust_remote_code: bool = False) -> None:
    """Raise UserError where the model's own attention rules do not allow it; reads the config alone.

    `field` is the argument that needs it.
    """
    check_model_path(model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    of_layers = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if not family_of_type(config.model_type).tree_attention or of_layers != {"full_attention"}:
        able = [kind for kind, family in FAMILIES.items() if family.tree_attention]
        raise UserError(
            f"{field}: the attention of {model} ({config.model_type}) cannot keep several suffixes of a row apart. "
            f"Leave it out, or use a model of type {', '.join(able)}."
        )
