"""Gemma 3. Its processor brings every image to 896 x 896 pixels, 256 tokens. So `image_size` changes little.

Its residual stream exceeds the range of float16 (huggingface/transformers#39972), so it needs a GPU with bf16.
"""

from vqa.modeling.families.base import Family

FAMILY = Family(
    model_types=("gemma3",),
    bf16_only="the hidden states of Gemma 3 exceed its range",
)
