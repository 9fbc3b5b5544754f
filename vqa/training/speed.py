"""How long training will take on this GPU: its arithmetic, counted, over the speed of a product timed here."""

import time

import torch

from vqa.modeling.families import vision_tower
from vqa.training.memory import Batch, Setup, layers, linear_parameters, text_config

# A step takes so many times as long as its matrix products alone: attention, norms, dropout, unpacking 4 bits.
# Measured on an H100 with the 3B in 4 bits, batches of 64.
BESIDE_PRODUCTS = 2.8


# Where batches are small it is the host that limits: seconds to launch one layer's kernels, once through. The same
# GPU, batches of 4 and 8.
LAUNCH_SECONDS = 0.005


T4_OPERATIONS = 65e12  # a second, by the T4's data sheet (fp16 on tensor cores): to compare ways, not to tell the time


def seconds_a_batch(setup: Setup, batch: Batch, training: bool, operations_a_second: float) -> float:
    """Seconds of one batch, right within a factor of two or so."""
    products = operations(setup, batch, training) / operations_a_second
    return max(BESIDE_PRODUCTS * products, LAUNCH_SECONDS * layers(setup) * passes(setup, training))


def operations(setup: Setup, batch: Batch, training: bool) -> int:
    """Floating-point operations of a batch's matrix products: two for each weight and token, in each pass.

    Frozen weights have no gradient, so the backward pass costs as much as the forward one; checkpointing runs the
    language model forward once more. The vision tower only runs forward.
    """
    vision = sum(p.numel() for p in vision_tower(setup.model.get_base_model()).blocks.parameters())
    return (
        2 * batch.rows * (passes(setup, training) * batch.tokens * linear_parameters(setup) + batch.patches * vision)
    )


def passes(setup: Setup, training: bool) -> int:
    """How often a batch goes through the language model's layers: forward, backward, and forward for checkpoints."""
    return (3 if setup.checkpointing else 2) if training else 1


def measured_rate(setup: Setup) -> float:
    """Operations a second of this GPU at the language model's largest product, in the model's dtype, at its best."""
    text, dtype = text_config(setup), setup.model.get_base_model().dtype
    tokens = torch.randn(8192, text.hidden_size, device="cuda").to(dtype)
    weight = torch.randn(text.hidden_size, text.intermediate_size, device="cuda").to(dtype)
    seconds = float("inf")
    for _ in range(5):  # the first ones also start CUDA up, and raise the clock
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            tokens @ weight
        torch.cuda.synchronize()
        seconds = min(seconds, (time.perf_counter() - start) / 10)
    return 2 * tokens.numel() * text.intermediate_size / seconds
