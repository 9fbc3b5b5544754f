"""Qwen3.5. Three of four decoder layers are linear attention (Gated DeltaNet); the vision tower is that of Qwen3-VL.

The two projections that decide how much a layer's state keeps and learns (`in_proj_a`, `in_proj_b`) have one output a
head, so they cost nothing in 16 bits. Thinking is off: the template writes an empty thinking block before the answer.
"""

from vqa.modeling.families import qwen3_vl
from vqa.modeling.families.base import Family

LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")

FAMILY = Family(
    model_types=("qwen3_5",),
    lora_targets=Family.lora_targets + LINEAR_ATTENTION,
    not_in_4bit=(*Family.not_in_4bit, "in_proj_a", "in_proj_b"),
    fp32_layers=qwen3_vl.FAMILY.fp32_layers,
    fp32_norms=("blocks.*.norm?", "merger.norm"),
    template_options={"enable_thinking": False},
)
