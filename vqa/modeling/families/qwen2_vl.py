"""Qwen2-VL."""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("qwen2_vl",),
    fp32_layers=("blocks.{last}.mlp.fc2",),
    fp32_norms=("merger.ln_q",),
    tree_attention=True,
)
