"""A model folder of random weights for each family, in its own architecture with the embedded model's tokenizer."""

from pathlib import Path

import torch
from conftest import TINY
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}}
QWEN3_5_TEXT = TEXT | {
    "head_dim": 16,
    "rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 0.75},
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "initializer_range": 0.1,  # so that the states matter
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48}
CONFIGS = {
    "qwen2_vl": (TEXT | MROPE, {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2}),
    "qwen3_vl": (TEXT | MROPE, VISION | {"deepstack_visual_indexes": [0]}),
    "qwen3_5": (QWEN3_5_TEXT, VISION | {"num_position_embeddings": 64}),
}
# Like that of Qwen3.5, where the generation prompt opens the thinking block, or closes it where thinking is off.
THINKING = """\
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def make_family(kind: str, processor, folder: Path) -> str:
    """A folder with the model and the processor of the family `kind`; Qwen2.5-VL's is the embedded one."""
    if kind == "qwen2_5_vl":
        return TINY
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    tokens = {f"{name}_token_id": token(f"<|{name}_pad|>") for name in ("image", "video")}
    tokens |= {f"vision_{edge}_token_id": token(f"<|vision_{edge}|>") for edge in ("start", "end")}
    text, vision = CONFIGS[kind]
    text = text | {"vocab_size": len(tokenizer), "pad_token_id": token("<|endoftext|>")}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)  # also that of the padding, which was zero
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # a new layer forgets everything within a token
            torch.nn.init.constant_(parameter, -3.0)
    model.save_pretrained(folder)
    make_processor(kind, processor).save_pretrained(folder)
    return str(folder)


def make_processor(kind: str, processor):
    tokenizer, template = processor.tokenizer, processor.chat_template
    if kind == "qwen2_vl":
        return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), template)
    if kind == "qwen3_5":
        start, _, _ = template.rpartition("{%- if add_generation_prompt -%}")
        answer = "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
        thought = "{%- if message['role'] == 'assistant' -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
        assert answer in start
        template = start.replace(answer, answer + thought) + THINKING
    return Qwen3VLProcessor(Qwen2VLImageProcessor(patch_size=16), tokenizer, Qwen3VLVideoProcessor(), template)
