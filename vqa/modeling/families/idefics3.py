"""Idefics 3 and SmolVLM, which is saved as one. Its processor cuts images into tiles and adds a small overview.

`image_size` bounds the longer side, in tiles (364 pixels): below two tiles the model sees the overview alone.
"""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("idefics3",),
    not_in_4bit=("lm_head", "model.vision_model", "model.connector"),
    tree_attention=True,
)
