"""Load the base model, add an adapter to its language model, and read adapters back from a fold's folder."""

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from vqa.core import compat
from vqa.core.dtypes import has_bf16
from vqa.core.errors import UserError, preview
from vqa.modeling.base_checks import (
    BNB_4BIT,
    check_base,
    check_has_gpu,
    check_model_path,
    saved_quantization,
    set_skipped_modules,
)
from vqa.modeling.families import family_of, family_of_type, lora_pattern
from vqa.modeling.fused_lora import fuse_adapters, fuse_norms
from vqa.modeling.vision import check_accepts_features, guard_fp16, unwrap_base_model

PREFIX = "base_model.model."  # of the names in an adapter's file
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

DOES_NOT_FIT = "does not fit this base model; give --model the one that it was trained on"


def load_processor(model: str, trust_remote_code: bool = False):
    """The model's processor, tokenizer and image processor in one. Its chat template has its family's options."""
    check_model_path(model)
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    for name, value in family_of_type(config.model_type).template_options.items():
        processor.chat_template = f"{{%- set {name} = {str(value).lower()} -%}}\n{processor.chat_template}"
    return processor


def load_base(model: str, load_in_4bit: bool, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The frozen base model on this process's device, in `dtype`, with SDPA attention. Weights: safetensors only.

    `load_in_4bit` quantizes while loading. A folder that is saved in 4 bits loads as it is, whatever the flag says.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    config = check_base(model, load_in_4bit, trust_remote_code)
    check_has_gpu(model, config, load_in_4bit)
    check_dtype(model, config, dtype)
    options = {}
    if saved_quantization(config) == BNB_4BIT:
        set_skipped_modules(model, config)
    elif load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(family_of_type(config.model_type).not_in_4bit),
        )
    # Each process holds its own copy, on its own GPU.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    base = AutoModelForImageTextToText.from_pretrained(
        model,
        config=config,
        dtype=dtype,
        attn_implementation=attention_for_device(),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        device_map={"": device},
        **options,
    )
    compat.set_compute_dtype(base, dtype)
    base.config.use_cache = False
    # cuDNN's attention, torch's first choice on Hopper, makes a new plan for every length of a batch, which takes
    # longer than a step. Cards before Ampere never had it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    check_accepts_features(base)
    if dtype == torch.float16:
        guard_fp16(base)
    if (prepare := family_of(base).prepare) is not None:
        prepare(base)
    return fuse_norms(base.requires_grad_(False))


