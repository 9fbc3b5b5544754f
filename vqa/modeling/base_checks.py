"""Checks of a base model's folder before anything is loaded: is it there, is it complete, can its quantization train?

They read JSON and the headers of safetensors files (https://github.com/huggingface/safetensors#format), no weights.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, PretrainedConfig

from vqa.core import compat
from vqa.core.errors import UserError, preview
from vqa.core.io import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LONGEST_HEADER = 100_000_000  # safetensors' own limit, in bytes

BNB_4BIT = "bitsandbytes 4-bit"
# Methods that transformers, PEFT and this project train a LoRA adapter on: their name -> the packages that they need.
# Not 8 bits of bitsandbytes: its layers change the dtype of their own biases, and part of such a base stays in bf16.
TRAINABLE = {
    BNB_4BIT: ["bitsandbytes"],
    "gptq": ["gptqmodel", "optimum"],
    "awq": ["gptqmodel"],
}


def check_base(model: str, load_in_4bit: bool, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base's config. Raises UserError where its files are incomplete, or its quantization cannot be trained."""
    check_model_path(model)
    if Path(model).is_dir():  # the hub's client checks what it downloads
        check_weights(model)
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    check_quantization(model, config, load_in_4bit)
    return config


def check_model_path(model: str) -> None:
    """Stop where `model` is neither a model's folder nor a name on the model hub, or in its cache."""
    if (Path(model) / "config.json").is_file():
        return
    looks_local = Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/", "checkpoints/"))
    reason = "no config.json there"
    if not looks_local:
        try:
            hf_hub_download(model, "config.json")
            return
        except Exception as error:  # many kinds; each means that the model is not available
            reason = f"{type(error).__name__} from the model hub"
    raise UserError(
        f"model {model!r} is neither a model folder nor reachable ({reason}). Give --model the folder of its "
        "config.json (on Kaggle: add the model as an input and give its path under /kaggle/input)"
    )


def check_weights(folder: str | Path) -> None:
    """Raise UserError where a file of weights in a model folder is missing, incomplete or of another download."""
    folder = Path(folder)
    weight_map = read_weight_map(folder)
    files = sorted(set(weight_map.values())) or [WEIGHTS]
    if not (folder / files[0]).is_file() and any((folder / name).is_file() for name in PICKLES):
        raise UserError(
            f"{folder} has its weights only as pickles ({PICKLES[0]}), which can run code and are not loaded. Use a "
            f"folder with {WEIGHTS}, or convert it with save_pretrained() of transformers."
        )
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {preview(missing)}. Copy or download the model again.")
    for name in files:
        header = read_safetensors_header(folder / name)
        if lost := [key for key, file in weight_map.items() if file == name and key not in header]:
            raise UserError(
                f"{folder / name} lacks {preview(lost)}, which {INDEX} expects there. Download both files again, "
                "from the same version of the model."
            )
    # A shard that the index does not name, although it counts among the same number of shards.
    total = {name.rpartition("-of-")[2] for name in files} if weight_map else set()
    if extra := sorted(
        path.name
        for path in folder.glob("model-*-of-*.safetensors")
        if path.name not in files and path.name.rpartition("-of-")[2] in total
    ):
        raise UserError(f"{folder}: {INDEX} does not name {preview(extra)}. Download {INDEX} again.")


