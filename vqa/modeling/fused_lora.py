"""The language model's adapted layers and norms in fewer operations, with the same arithmetic.

PEFT composes an adapted layer out of some twenty small operations, and autograd as many again: a fast GPU waits for
the host to launch them, a slow one moves memory for nothing. Here each layer is one autograd function, and each norm
torch's own kernel. Parameters, files and names stay PEFT's and transformers'.
"""

import os
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import linear, rms_norm

native_dropout_backward = torch.ops.aten.native_dropout_backward


def fuse_norms(model: nn.Module) -> nn.Module:
    """Give the RMS norms of the language model torch's one kernel in place of six. Returns the model."""
    for name, norm in model.named_modules():
        if "language_model" in name and hasattr(norm, "variance_epsilon"):
            norm.forward = MethodType(_rms_norm, norm)
    return model


def _rms_norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.variance_epsilon)


def fuse_adapters(model: nn.Module) -> nn.Module:
    """Give every LoRA layer over a plain or 4-bit linear layer the fused pass. Returns the model.

    A layer goes back to PEFT's own pass where it has no adapter or several active, a variant such as DoRA, or merged
    weights. FSDP, which takes weights away between the passes, keeps PEFT's everywhere.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return model
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear):
            layer.forward = MethodType(_fused_lora_forward, layer)
    return model


def _fused_lora_forward(self: LoraLayer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    active = self.active_adapters
    name = active[0] if len(active) == 1 else None
    plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
    if not plain or name not in self.lora_A:
        return type(self).forward(self, x, *args, **kwargs)
    dropout = self.lora_dropout[name]
    share = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return FusedLoraLinear.apply(x, a, b, self.get_base_layer(), self.scaling[name], share)


class FusedLoraLinear(torch.autograd.Function):
    """y = x W' + bias + scaling * dropout(x) A' B', with gradients for x, A and B; the frozen W gets none.

    x (..., in); a (rank, in) and b (out, rank), as a rule float32, are rounded to the dtype of W, as autocast does.
    Where W is held in 4 bits, each pass unpacks it.
    """

    @staticmethod
    def forward(ctx, x, a, b, base: nn.Linear, scaling: float, dropout: float):
        weight = dequantized_weight(base)
        dtype = weight.dtype
        rows, a_cast, b_cast = x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype), b.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = linear(rows, weight, base.bias)
            seen, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
            hidden = seen @ a_cast.T
            y.addmm_(hidden, b_cast.T, alpha=scaling)
        ctx.save_for_backward(rows, kept, hidden, a_cast, b_cast)
        ctx.base, ctx.scaling, ctx.undo, ctx.dtypes = base, scaling, 1 / (1 - dropout), (x.dtype, a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, kept, hidden, a, b = ctx.saved_tensors
        grad_y = grad.reshape(-1, grad.shape[-1])
        grad_b = (grad_y.T @ hidden).mul_(ctx.scaling)
        grad_hidden = (grad_y @ b).mul_(ctx.scaling)
        grad_a = grad_hidden.T @ (rows if kept is None else native_dropout_backward(rows, kept, ctx.undo))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_hidden @ a
            if kept is not None:
                grad_x = native_dropout_backward(grad_x, kept, ctx.undo)
            grad_x = grad_x.addmm_(grad_y, dequantized_weight(ctx.base)).view(*grad.shape[:-1], -1).to(ctx.dtypes[0])
        return grad_x, grad_a.to(ctx.dtypes[1]), grad_b.to(ctx.dtypes[2]), None, None, None


def dequantized_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight (out, in) in the dtype that the layer computes in, unpacked where it is held in 4 bits."""
    if (state := getattr(layer.weight, "quant_state", None)) is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit  # slow to import, and of use on a GPU alone

    return dequantize_4bit(layer.weight.data, state)
