"""Peak GPU memory of a training run, estimated from the model's config before any weight is loaded.

The estimate counts what torch allocates (`torch.cuda.max_memory_allocated`); `benchmarks/memory.py` measures the same
on a GPU, to compare. It follows this project's training: frozen base, float32 adapter, the vision tower under
`no_grad`, logits at the answer alone, SDPA attention.
"""

import re
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vqa.config.arguments import ModelArguments, adapter_options
from vqa.core.compat import adapted_module_names
from vqa.modeling.base_checks import check_model_path
from vqa.modeling.families import patch_embedding, vision_blocks, vision_tower
from vqa.modeling.loading import add_adapter
from vqa.modeling.tree_attention import ANSWER_TOKENS
from vqa.modeling.vision import unwrap_base_model

GIB = 2**30

T4_BYTES = 14.5 * GIB  # usable memory of a 16 GB T4

CUDA_BYTES = 0.6 * GIB  # besides what torch allocates: the CUDA context and fragmentation

# nf4: half a byte; one byte of scale for 64 parameters; one float32 for 256 of those scales.
BYTES_IN_4BIT = 0.5 + 1 / 64 + 4 / (64 * 256)

# Optimiser state per trained parameter, where it is not the two float32 moments of AdamW.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}

LINEAR_CHUNK = 64  # tokens that transformers' linear attention processes together

WORKSPACE_BYTES = 32 * 2**20  # of cuBLAS

# Bytes that live at once within a vision block, for each of its widest layer's outputs: queries and keys are rotated
# in float32, and the MLP has three such outputs and, at the layer that is guarded against overflow, a float32 copy.
VISION_BYTES = 12


@dataclass(frozen=True)
class Setup:
    """What decides the memory besides the batch. `model` has its adapter, on any device: see `meta_model`."""

    model: PeftModel
    load_in_4bit: bool
    checkpointing: bool
    optimizer: str = "adamw_torch_fused"
    averages: int = 2


@dataclass(frozen=True)
class Batch:
    """Number of rows, tokens of each row with padding, and patches of each image (four make an image token).

    With several `permutations` of the choices, a row's tokens are those of all of them, and what they share.
    """

    rows: int
    tokens: int
    patches: int
    permutations: int = 1


def meta_model(args: ModelArguments, dtype: torch.dtype) -> PeftModel:
    """The base model with its adapter on the `meta` device: names and shapes, no weights."""
    check_model_path(args.model)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=args.trust_remote_code)
    return add_adapter(base, **adapter_options(args))


def training_peak(setup: Setup, batch: Batch) -> int:
    """Bytes at the worst moment of an optimiser step.

    That is while the vision tower runs, or at the end of the language model's forward pass: then the checkpoints of
    all layers are kept, plus the logits or the backward pass of one layer.
    """
    share = layers_in_backward(setup) / layers(setup)
    of_layers = layers(setup) * layer_bytes(setup, batch)
    of_layers += linear_attention_layers(setup) * linear_attention_bytes(setup, batch)
    of_layers = int(share * of_layers)
    kept = checkpoint_bytes(setup, batch) if setup.checkpointing else of_layers
    one_layer = layer_bytes(setup, batch) + linear_attention_bytes(setup, batch) if setup.checkpointing else 0
    in_layer = one_layer + backward_bytes(setup, batch)
    logits = logit_bytes(setup, batch)
    if batch.permutations > 1:
        kept += batch.rows * batch.tokens**2 * element(setup)  # the mask
        logits = logit_bytes(setup, batch, positions=ANSWER_TOKENS * batch.permutations)
    return resident_bytes(setup) + max(vision_bytes(setup, batch), kept + max(logits, in_layer))


def validation_peak(setup: Setup, batch: Batch) -> int:
    """Bytes at the worst moment of a validation: no gradients, no kept activations."""
    text, count = text_config(setup), batch.rows * batch.tokens
    mlp = count * (3 * text.hidden_size + 4 * text.intermediate_size) * element(setup) + weight_bytes(setup)
    in_layer = max(mlp, linear_attention_bytes(setup, batch, training=False))
    resident = resident_bytes(setup) - gradient_bytes(setup)
    return resident + max(vision_bytes(setup, batch), in_layer, logit_bytes(setup, batch, positions=1))


def resident_bytes(setup: Setup) -> int:
    """Bytes in use during the whole run."""
    return sum(resident_terms(setup).values())


def resident_terms(setup: Setup) -> dict[str, int]:
    """Bytes in use during the whole run, by name."""
    trained = trained_parameters(setup)
    return {
        "base model": base_bytes(setup),
        "adapter": 4 * trained + element(setup) % 4 * trained,  # float32, and autocast's 16-bit copy
        "gradients": gradient_bytes(setup),
        "optimiser": OPTIMIZER_BYTES.get(setup.optimizer, 8) * trained,
        "averages": setup.averages * 4 * trained,
        "workspace": WORKSPACE_BYTES,
    }


def base_bytes(setup: Setup) -> int:
    """The frozen weights: with load_in_4bit the language model's linear layers in 4 bits, the others in 16 or 32."""
    total = sum(p.numel() for p in setup.model.parameters() if not p.requires_grad)
    quantised = linear_parameters(setup) if setup.load_in_4bit else 0
    return int(quantised * BYTES_IN_4BIT) + (total - quantised) * element(setup)


def gradient_bytes(setup: Setup) -> int:
    """A float32 gradient for each trained parameter."""
    return 4 * trained_parameters(setup)


