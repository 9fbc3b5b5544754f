"""The language model's adapted layers and norms in fewer operations, with the same results up to rounding.

PEFT composes an adapted layer of some twenty small operations, and autograd adds as many: a fast GPU waits for the
host to launch them, a slow one moves memory for nothing. Here each layer is one autograd function, and each norm is
torch's own kernel. Parameters, files and names stay PEFT's and transformers'.
"""

from types import MethodType

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import linear, rms_norm

from vqa.core import compat
from vqa.core.compat import dequantized_weight, native_dropout_backward, rms_norm_epsilon
from vqa.modeling.families import language_model


def fuse_norms(model: nn.Module) -> nn.Module:
    """Give the RMS norms of a base model's language model torch's one kernel in place of six. Returns the model.

    In 16 bits about a quarter of the outputs differ in the last place: transformers rounds before it multiplies by the
    weight, torch after.
    """
    for norm in language_model(model).modules():
        if rms_norm_epsilon(norm) is not None:
            norm.forward = MethodType(_rms_norm, norm)
    return model


def _rms_norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = self.weight  # type: ignore[assignment]
    return rms_norm(hidden, list(weight.shape), weight.to(hidden.dtype), rms_norm_epsilon(self))


def fuse_adapters(model: PeftModel) -> PeftModel:
    """Give every LoRA layer over a plain or 4-bit linear layer the fused forward pass. Returns the model.

    Other layers, such as those of GPTQ, keep PEFT's. So does a layer whose adapter is not a plain one (see
    `plain_adapter`), and one that is guarded against overflow.
    """
    for layer in model.modules():
        if not isinstance(layer, compat.LoraLayer):
            continue
        base = layer.get_base_layer()
        if (type(base) is nn.Linear or compat.is_4bit(base)) and "forward" not in vars(base):
            layer.forward = MethodType(_fused_lora_forward, layer)
    return model


def _fused_lora_forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    name = compat.plain_adapter(self)
    if args or kwargs or name is None:
        return type(self).forward(self, x, *args, **kwargs)
    dropout = self.lora_dropout[name]
    rate = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return FusedLoraLinear.apply(x, a, b, self.get_base_layer(), self.scaling[name], rate)


class FusedLoraLinear(torch.autograd.Function):
    """y = x W' + bias + scaling * dropout(x) A' B', with gradients for x, A and B; the frozen W gets none.

    x (..., in), a (rank, in) and b (out, rank) are rounded to the dtype that the base layer computes in, as autocast
    does; a and b are usually float32. A 4-bit W is unpacked in each pass; y then has x's dtype, as bitsandbytes' does.
    """

    @staticmethod
    def forward(ctx, x, a, b, base: nn.Linear, scaling: float, dropout: float):
        weight = dequantized_weight(base)
        dtype = weight.dtype
        bias = None if base.bias is None else base.bias.to(dtype)
        rows, a_cast, b_cast = x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype), b.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = linear(rows, weight, bias)
            dropped, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
            hidden = dropped @ a_cast.T
            y.addmm_(hidden, b_cast.T, alpha=scaling)
        ctx.save_for_backward(rows, kept, hidden, a_cast, b_cast)
        ctx.base, ctx.scaling, ctx.undo, ctx.dtypes = base, scaling, 1 / (1 - dropout), (x.dtype, a.dtype, b.dtype)
        return y.view(*x.shape[:-1], -1).to(x.dtype if compat.is_4bit(base) else dtype)

    @staticmethod
    def backward(ctx, grad):
        rows, kept, hidden, a, b = ctx.saved_tensors
        grad_y = grad.reshape(-1, grad.shape[-1]).to(rows.dtype)
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
