"""Bases that are saved in bitsandbytes' 4 bits, vision tower included, as those on the hub are."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from .conftest import DEVICE, IN_4BIT, call
from .test_layers import features, relative_error

pytestmark = pytest.mark.skipif(not IN_4BIT, reason="bitsandbytes needs CUDA")

SKIPPED = ["lm_head", "multi_modal_projector", "merger", "modality_projection"]  # as in unsloth's folders


@pytest.fixture
def saved(folder, processor, tmp_path) -> tuple[str, str]:
    """(folder that is saved in 4 bits, the folder it was made of). Everything is, but the tower's merger."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", r".*\.merger"],
    )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": DEVICE}
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["llm_int8_skip_modules"] = SKIPPED
    path.write_text(json.dumps(values))
    return str(tmp_path), folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_are_quantized_where_the_folder_has_them_and_features_are_those_of_its_weights(
    saved, rows, processor, dtype
):
    from vqa.core.compat import dequantized_weight
    from vqa.data.collator import Collator
    from vqa.modeling.loading import load_base

    path, original = saved
    batch = Collator(processor, 112)(rows[:4])
    batch = {key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in batch.items()}
    model = load_base(path, False, dtype).eval()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = {name for name, m in linear.items() if type(m) is nn.Linear}
    assert plain == {name for name in linear if "lm_head" in name or ".merger." in name}
    got = features(model, batch)
    assert got.isfinite().all()
    exact = load_base(original, False, torch.float32).eval()
    for name, layer in linear.items():
        exact.get_submodule(name).weight.data = dequantized_weight(layer).detach().float()
    assert relative_error(got, features(exact, batch)) < 0.02


@pytest.mark.parametrize(("precision", "load_in_4bit"), [("fp16", "false"), ("fp16", "true"), ("bf16", "true")])
def test_a_fold_trains_on_it_with_stored_features_and_is_predicted(saved, job, tmp_path, precision, load_in_4bit):
    path, _ = saved
    run, outputs = tmp_path / "run", tmp_path / "outputs"
    flags = ["--model", path, "--load_in_4bit", load_in_4bit, "--max_steps", 4, "--save_steps", 4]
    flags += ["--fp16", str(precision == "fp16").lower(), "--bf16", str(precision == "bf16").lower()]
    call("train_fold", job / "args.json", "--output_dir", run, *flags)
    call("predict", run, "--output_dir", outputs)
    assert (run / "adapter_model.safetensors").is_file() and list(Path(outputs).glob("*.csv"))
