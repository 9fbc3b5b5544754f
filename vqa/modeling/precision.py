"""What makes 16 bits safe and quick on a T4, which has neither bf16 nor kernels for grouped queries."""

from types import MethodType

import torch
from torch.nn.functional import linear
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vqa.core.dtypes import has_bf16
from vqa.modeling.families import last_vision_projection


def guard_fp16(model: torch.nn.Module) -> torch.nn.Module:
    """Keep the output layer of the last vision block's MLP in fp32, outside autocast. Returns the model.

    In Qwen2.5-VL it overflows fp16 for some images, and the answers turn to NaN (ggml-org/llama.cpp#17534,
    vllm-project/vllm#13817). Weights in fp32 alone do not help, since autocast would compute in fp16 all the same.
    """
    if end := last_vision_projection(model):
        projection, norm = end
        projection.float().forward = MethodType(_in_fp32, projection)
        norm.float()  # CUDA's autocast would do so by itself; a CPU's does not
    return model


def _in_fp32(self: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden.float(), self.weight, self.bias)


def _sdpa_expanded(module, query, key, value, attention_mask, **kwargs):
    """SDPA with keys and values repeated for every query head, never by `enable_gqa`.

    Before Ampere that flag leaves SDPA only its math kernel, which materialises the attention matrix.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    return sdpa_attention_forward(_Ungrouped(module), query, key, value, attention_mask, **kwargs)


class _Ungrouped:
    """An attention module as sdpa_attention_forward sees it when no heads are left to repeat."""

    def __init__(self, module: torch.nn.Module):
        self.is_causal = getattr(module, "is_causal", True)
        self.training = module.training


AttentionInterface.register("sdpa_expanded", _sdpa_expanded)


AttentionMaskInterface.register("sdpa_expanded", sdpa_mask)


def attention_for_device() -> str:
    """transformers' name of the attention to load a model with."""
    return "sdpa_expanded" if torch.cuda.is_available() and not has_bf16() else "sdpa"