def check_dtype(model: str, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Raise UserError where the base would compute in float16 and is known to overflow it."""
    reason = family_of_type(config.model_type).bf16_only
    if reason and dtype == torch.float16:
        raise UserError(f"{model} cannot compute in fp16: {reason}. Use a GPU with bf16 (Ampere or later), or a Qwen.")


# Options of LoraConfig that this project cannot honour, and why.
REFUSED_OPTIONS = {
    **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), "the fields lora_rank, lora_alpha and lora_dropout set it"),
    **dict.fromkeys(
        ("target_modules", "layers_to_transform", "layers_pattern", "task_type", "target_parameters"),
        "the model's family, lora_first_layer and lora_vision choose the layers",
    ),
    **dict.fromkeys(
        ("bias", "modules_to_save", "trainable_token_indices", "trainable_bias"), "the base model stays frozen"
    ),
}
INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # the others change the base model, or need data


def add_adapter(
    base: nn.Module,
    rank: int,
    alpha: int,
    dropout: float,
    first_layer: int = 0,
    vision: bool = False,
    options: dict | None = None,
) -> PeftModel:
    """A new LoRA adapter; its parameters are float32, as fp16 training needs them.

    It is on the language model from layer `first_layer` on, and with `vision` on the vision tower and its projector.
    `options` are further ones of PEFT's LoraConfig. Raises UserError for those that cannot be used.
    """
    options = options or {}
    if refused := [name for name in options if name in REFUSED_OPTIONS]:
        raise UserError(f"lora_options: {refused[0]} cannot be set: {REFUSED_OPTIONS[refused[0]]}. Leave it out.")
    if options.get("init_lora_weights", True) not in INITIALIZATIONS:
        raise UserError(
            f"lora_options: init_lora_weights {options['init_lora_weights']!r} changes the base model, or needs data. "
            f"Use {', '.join(map(str, INITIALIZATIONS))}."
        )
    try:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=lora_pattern(base, first_layer, vision),
            task_type="CAUSAL_LM",
            **options,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"lora_options: {error}. See LoraConfig in the documentation of PEFT.") from None
    return fuse_adapters(get_peft_model(base, config))


def start_from(model: PeftModel, folder: str | Path) -> None:
    """Give the model's adapter the weights in `folder`. Raises UserError where they are of other layers or shapes."""
    weights, own = adapter_weights(folder, unwrap_base_model(model).config), get_peft_model_state_dict(model)
    if differing := sorted(
        name
        for name in weights.keys() | own.keys()
        if name not in weights or name not in own or weights[name].shape != own[name].shape
    ):
        raise UserError(
            f"init_adapter: {len(differing)} weights of {folder} do not fit this run's adapter: {preview(differing)}. "
            "Use the same model, lora_first_layer and lora_vision in both runs."
        )
    set_peft_model_state_dict(model, weights)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> PeftModel:
    """Attach the adapter in `folder` as `name`, in place of any other. Weights that do not fit are an error."""
    weights = adapter_weights(folder, unwrap_base_model(model).config)
    try:
        with (
            tempfile.TemporaryDirectory() as current,
            warnings.catch_warnings(action="ignore", category=UserWarning),  # what it warns of is an error below
        ):
            shutil.copy(Path(folder) / "adapter_config.json", current)
            save_file(weights, Path(current) / "adapter_model.safetensors")
            if isinstance(model, PeftModel):
                others = list(model.peft_config)
                model.load_adapter(current, adapter_name=name)
                model.set_adapter(name)
                for other in others:
                    model.delete_adapter(other)
            else:
                model = PeftModel.from_pretrained(model, current, adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # other shapes, or layers that the model does not have
        raise UserError(f"{folder}: the adapter {DOES_NOT_FIT} ({str(error)[:200]})") from None
    unmatched = sorted(set(get_peft_model_state_dict(model, adapter_name=name)).symmetric_difference(weights))
    if unmatched:  # PEFT only warns, and predicts with an adapter of zeros
        raise UserError(
            f"{folder}: the adapter {DOES_NOT_FIT} ({len(unmatched)} weights without a counterpart: "
            f"{preview(unmatched)})"
        )
    return fuse_adapters(model).eval().requires_grad_(False)


def adapter_weights(folder: str | Path, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The adapter's weights by the names that the installed transformers has, from a file of any release.

    PEFT loads names of before transformers 4.52 as nothing, and only warns.
    """
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    names = compat.module_names_in_model(config, [name.removeprefix(PREFIX) for name in weights])
    return {PREFIX + name: values for name, values in zip(names, weights.values())}


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds an adapter in PEFT's form."""
    return all((Path(folder) / name).is_file() for name in ADAPTER_FILES)


def attention_for_device() -> str:
    """transformers' name of the attention to load a model with."""
    return "sdpa_expanded" if torch.cuda.is_available() and not has_bf16() else "sdpa"


def _sdpa_expanded(module, query, key, value, attention_mask, **kwargs):
    """SDPA with keys and values repeated for every query head, never by `enable_gqa`.

    Before Ampere that flag leaves SDPA only its math kernel, which materialises the attention matrix.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = compat.repeat_kv(key, groups), compat.repeat_kv(value, groups)
    ungrouped: Any = SimpleNamespace(is_causal=getattr(module, "is_causal", True), training=module.training)
    return compat.sdpa_attention_forward(ungrouped, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa_expanded", _sdpa_expanded)
compat.AttentionMaskInterface.register("sdpa_expanded", compat.sdpa_mask)
