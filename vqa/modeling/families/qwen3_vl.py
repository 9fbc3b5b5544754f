"""Qwen3-VL. Its tower also returns features for deeper decoder layers (deepstack)."""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("qwen3_vl",),
    last_vision_projection="blocks.{last}.mlp.linear_fc2",
    last_vision_norm="merger.norm",
)
