"""InternVL 3 and 3.5. Its processor cuts images into tiles (448 x 448 pixels, 256 tokens) and adds a small overview.

`image_size` is the budget of the tiles: 448 gives one, 896 four and the overview.
"""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("internvl",),
    tree_attention=True,
)
