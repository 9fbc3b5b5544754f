"""The base model, the adapter on its language half, and adapters read back from a fold's folder."""

import os
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from vqa.core.errors import UserError, preview
from vqa.modeling.fused_lora import fuse_adapters, fuse_norms
from vqa.modeling.precision import attention_for_device, guard_fp16
from vqa.modeling.vision import check_accepts_features
from vqa.modeling.windows import batch_vision_windows

# By regex, not by bare names: those would also match the MLPs of the vision tower, which stays as it is.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


# Giving this list drops bitsandbytes' own default, so it has to name the output layer as well as the vision tower.
NOT_IN_4BIT = ["lm_head", "visual", "model.visual"]


DOES_NOT_FIT = "does not fit this base model; give --model the one that it was trained on"


def load_processor(model: str, trust_remote_code: bool = False):
    """The model's processor, tokenizer and image processor in one."""
    check_model_path(model)
    return AutoProcessor.from_pretrained(model, trust_remote_code=trust_remote_code)


def load_base(model: str, load_in_4bit: bool, dtype: torch.dtype, trust_remote_code: bool = False) -> torch.nn.Module:
    """The frozen base model on this process's device, in `dtype`, with SDPA attention. Weights: safetensors only."""
    check_model_path(model)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # set by `accelerate launch`
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if fsdp else torch.uint8,  # FSDP splits what is stored as floating point
        llm_int8_skip_modules=NOT_IN_4BIT,
    )
    # Under DDP each process holds a copy of its own, on its own GPU. FSDP takes each layer's share from the CPU.
    on_gpu = torch.cuda.is_available() and not fsdp
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu"
    base = AutoModelForImageTextToText.from_pretrained(
        model,
        dtype=dtype,
        attn_implementation=attention_for_device(),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        device_map={"": device},
        **({"quantization_config": quantised} if load_in_4bit else {}),
    )
    base.config.use_cache = False
    # cuDNN's attention, torch's first choice on Hopper, plans anew for every length of a batch, which takes longer
    # than a step; the other kernels do not. Cards before Ampere never had it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    check_accepts_features(base)
    if dtype == torch.float16:
        guard_fp16(base)
    return fuse_norms(batch_vision_windows(base.requires_grad_(False)))


def check_model_path(model: str) -> None:
    """Stop where `model` is neither a folder with a model nor a name that a hub, or its cache, could answer to."""
    if (Path(model) / "config.json").is_file():
        return
    looks_local = Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "checkpoints/"))
    try:
        if not looks_local:
            from huggingface_hub import hf_hub_download

            hf_hub_download(model, "config.json")
            return
    except Exception as error:  # whatever went wrong, the model is not to be had
        reason = f"{type(error).__name__} from the model hub"
    else:
        reason = "no config.json there"
    raise UserError(
        f"model {model!r} is neither a model folder nor reachable ({reason}); give --model the folder that holds its "
        "config.json (on Kaggle: add the model as an input and give its path under /kaggle/input)"
    )


def add_adapter(base: torch.nn.Module, rank: int, alpha: int, dropout: float) -> PeftModel:
    """A fresh LoRA adapter on the language model; its parameters are float32, as fp16 training needs them."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    return fuse_adapters(get_peft_model(base, config))


def load_adapter(model: torch.nn.Module, folder: str | Path, name: str = "default") -> PeftModel:
    """Attach the adapter in `folder` as `name`, in place of any other. Weights that do not fit are an error."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # what it warns of is an error below
            if isinstance(model, PeftModel):
                before = list(model.peft_config)
                model.load_adapter(folder, adapter_name=name)
                model.set_adapter(name)
                for other in before:
                    model.delete_adapter(other)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # of other shapes, or for layers that are not there
        raise UserError(f"{folder}: the adapter {DOES_NOT_FIT} ({str(error)[:200]})") from None
    wanted = set(get_peft_model_state_dict(model, adapter_name=name))
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    if wanted != found:  # PEFT only warns, and predicts with an adapter of zeros
        unmatched = sorted(wanted ^ found)
        raise UserError(
            f"{folder}: the adapter {DOES_NOT_FIT} ({len(unmatched)} weights without a counterpart: "
            f"{preview(unmatched)})"
        )
    return fuse_adapters(model).eval().requires_grad_(False)


def is_adapter(folder: str | Path) -> bool:
    return all((Path(folder) / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))
