"""What the project has to know about a model family.

Most of a model needs no entry: its chat template, tokenizer and image sizes come from its processor, its dimensions
from its config. A family fits if transformers' forward accepts image features (`mm_encoder_outputs`) and the image
processor resizes to multiples of `patch_size * merge_size`, as those of the Qwen models do.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Where things are in the models of one family. The defaults are those that the Qwen models share.

    Paths are those of `nn.Module.get_submodule`, on the base model unless another module is named.

    model_types: the configs' `model_type`.
    vision_tower: the module that turns patches into image tokens; it has `blocks`.
    language_model: the module that holds the decoder layers.
    lora_targets: regular expression for the full names of the layers that get an adapter. Bare names such as
        `gate_proj` would also match the MLPs of the vision tower.
    not_in_4bit: modules that stay in 16 bits. The list replaces that of bitsandbytes, so it has to name the output
        layer too. "visual" is the tower's name before transformers 5.
    last_vision_projection, last_vision_norm: within the vision tower, the layer whose output exceeds the range of
        float16 for some images, and the norm that reads it. `{last}` is the index of the last block. None where no
        overflow is known.
    prepare: called once with the loaded base model, to replace slow parts of it. The outputs must not change.
    """

    model_types: tuple[str, ...]
    vision_tower: str = "model.visual"
    language_model: str = "model.language_model"
    lora_targets: str = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    not_in_4bit: tuple[str, ...] = ("lm_head", "visual", "model.visual")
    last_vision_projection: str | None = None
    last_vision_norm: str | None = None
    prepare: Callable[[nn.Module], nn.Module] | None = None

    def patch_and_merge_size(self, processor) -> tuple[int, int]:
        """(side of a patch in pixels, side of an image token in patches), as the Collator reads them too."""
        return processor.image_processor.patch_size, processor.image_processor.merge_size
