"""Qwen2.5-VL, and a faster form of its vision tower's window attention.

transformers calls SDPA for one window of the batch's images after another: thousands of tiny kernels. A window attends
only to itself, so windows of the same length can form a batch, with the same result.
"""

from types import MethodType

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from vqa.core.compat import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision
from vqa.modeling.families.base import Family

# cu_seqlens -> {length: the patches of all windows of that length}. The layers of a forward pass
# use two such tensors. Reading the lengths makes the host wait for the GPU, so each tensor is read once.
_patches_by_length = WeakTensorKeyDictionary()


def batch_vision_windows(model: nn.Module) -> nn.Module:
    """Let every vision attention layer of `model` batch its windows of equal length. Returns the model."""
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLVisionAttention):
            module.forward = MethodType(_batched_forward, module)  # type: ignore[method-assign]
    return model


def _batched_forward(self, hidden_states, cu_seqlens, position_embeddings, **kwargs) -> torch.Tensor:
    """Attention of packed windows: hidden_states (patches, width), cu_seqlens (windows + 1,) -> (patches, width)."""
    patches = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    attended = torch.empty_like(query)
    for length, index in patches_by_window_length(cu_seqlens).items():
        q, k, v = (heads[index].unflatten(0, (-1, length)).transpose(1, 2) for heads in (query, key, value))
        result = scaled_dot_product_attention(q, k, v, scale=self.scaling)
        attended[index] = result.transpose(1, 2).flatten(0, 1)
    return self.proj(attended.reshape(patches, -1))


def patches_by_window_length(cu_seqlens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Length -> int64 indices of the patches in windows of that length; windows begin and end at cu_seqlens."""
    if cu_seqlens not in _patches_by_length:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).cpu()
        of_patch = lengths.repeat_interleave(lengths)
        _patches_by_length[cu_seqlens] = {
            length: (of_patch == length).nonzero()[:, 0].to(cu_seqlens.device) for length in of_patch.unique().tolist()
        }
    return _patches_by_length[cu_seqlens]


FAMILY = Family(
    model_types=("qwen2_5_vl",),
    fp32_layers=("blocks.{last}.mlp.down_proj",),
    fp32_norms=("merger.ln_q",),
    tree_attention=True,
    prepare=batch_vision_windows,
)
