"""Positions of tokens, computed with the batch: by a worker process on the CPU, not by the model on the GPU.

Qwen's models derive them row by row and read each image's grid from the GPU, which then waits for every row.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from vqa.core.compat import position_model, rope_positions
from vqa.data.rows import Row
from vqa.modeling.vision import unwrap_base_model

TOKEN_KEYS = ("input_ids", "mm_token_type_ids")  # of the Collator's batch, with one entry for each token
ROPE_KEYS = (*TOKEN_KEYS, "image_grid_thw")


class PositionCollator:
    """`collate`, whose batches also have `positions`, where the model gives each token several of them.

    positions: int64 (rows, coordinates, tokens), what the model itself would compute. It keeps no reference to the
    model's weights.
    """

    def __init__(self, collate: Callable[[list[Row]], dict], model: nn.Module):
        base = unwrap_base_model(model)
        self.collate = collate
        has_own = hasattr(getattr(base, "model", None), "get_rope_index")
        self.base = SimpleNamespace(model=position_model(base)) if has_own else None

    def __call__(self, rows: list[Row]) -> dict:
        batch = self.collate(rows)
        if self.base and "image_grid_thw" in batch:  # without an image, the model counts tokens
            positions = token_positions(self.base, batch)
            batch["positions"] = positions.transpose(0, 1)  # rows first, as in all tensors of a batch
        return batch


def token_positions(base, batch: dict) -> torch.Tensor:
    """Positions of a batch's tokens, int64 (rows, tokens), or (3, rows, tokens) in time, height and width.

    They are those that a PositionCollator put into the batch, if it did. Suffixes (vqa/modeling/tree_attention.py)
    continue those of their prefix.
    """
    if "positions" in batch:
        return batch["positions"].transpose(0, 1)
    inputs = {name: batch[name] for name in ROPE_KEYS if name in batch}
    if "segment" not in batch:
        return rope_positions(base, inputs | {"attention_mask": batch["attention_mask"]})
    segment = batch["segment"]
    positions = rope_positions(base, inputs | {"attention_mask": (segment == 0).long()})
    column = torch.arange(segment.shape[1], device=segment.device)
    begins = segment.diff(prepend=segment[:, :1] - 1, dim=1) != 0
    in_suffix = column - (column * begins).cummax(1).values
    # The prefix ends in text, so its last token has its largest position, in each coordinate.
    last = positions.masked_fill(segment != 0, 0).amax(-1, keepdim=True)
    return torch.where(segment == 0, positions, last + 1 + in_suffix)
