"""Which modules of a base that was saved in 4 bits stay in 16 bits, read from its files."""

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from vqa.modeling.base_checks import set_skipped_modules

IN_4BIT, IN_16BIT = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("output_layer", "converted"),
    [
        ([], False),  # tied to the embeddings, as in Qwen2.5-VL's 3B
        (["lm_head.weight"], False),
        (["lm_head.weight", "lm_head.weight.absmax"], True),
    ],
)
def test_modules_are_in_4_bits_where_the_files_have_them(tmp_path, output_layer, converted):
    names = [f"{IN_4BIT}.weight", f"{IN_4BIT}.weight.absmax", f"{IN_16BIT}.weight", *output_layer]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    config = AutoConfig.from_pretrained(TINY)
    config.quantization_config = {"load_in_4bit": True, "llm_int8_skip_modules": ["of", "transformers", "4"]}
    set_skipped_modules(str(tmp_path), config)
    skipped = config.quantization_config["llm_int8_skip_modules"]
    in_model = [name.replace("model.", "model.language_model.") for name in (IN_4BIT, IN_16BIT)]
    assert [should_convert_module(name, skipped) for name in (*in_model, "lm_head")] == [True, False, converted]