def read_weight_map(folder: Path) -> dict[str, str]:
    """Name of each tensor -> its file, from the index of a model in several files. Empty for one in a single file."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():  # transformers prefers the single file, too
        return {}
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(weight_map := index.get("weight_map"), dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map. Download it again.")
    return weight_map


def read_safetensors_header(path: Path) -> dict[str, dict]:
    """Name of each tensor -> its dtype, shape and offsets. Raises UserError where the file's size does not fit them.

    A file has 8 bytes with the header's length (little-endian), the header in JSON, and the tensors.
    """
    size, again = path.stat().st_size, "Copy or download it again."
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes). {again}")
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise UserError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > LONGEST_HEADER:
            raise UserError(f"{path} is not a safetensors file. {again}")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path} is incomplete: {size:,} bytes, which end within its header. {again}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise UserError(f"{path} is not a safetensors file: its header is not readable. {again}") from None
    if size != expected:
        kind = "is incomplete" if size < expected else "is damaged"
        raise UserError(f"{path} {kind}: {size:,} of {expected:,} bytes. {again}")
    return header


def saved_quantization(config: PretrainedConfig) -> str | None:
    """How the weights in a base model's folder are quantized, such as BNB_4BIT or `gptq`; None if they are not."""
    values = _saved_values(config)
    if values is None:
        return None
    method = str(values.get("quant_method") or "unknown method")
    if values.get("load_in_4bit") or values.get("load_in_8bit") or method == "bitsandbytes":
        return "bitsandbytes 8-bit" if values.get("load_in_8bit") else BNB_4BIT
    return method


def _saved_values(config: PretrainedConfig) -> dict | None:
    holders = (config, config.get_text_config())
    values = next((q for holder in holders if (q := getattr(holder, "quantization_config", None))), None)
    return values if values is None or isinstance(values, dict) else values.to_dict()  # an object once it is loaded


def check_quantization(model: str, config: PretrainedConfig, load_in_4bit: bool) -> None:
    """Raise UserError where a base that is saved quantized cannot be trained with these settings and packages."""
    method = saved_quantization(config)
    if method is None:
        return
    remedy = "Use the unquantized model, with load_in_4bit where memory is short, or its bitsandbytes 4-bit version"
    if method not in TRAINABLE:
        raise UserError(f"{model} is quantized with {method}, which a LoRA adapter cannot be trained on. {remedy}.")
    if load_in_4bit and method != BNB_4BIT:
        raise UserError(
            f"{model} is already quantized with {method}, so load_in_4bit cannot be applied. Set load_in_4bit to "
            "false, or use the unquantized model."
        )
    if missing := [package for package in TRAINABLE[method] if find_spec(package) is None]:
        raise UserError(
            f"{model} is quantized with {method}, which needs `pip install {' '.join(missing)}`. {remedy}, if you "
            "cannot install it."
        )


def check_has_gpu(model: str, config: PretrainedConfig, load_in_4bit: bool) -> None:
    """Raise UserError where the base is or would be quantized, and this machine has no CUDA GPU."""
    if torch.cuda.is_available():
        return
    if (method := saved_quantization(config)) is not None:
        raise UserError(
            f"{model} is quantized with {method}, which needs a CUDA GPU, and this machine has none. Use a machine "
            "with a GPU, or the unquantized model."
        )
    if load_in_4bit:
        raise UserError("load_in_4bit needs a CUDA GPU, and this machine has none. Set it to false.")


def set_skipped_modules(model: str, config: PretrainedConfig) -> None:
    """Let transformers expect 4 bits exactly where the files of a bitsandbytes base have them.

    The folder's own list, `llm_int8_skip_modules`, does not say: transformers before version 5 matched its entries
    anywhere in a module's name, and named the modules differently. Most folders on the hub were saved then.
    """
    names = ["*.safetensors", INDEX, "config.json"]
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=names))
    keys: set[str] = set()
    for name in set(read_weight_map(folder).values()) or {WEIGHTS}:
        keys |= read_safetensors_header(folder / name).keys()
    # An output layer that is tied to the embeddings is not in the files, and is in 16 bits as they are.
    modules = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")} | {"lm_head"}
    plain = [m for m in modules if f"{m}.weight.absmax" not in keys]
    names = sorted(map(re.escape, compat.module_names_in_model(config, plain)))
    values = _saved_values(config)
    assert values is not None
    values["llm_int8_skip_modules"] = ["|".join(names)]  # as one expression: transformers compiles it once
