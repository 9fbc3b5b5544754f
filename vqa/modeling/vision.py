"""The frozen vision tower: run outside of autograd, kept from overflow in fp16, and its features checked."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import linear

from vqa.core.compat import (
    BaseTunerLayer,
    accepts_encoder_outputs,
    as_encoder_outputs,
    dequantized_weight,
    unwrap_parallel,
)
from vqa.core.dtypes import half_autocast
from vqa.core.errors import UserError, preview
from vqa.modeling.families import fp32_vision_layers, vision_tower

# What `get_image_features` of some family reads. The others of a batch's tensors are the language model's.
VISION_KEYS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")


def encode_images(model: nn.Module, batch: dict) -> dict:
    """The batch with `mm_encoder_outputs` in place of its `pixel_values`, or of stored `image_features`.

    Raises UserError where features are not finite.
    """
    if (features := batch.get("image_features")) is not None:
        outputs = as_encoder_outputs(features)
    else:
        counts = batch.get("pixel_rows", batch["num_images"])
        names = [row_id for row_id, number in zip(batch["ids"], counts) for _ in range(number)]
        outputs = {"mm_encoder_outputs": {"image": image_features(model, batch, names)}}
    encoded = ("pixel_values", "pixel_attention_mask", "image_features")
    kept = {key: value for key, value in batch.items() if key not in encoded}
    return kept | outputs


def image_features(model: nn.Module, batch: Mapping[str, torch.Tensor], names: list[str]):
    """What the model's `get_image_features` returns for the VISION_KEYS of a batch; `names` has one for each image.

    A frozen tower runs under `no_grad` and outside gradient checkpointing: no activations are kept, and nothing is
    recomputed. Raises UserError where the features are not finite.
    """
    base = unwrap_base_model(model)
    frozen = is_vision_frozen(base)
    if frozen:
        vision_tower(base).eval()  # keeps transformers from checkpointing its layers
    inputs = {key: batch[key] for key in VISION_KEYS if key in batch}
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen), half_autocast(base):
        output = base.get_image_features(**inputs, return_dict=True)
    finite = torch.stack([features.isfinite().all() for features in output.pooler_output]).tolist()
    if not all(finite):
        # A tower that leaves out the padding among an image's tiles does not tell whose features these are.
        known = len(names) == len(finite)
        bad = [name for name, is_finite in zip(names, finite) if not is_finite] if known else names
        raise UserError(
            f"the image features of {preview(list(dict.fromkeys(bad)))} are not finite: the vision tower overflows in "
            "fp16 for these images. Use a GPU with bf16, or drop the rows."
        )
    return output


def stack_features(output) -> torch.Tensor:
    """(1 + deepstack layers, image tokens of all images, hidden) of what `image_features` returns."""
    return torch.stack([torch.cat(layer) for layer in (output.pooler_output, *output.get("deepstack_features", ()))])


def guard_fp16(model: nn.Module) -> nn.Module:
    """Let the vision tower's layers that overflow fp16 compute in fp32, outside autocast. Returns the model.

    In Qwen2.5-VL the output layer of the last block's MLP does for some images, and the answers turn to NaN
    (ggml-org/llama.cpp#17534, vllm-project/vllm#13817). Weights in fp32 alone do not help, since autocast would still
    compute in fp16. The weights stay as they are: they fit, and a copy in fp32 would cost memory.
    """
    layers, norms = fp32_vision_layers(model)
    for layer in layers:
        layer.forward = MethodType(_linear_in_fp32, layer)
    for norm in norms:
        norm.float()  # autocast on CUDA would do this itself; on a CPU it does not
    return model


def _linear_in_fp32(self: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """Without autocast, and without bitsandbytes' own forward pass, where the layer is in 4 bits."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if self.bias is None else self.bias.float()
        return linear(hidden.float(), dequantized_weight(self).float(), bias)


def is_vision_frozen(model: nn.Module) -> bool:
    """Whether the vision tower is neither trained nor adapted, so that images alone decide its output."""
    tower = vision_tower(unwrap_base_model(model))
    adapted = any(isinstance(module, BaseTunerLayer) for module in tower.modules())
    return not adapted and not any(parameter.requires_grad for parameter in tower.parameters())


def unwrap_base_model(model: nn.Module) -> Any:
    """The base model (a PreTrainedModel) inside DDP and PEFT."""
    model = unwrap_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def check_accepts_features(model: nn.Module) -> None:
    """Stop where the model ignores image features: before 5.20 transformers would train without images."""
    if not accepts_encoder_outputs(model):
        raise UserError(
            f"{type(model).__name__} of the installed transformers does not accept image features; install "
            "transformers 5.20 or newer, and use one of the model families in the README"
        )
