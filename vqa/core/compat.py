"""The internals of transformers, accelerate, PEFT, bitsandbytes and torch that this project uses, in one place.

Any minor release may change them, so no other module imports them. tests/test_compat.py has a test per item: when an
upgrade breaks one, its name says which. Two helpers that accelerate documents, `broadcast_object_list` and
`gather_object`, are tested there too; vqa/core/distributed.py imports them itself, to stay quick to import.
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer as LoraLayer  # its forward pass is replaced by the fused one
from peft.tuners.tuners_utils import BaseTunerLayer as BaseTunerLayer  # any layer that carries an adapter
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.hf_argparser import string_to_bool as string_to_bool  # how HfArgumentParser reads `--fp16 true`
from transformers.integrations import integration_utils
from transformers.integrations.sdpa_attention import repeat_kv as repeat_kv  # one key and value head per query head
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface  # registers a mask function
from transformers.masking_utils import sdpa_mask as sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftModel
    from transformers import DynamicCache, PretrainedConfig, Trainer

Qwen2_5_VLVisionAttention = modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention  # replaced by one that batches windows
apply_rotary_pos_emb_vision = modeling_qwen2_5_vl.apply_rotary_pos_emb_vision
native_dropout_backward = torch.ops.aten.native_dropout_backward  # for a hand-written backward pass
foreach_lerp_ = torch._foreach_lerp_  # moves a list of averages in one kernel, as torch.optim.swa_utils does

INTEGRATION_TO_CALLBACK = integration_utils.INTEGRATION_TO_CALLBACK  # its keys are the values of `report_to`
get_available_reporting_integrations = integration_utils.get_available_reporting_integrations  # the installed ones

# Methods of Trainer that FoldTrainer overrides, and their parameters.
TRAINER_METHODS = {
    "_build_accelerator_args": "**kwargs",  # returns Accelerator's arguments, with `kwargs_handlers` among them
    "_get_train_sampler": "train_dataset",  # returns the sampler of the training rows
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",  # all are keywords
    "_save_checkpoint": "model trial",  # writes checkpoint-<global_step>
    "get_batch_samples": "epoch_iterator num_batches device",  # returns a step's batches, and what to divide by
    "training_step": "model inputs num_items_in_batch",  # forward and backward pass of one batch
}


def initial_global_step(trainer: Trainer) -> int:
    """The step at which the last call of `train()` began: 0, or that of the checkpoint it resumed."""
    return trainer._initial_global_step


def unwrap_parallel(model: nn.Module) -> Any:
    """The model inside DDP. accelerate's own function looks through all modules, in each of a step's many calls."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, wrappers) else model


def first_repeated_row(num_rows: int, batch_size: int, num_processes: int, rank: int) -> int:
    """Where the repeated rows begin in this process's last batch of an epoch: 0 to batch_size.

    Where the rows do not fill the last batches of all processes, accelerate fills them with the epoch's first rows.
    It assigns batches in rank order, so the repeated rows are at the end of the last ranks' batches.
    """
    num_repeated = -num_rows % (batch_size * num_processes)
    return min(batch_size, max(0, batch_size * (num_processes - rank) - num_repeated))


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The parser's flags, to change the help of those that HfArgumentParser makes out of dataclass fields."""
    return parser._actions


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """Image features as a model's forward takes them; Qwen3-VL also reads `deepstack_features` in deeper layers."""

    deepstack_features: list[tuple[torch.Tensor]] | None = None


def accepts_encoder_outputs(model: nn.Module) -> bool:
    """Whether the model's forward takes image features in place of pixels: transformers 5.20 and newer."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def as_encoder_outputs(features: torch.Tensor) -> dict:
    """Keyword arguments of a model's forward for features (1 + deepstack layers, tokens of all images, hidden)."""
    pooled, *deepstack = [(layer,) for layer in features]  # transformers concatenates images, so one piece will do
    output = EncoderOutput(pooler_output=pooled, deepstack_features=deepstack or None)  # type: ignore[arg-type]
    return {"mm_encoder_outputs": {"image": output}}


def rope_positions(base, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions of a batch's tokens, int64: (rows, tokens), or (3, rows, tokens) in time, height and width.

    Text has three equal ones.
    """
    if not hasattr(base.model, "get_rope_index"):
        return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return base.model.get_rope_index(**inputs)[0]


def position_model(base) -> nn.Module:
    """A model of the base's class that has its config and no weights: all that `get_rope_index` needs."""
    kind: Any = type(base.model)
    model = kind.__new__(kind)
    model.__dict__["config"] = base.model.config
    return model


def count_image_tokens(processor, sizes: list[tuple[int, int]], options: dict) -> list[int]:
    """The tokens that a processor makes of images of these (width, height), with these options of its call."""
    image_sizes = [(height, width) for width, height in sizes]
    return list(processor._get_num_multimodal_tokens(image_sizes=image_sizes, **options)["num_image_tokens"])


def select_cache_rows(cache: DynamicCache, row_index: torch.Tensor) -> None:
    """Make row i of the cache what row `row_index[i]` was, states of linear attention too: rows may be repeated."""
    cache.reorder_cache(row_index)  # type: ignore[arg-type]  # a LongTensor is a Tensor of int64


def rms_norm_epsilon(module: nn.Module) -> float | None:
    """The epsilon of one of transformers' plain RMS norms, None for any other module, such as a norm with a gate."""
    epsilon = getattr(module, "variance_epsilon", None)
    return epsilon if len(inspect.signature(type(module).forward).parameters) == 2 else None


def module_names_in_model(config: PretrainedConfig, names: Iterable[str]) -> list[str]:
    """Names of modules as the installed transformers has them, from those in files of any release."""
    model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    renamed = list(names)
    for renaming in get_checkpoint_conversion_mapping(getattr(model_class, "__name__", "")) or []:
        renamed = [renaming.rename_source_key(name)[0] for name in renamed]
    return renamed


def adapted_module_names(model: PeftModel) -> list[str]:
    """The names within the base model of the layers that carry an adapter."""
    return list(model.base_model.targeted_module_names)  # type: ignore[arg-type]  # a list of names


def plain_adapter(layer: LoraLayer) -> str | None:
    """The layer's one active adapter, if PEFT computes base(x) + scaling * B(A(dropout(x))) and no more, else None.

    More is: several adapters, merged weights, a variant such as DoRA, or `lora_bias`.
    """
    active = layer.active_adapters
    if len(active) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    name = active[0]
    return name if name in layer.lora_A and layer.lora_B[name].bias is None else None


def is_4bit(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's weight in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every layer in 4 bits compute in `dtype`; a base that was saved in 4 bits has its own setting."""
    for layer in model.modules():
        if is_4bit(layer):
            layer.compute_dtype = dtype  # type: ignore[assignment]  # nn.Module's __setattr__ is typed for tensors


def dequantized_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight (out, in) in the dtype that the layer computes in, unpacked where it is held in 4 bits."""
    if not is_4bit(layer):
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit  # slow to import, and only a GPU needs it

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[attr-defined]  # Params4bit
    return weight.to(getattr(layer, "compute_dtype", None) or weight.dtype)
