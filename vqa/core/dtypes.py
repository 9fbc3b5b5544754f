"""The dtype that a GPU computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch

HALF = (torch.float16, torch.bfloat16)


def model_dtype(fp16: bool = False, bf16: bool = False) -> torch.dtype:
    """The dtype that the recipe sets; else bfloat16 from Ampere on, float16 on older GPUs, float32 without a GPU.

    By compute capability: `torch.cuda.is_bf16_supported()` is true on a T4 as well, where bf16 is slow emulation.
    """
    if fp16 or bf16:
        return torch.float16 if fp16 else torch.bfloat16
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if has_bf16() else torch.float16


def has_bf16() -> bool:
    """Whether the GPU itself computes in bf16: Ampere (8.0) and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def half_autocast(model: torch.nn.Module) -> AbstractContextManager:
    """Autocast in the base model's 16-bit dtype, if it has one: the adapter and the guarded layer are in float32."""
    half = next((p for p in model.parameters() if p.dtype in HALF), None)
    return nullcontext() if half is None else torch.autocast(half.device.type, half.dtype)
