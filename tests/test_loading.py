"""A base model's folder before it is loaded: incomplete files, and bases that are saved quantized."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vqa.config.arguments import ModelArguments
from vqa.config.recipe import RecipeArguments
from vqa.core.errors import UserError
from vqa.core.hashing import checkpoint_fingerprint
from vqa.modeling import base_checks
from vqa.modeling.base_checks import BNB_4BIT, check_base, check_weights, saved_quantization
from vqa.modeling.families import fp32_vision_layers
from vqa.modeling.loading import load_base
from vqa.modeling.vision import guard_fp16
from vqa.training.batching import make_setup
from vqa.training.memory import base_bytes, meta_model

IN_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny model's folder."""
    shutil.copytree(TINY, tmp_path / "base")
    return tmp_path / "base"


def quantized(folder: Path, config: dict) -> str:
    """`folder` with this `quantization_config` in its config.json. The weights stay as they are."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return str(folder)


def message(call, *args) -> str:
    """The message of the UserError that a call raises, which is one line."""
    with pytest.raises(UserError) as raised:
        call(*args)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def no_loading(monkeypatch):
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *args, **options: pytest.fail("a model was loaded")
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: b"", "is empty .0 bytes."),
        (lambda data: data[: len(data) // 2], r"is incomplete: [\d,]+ of [\d,]+ bytes"),
        (lambda data: data[:-1], "is incomplete"),
        (lambda data: data[:100], "end within its header"),
        (lambda data: data[:5], "not a safetensors file"),
        (lambda data: data + b"0", "is damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS.*git lfs pull"),
        (lambda data: b"<!DOCTYPE html><html>404</html>", "not a safetensors file"),
        (lambda data: data[:8] + b"[" + data[9:], "header is not readable"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "header is not readable"),
    ],
    ids=["empty", "half", "last byte", "header", "length", "longer", "git lfs", "html", "json", "list"],
)
def test_a_damaged_file_of_weights_is_named_before_anything_is_loaded(folder, no_loading, damage, expected):
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError, match=f"model.safetensors .*{expected}"):
        load_base(str(folder), load_in_4bit=False, dtype=torch.float32)


def test_every_shard_of_the_index_has_to_be_there_and_every_shard_in_the_index(folder):
    check_weights(folder)  # complete as it is
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=sum(p.nbytes for p in model.parameters()) * 2 // 3)
    check_weights(folder)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    assert sorted(set(index["weight_map"].values())) == SHARDS
    one_shard = {name: file for name, file in index["weight_map"].items() if file == SHARDS[0]}
    index_file.write_text(json.dumps(index | {"weight_map": one_shard}))
    assert f"does not name {SHARDS[1]}" in message(check_weights, folder)
    index_file.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"other": SHARDS[0]}}))
    assert f"{SHARDS[0]} lacks other" in message(check_weights, folder)
    index_file.write_text("{}")
    assert "has no weight_map" in message(check_weights, folder)
    index_file.write_text(json.dumps(index))
    (folder / SHARDS[1]).unlink()
    assert f"lacks {SHARDS[1]}. Copy or download the model again." in message(check_weights, folder)


def test_weights_in_pickles_alone_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only as pickles" in message(check_weights, folder)
    (folder / "pytorch_model.bin").unlink()
    assert "lacks model.safetensors" in message(check_weights, folder)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_base_in_4_bits_on_a_cpu_is_one_line_before_anything_is_loaded(folder, no_loading, load_in_4bit):
    model = quantized(folder, IN_4BIT)
    assert "needs a CUDA GPU" in message(load_base, model, load_in_4bit, torch.float32)


def test_load_in_4bit_on_a_cpu_is_one_line(no_loading):
    assert "load_in_4bit needs a CUDA GPU" in message(load_base, TINY, True, torch.float32)


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "hqq", "mxfp4", "torchao", "made-up", None])
def test_methods_that_cannot_be_trained_are_named_with_the_remedy(folder, no_loading, method):
    line = message(load_base, quantized(folder, {"quant_method": method}), False, torch.float32)
    assert f"quantized with {method or 'unknown method'}" in line and "Use the unquantized model" in line


@pytest.mark.parametrize(("method", "package"), [("awq", "gptqmodel"), ("gptq", "gptqmodel optimum")])
def test_awq_and_gptq_need_their_packages(folder, monkeypatch, method, package):
    model = quantized(folder, {"quant_method": method, "bits": 4})
    monkeypatch.setattr(base_checks, "find_spec", lambda name: None)
    assert f"{method}, which needs `pip install {package}`" in message(check_base, model, False)
    monkeypatch.setattr(base_checks, "find_spec", lambda name: object())
    assert saved_quantization(check_base(model, False)) == method
    assert f"already quantized with {method}, so load_in_4bit" in message(check_base, model, True)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_base_in_8_bits_is_refused(folder, load_in_4bit):
    model = quantized(folder, IN_4BIT | {"load_in_4bit": False, "load_in_8bit": True})
    line = message(check_base, model, load_in_4bit)
    assert "quantized with bitsandbytes 8-bit" in line and "bitsandbytes 4-bit version" in line


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_no_second_quantization_config_goes_with_a_base_that_has_its_own(folder, monkeypatch, load_in_4bit):
    model, passed = quantized(folder, IN_4BIT | {"llm_int8_skip_modules": ["of", "transformers", "4"]}), {}
    loaded = AutoModelForImageTextToText.from_pretrained(TINY)

    def from_pretrained(*args, **options):
        passed.update(options)
        return loaded

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr("vqa.modeling.loading.check_has_gpu", lambda *args: None)
    load_base(model, load_in_4bit, torch.float32)
    assert "quantization_config" not in passed
    assert passed["config"].quantization_config["llm_int8_skip_modules"] != ["of", "transformers", "4"]


def test_the_memory_estimate_knows_a_base_that_is_saved_in_4_bits(folder):
    def estimate(model: str, load_in_4bit: bool) -> int:
        args = ModelArguments(model=model, load_in_4bit=load_in_4bit)
        return base_bytes(make_setup(args, RecipeArguments(output_dir="x"), meta_model(args, torch.float16)))

    plain, in_4bit = (estimate(TINY, load_in_4bit) for load_in_4bit in (False, True))
    assert estimate(quantized(folder, IN_4BIT), False) == in_4bit < plain
    assert saved_quantization(AutoConfig.from_pretrained(folder)) == BNB_4BIT


def test_the_guarded_layer_is_dequantized_and_computes_in_fp32(monkeypatch):
    """Here the layer has 4-bit weights in place of its own; tests/gpu has the real ones."""
    base = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float16)
    (projection,), _ = fp32_vision_layers(base)
    weight = projection.weight.detach().clone()
    projection.weight = nn.Parameter(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    projection.weight.quant_state = SimpleNamespace(dtype=torch.float16)
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: weight)
    guard_fp16(base)
    hidden = torch.full((1, weight.shape[1]), 60000.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        output = projection(hidden)
    assert output.dtype == torch.float32
    assert torch.equal(output, nn.functional.linear(hidden.float(), weight.float(), projection.bias.float()))


def test_a_base_with_a_tensor_of_no_dimension_has_a_fingerprint(tmp_path):
    """Some quantized layers have one."""
    fingerprints = set()
    for number in (0.0, 1.0):
        save_file({"x": torch.zeros(3, 2), "format": torch.tensor(number)}, tmp_path / "model.safetensors")
        fingerprints.add(checkpoint_fingerprint(str(tmp_path)))
    assert len(fingerprints) == 2
