"""Qwen2-VL."""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("qwen2_vl",),
    last_vision_projection="blocks.{last}.mlp.fc2",
    last_vision_norm="merger.ln_q",
)
