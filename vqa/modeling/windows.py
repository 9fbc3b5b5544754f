"""The vision tower's attention with equal windows in one call.

transformers runs SDPA over the windows of a batch of images one by one in a Python loop: thousands of tiny kernels. A
window attends only to itself, so windows of one length are a batch, and the result is the same.
"""

from types import MethodType

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

# cu_seqlens -> {length: the patches of all windows of that length}. Every layer of a pass is given one of the same two
# tensors; reading a tensor's lengths makes the host wait for the GPU, so each is read once.
_patches_by_length = WeakTensorKeyDictionary()


def batch_vision_windows(model: torch.nn.Module) -> torch.nn.Module:
    """Let every vision attention layer of a Qwen2.5-VL `model` batch its equal windows. Returns the model."""
    for module in model.modules():
        if isinstance(module, Qwen2_5_VLVisionAttention):
            module.forward = MethodType(_grouped_forward, module)
    return model


def _grouped_forward(self, hidden_states, cu_seqlens, position_embeddings, **kwargs) -> torch.Tensor:
    """Attention of packed windows: hidden_states (patches, width), cu_seqlens (windows + 1,) -> (patches, width)."""
    patches = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(patches, 3, self.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    attended = torch.empty_like(query)
    for length, chosen in patches_by_window_length(cu_seqlens).items():
        batch = [part[chosen].unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value)]
        result = scaled_dot_product_attention(*batch, scale=self.scaling)
        attended[chosen] = result.transpose(1, 2).flatten(0, 1)
    return self.proj(attended.reshape(patches, -1))


def patches_by_window_length(cu_seqlens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Length -> int64 indices of the patches of its windows, for windows that begin and end at cu_seqlens."""
    if cu_seqlens not in _patches_by_length:
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).cpu()
        of_patch = lengths.repeat_interleave(lengths)
        _patches_by_length[cu_seqlens] = {
            length: (of_patch == length).nonzero()[:, 0].to(cu_seqlens.device) for length in of_patch.unique().tolist()
        }
    return _patches_by_length[cu_seqlens]