def checkpoint_bytes(setup: Setup, batch: Batch) -> int:
    """With gradient checkpointing: the hidden state that enters each layer, from the first adapted one on."""
    return layers_in_backward(setup) * batch.rows * batch.tokens * text_config(setup).hidden_size * element(setup)


def layer_bytes(setup: Setup, batch: Batch) -> int:
    """What one decoder layer keeps for its backward pass. Inputs of frozen weights are not kept."""
    text, size = text_config(setup), element(setup)
    hidden, inner = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads * head_size(setup)
    norms = 2 * size * hidden  # their inputs
    attention = 4 * size * heads  # queries, keys and values for every query head, and the output
    mlp = 3 * size * inner  # gate, activated gate, up
    adapter = size * (2 * hidden + inner)  # its branches share inputs; that of the output projection is counted above
    if (
        cast(LoraConfig, setup.model.peft_config["default"]).lora_dropout > 0
    ):  # a byte for each number that was dropped or not
        adapter += sum(m.in_features for m in targets(setup)) // layers_in_backward(setup)
    return batch.rows * batch.tokens * (norms + attention + mlp + adapter)


def linear_attention_bytes(setup: Setup, batch: Batch, training: bool = True) -> int:
    """What a layer of linear attention (Gated DeltaNet) holds beside `layer_bytes`, by transformers' PyTorch code.

    It pads each row to chunks of 64 tokens and works in float32. Counted on a CPU with a profiler: tensors as wide as
    the values, squares of a chunk for each head, and two of the convolution. flash-linear-attention needs far less.
    0 where the model has no such layer.
    """
    if not linear_attention_layers(setup):
        return 0
    text = text_config(setup)
    values = text.linear_num_value_heads * text.linear_value_head_dim
    convolution = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
    squares = (14 if training else 8) * LINEAR_CHUNK * text.linear_num_value_heads
    tokens = -(-batch.tokens // LINEAR_CHUNK) * LINEAR_CHUNK
    return batch.rows * tokens * ((76 if training else 42) * values + squares + 4 * convolution)


def backward_bytes(setup: Setup, batch: Batch) -> int:
    """Besides `layer_bytes`, in a layer's backward pass: three gradients as wide as the MLP, one weight in 16 bits."""
    return 3 * batch.rows * batch.tokens * text_config(setup).intermediate_size * element(setup) + weight_bytes(setup)


def weight_bytes(setup: Setup) -> int:
    """The largest weight after bitsandbytes has dequantised it."""
    text = text_config(setup)
    return text.hidden_size * text.intermediate_size * element(setup) if setup.load_in_4bit else 0


def logit_bytes(setup: Setup, batch: Batch, positions: int = 4) -> int:
    """Logits of the last `positions` (answer, end of turn, line break and the one before), and the loss of them.

    In the model's dtype and in float32; for training also contiguous, as log-probabilities, and their gradient.
    """
    copies = element(setup) + 4 + (3 * 4 if positions > 1 else 0)
    return batch.rows * positions * text_config(setup).vocab_size * copies


def vision_bytes(setup: Setup, batch: Batch) -> int:
    """The vision tower: the input patches and the activations of one block; of all blocks where it is adapted.

    With gradient checkpointing those are the hidden states between the blocks.
    """
    base = unwrap_base_model(setup.model)
    blocks, first = vision_blocks(base), cast(torch.Tensor, patch_embedding(base).weight)
    widest = max(m.out_features for m in blocks.modules() if isinstance(m, nn.Linear))
    per_patch = first[0].numel() * (4 + element(setup))
    block = widest * VISION_BYTES * element(setup) // 2
    if any(p.requires_grad for p in blocks.parameters()):
        kept = len(first) * element(setup) if setup.checkpointing else block
        block += len(blocks) * kept
    return batch.rows * batch.patches * (per_patch + block)


def linear_parameters(setup: Setup) -> int:
    """Weights of the layers that bitsandbytes quantises: all linear ones outside the vision tower and the head."""
    base = unwrap_base_model(setup.model)
    spared = {*vision_tower(base).modules(), base.get_output_embeddings()}
    linear = (m for m in base.modules() if isinstance(m, nn.Linear) and m not in spared)
    return sum(m.weight.numel() for m in linear if not m.weight.requires_grad)


def trained_parameters(setup: Setup) -> int:
    return sum(p.numel() for p in setup.model.parameters() if p.requires_grad)


def targets(setup: Setup) -> list:
    """The layers with an adapter."""
    return [unwrap_base_model(setup.model).get_submodule(name) for name in adapted_module_names(setup.model)]


def text_config(setup: Setup):
    return unwrap_base_model(setup.model).config.get_text_config()


def layers(setup: Setup) -> int:
    return text_config(setup).num_hidden_layers


def layers_in_backward(setup: Setup) -> int:
    """The decoder layers from the first adapted one on; those below have no backward pass and keep nothing.

    All, where the vision tower is adapted: its gradients pass through them.
    """
    if any(p.requires_grad for p in vision_blocks(unwrap_base_model(setup.model)).parameters()):
        return layers(setup)
    numbers = [re.search(r"\.layers\.(\d+)\.", name) for name in adapted_module_names(setup.model)]
    return layers(setup) - min((int(number[1]) for number in numbers if number), default=0)


def linear_attention_layers(setup: Setup) -> int:
    return (getattr(text_config(setup), "layer_types", None) or []).count("linear_attention")


def head_size(setup: Setup) -> int:
    text = text_config(setup)
    return text.to_dict().get("head_dim") or text.hidden_size // text.num_attention_heads


def element(setup: Setup) -> int:
    """Bytes of a number in the dtype that the base model computes in: 2 or 4."""
    return unwrap_base_model(setup.model).dtype.itemsize
