"""16 bits on GPUs before Ampere: the dtype, the attention, what is refused. The fp16 guard is in test_families.py."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForImageTextToText, TrainingArguments

from vqa.config.parser import check_machine
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.modeling.loading import attention_for_device, load_base
from vqa.modeling.vision import encode_images


@pytest.fixture
def gpu(monkeypatch):
    """Stand in for a GPU of a compute capability; like torch on a T4, all of them claim bf16."""

    def make(major: int, minor: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: (major, minor))

    return make


@pytest.mark.parametrize(
    ("capability", "dtype", "attention"),
    [((7, 5), torch.float16, "sdpa_expanded"), ((8, 0), torch.bfloat16, "sdpa"), ((9, 0), torch.bfloat16, "sdpa")],
)
def test_the_dtype_goes_by_compute_capability_whatever_torch_claims(gpu, capability, dtype, attention):
    gpu(*capability)
    assert model_dtype() == dtype and attention_for_device() == attention
    assert model_dtype(fp16=True) == torch.float16


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_training_in_16_bits_has_autocast_and_in_fp16_the_scaler_unless_the_args_say_otherwise(
    gpu, monkeypatch, tmp_path, capability, precision
):
    gpu(*capability)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # which would look for the GPU
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    assert RecipeArguments(output_dir=str(tmp_path)).__dict__[precision]
    other = RecipeArguments(output_dir=str(tmp_path), fp16=True)
    assert other.fp16 and not other.bf16


def test_several_gpus_do_not_keep_predict_from_using_one(gpu, monkeypatch):
    from vqa.inference.checkpoints import base_checkpoint

    gpu(7, 5)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert base_checkpoint("args/fold0.json").dtype == torch.float16


def test_bf16_on_a_t4_is_refused(gpu):
    gpu(7, 5)
    with pytest.raises(UserError, match="Use fp16"):
        check_machine({"bf16": True})
    gpu(8, 0)
    check_machine({"bf16": True})


def test_cudnn_attention_which_plans_for_every_length_is_off(model):
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # the loaded model turned it off
    assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("count", [1, 4])  # one row has no padding, so no mask: there transformers would group queries
def test_keys_and_values_are_expanded_instead_of_grouped(monkeypatch, model, processor, rows, count):
    other = AutoModelForImageTextToText.from_pretrained(TINY, attn_implementation="sdpa_expanded").float().eval()
    batch = encode_images(model, Collator(processor, 140)(rows[:count]))
    batch = {key: value for key, value in batch.items() if key not in ("ids", "offered")}
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **kwargs):
        calls.append((kwargs.get("enable_gqa", False), query.shape[1] == key.shape[1]))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    with torch.no_grad():
        wanted = model(**batch).logits
        grouped, calls[:] = list(calls), []
        got = other(**batch).logits
    if count == 1:
        assert any(gqa for gqa, _ in grouped), "transformers groups queries here, so there is something to avoid"
    assert calls and all(not gqa and same_heads for gqa, same_heads in calls)
    assert torch.allclose(got, wanted, atol=1e-4)


def test_a_base_saved_in_4_bits_computes_in_the_dtype_that_it_is_loaded_in(monkeypatch):
    """Its config says bf16, which a T4 would emulate; transformers keeps the config's word over ours."""
    saved = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    layer = saved.model.language_model.layers[0].mlp.up_proj
    layer.weight.quant_state, layer.compute_dtype = SimpleNamespace(dtype=torch.bfloat16), torch.bfloat16
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **options: saved)
    load_base(TINY, load_in_4bit=False, dtype=torch.float16)
    assert layer.compute_dtype == torch.float16
