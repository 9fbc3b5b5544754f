"""Estimated training time: the counted operations divided by the measured speed of a matrix product."""

import time

import torch

from vqa.modeling.families import vision_blocks
from vqa.modeling.vision import unwrap_base_model
from vqa.training.memory import Batch, Setup, layers, layers_in_backward, linear_parameters, text_config

# A step takes this many times as long as its matrix products: attention, norms, dropout, dequantisation.
# Measured on an H100 with the 3B in 4 bits, batches of 64.
BESIDE_PRODUCTS = 2.8

# Small batches are limited by the host: seconds to launch one layer's kernels. Same GPU, batches of 4 and 8.
LAUNCH_SECONDS = 0.005

T4_OPERATIONS = 65e12  # per second, from the data sheet (fp16 tensor cores): good for comparisons, not for times


def seconds_a_batch(setup: Setup, batch: Batch, operations_a_second: float) -> float:
    """Seconds of one batch, within a factor of about two."""
    products = operations(setup, batch) / operations_a_second
    return max(BESIDE_PRODUCTS * products, LAUNCH_SECONDS * layers(setup) * passes(setup))


def operations(setup: Setup, batch: Batch) -> int:
    """Floating-point operations of a batch's matrix products: two for each weight and token, in each pass.

    Frozen weights have no gradient, so the backward pass costs as much as the forward one; checkpointing runs the
    language model forward once more. Below the first adapter, and in the vision tower, there is no backward pass.
    """
    frozen_below = 1 - layers_in_backward(setup) / layers(setup)
    language = linear_parameters(setup) * (passes(setup) - frozen_below * (passes(setup) - 1))
    vision = sum(p.numel() for p in vision_blocks(unwrap_base_model(setup.model)).parameters())
    return int(2 * batch.rows * (batch.tokens * language + batch.patches * vision))


def passes(setup: Setup) -> int:
    """Passes through the language model: forward, backward, and forward again with gradient checkpointing."""
    return 3 if setup.checkpointing else 2


def measured_rate(setup: Setup) -> float:
    """Highest operations per second of this GPU for the language model's largest product, in the model's dtype."""
    text, dtype = text_config(setup), unwrap_base_model(setup.model).dtype
    tokens = torch.randn(8192, text.hidden_size, device="cuda").to(dtype)
    weight = torch.randn(text.hidden_size, text.intermediate_size, device="cuda").to(dtype)
    seconds = float("inf")
    for _ in range(5):  # the first ones also start CUDA and raise the clock
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            tokens @ weight
        torch.cuda.synchronize()
        seconds = min(seconds, (time.perf_counter() - start) / 10)
    return 2 * tokens.numel() * text.intermediate_size / seconds
