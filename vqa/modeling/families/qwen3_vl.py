"""Qwen3-VL. Its tower also returns features for deeper decoder layers (deepstack).

Both layers of its vision MLPs were seen to exceed the range of float16 (unslothai/unsloth-zoo#787).
"""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("qwen3_vl",),
    fp32_layers=("blocks.*.mlp.linear_fc?",),
    fp32_norms=("blocks.*.norm?", "merger.norm", "deepstack_merger_list.*.norm"),
    tree_attention=True,
)
