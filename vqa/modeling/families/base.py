"""What the project has to know about a model family.

Most of a model needs no entry: its prompt and its images come from its processor (vqa/data/prompt.py and images.py),
its dimensions from its config, its vision tower and decoder from transformers' `get_encoder` and `get_decoder`. A
family fits if transformers' forward accepts image features (`mm_encoder_outputs`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

VISION_IN_16_BITS = ("lm_head", "visual", "model.visual", "model.vision_tower", "model.multi_modal_projector")


@dataclass(frozen=True)
class Family:
    """Where things are in the models of one family. The defaults are those that most families share.

    A pattern is one of `fnmatch`, for the full name of a module within the vision tower; `{last}` is the index of its
    last block.

    model_types: the configs' `model_type`.
    lora_targets: the last parts of the names of the language model's layers that get an adapter.
    not_in_4bit: modules that stay in 16 bits. The list replaces that of bitsandbytes, so it has to name the output
        layer too. "visual" is the tower's name in Qwen's models before transformers 5.
    fp32_layers: patterns for layers whose output exceeds the range of float16 for some images. They compute in
        float32. None where no overflow is known.
    fp32_norms: patterns for the norms that read those outputs.
    bf16_only: why the language model cannot compute in float16; "" where it can.
    template_options: variables of the chat template, such as {"enable_thinking": False}.
    tree_attention: whether every layer attends by the mask and the positions that the forward pass is given, so that
        several suffixes of a row can share its prefix (vqa/modeling/tree_attention.py).
    prepare: called once with the loaded base model, to replace slow parts of it. The outputs must not change.
    """

    model_types: tuple[str, ...]
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    not_in_4bit: tuple[str, ...] = VISION_IN_16_BITS
    fp32_layers: tuple[str, ...] = ()
    fp32_norms: tuple[str, ...] = ()
    bf16_only: str = ""
    template_options: dict[str, bool] = field(default_factory=dict)
    tree_attention: bool = False
    prepare: Callable[[nn.Module], nn.Module] | None = None
