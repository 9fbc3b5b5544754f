"""A model folder of random weights for each family, in its own architecture with the embedded model's tokenizer."""

from pathlib import Path

import torch
from conftest import TINY
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizer,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vqa.data.rows import LETTERS

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


PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112]]
UNLIKE = {
    "gemma3": (
        TEXT | {"sliding_window": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        {"image_size": 56, "patch_size": 14},
        {"mm_tokens_per_image": 4},
    ),
    "internvl": (TEXT | {"model_type": "qwen2"}, {"image_size": [56, 56], "patch_size": [14, 14]}, {}),
    "idefics3": (TEXT | {"model_type": "llama"}, {"image_size": 56, "patch_size": 14}, {}),
    "llava_onevision": (
        TEXT | {"model_type": "qwen2"},
        {"image_size": 56, "patch_size": 14, "model_type": "siglip_vision_model"},
        {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1},
    ),
}
UNLIKE_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' -}}
{%- for item in message['content'] -%}
{{- '<start_of_image>' if item['type'] == 'image' else item['text'] | trim -}}
{%- endfor -%}
{{- '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
IDEFICS_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
{{- message['role'] | capitalize -}}{{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}
{%- for item in message['content'] -%}
{{- '<image>' if item['type'] == 'image' else item['text'] -}}
{%- endfor -%}
{{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def make_unlike_family(kind: str, processor, folder: Path) -> str:
    """A folder of a family whose processor resizes images by its own rule."""
    processor = make_unlike_processor(kind, processor)
    tokenizer = processor.tokenizer
    text, vision, options = UNLIKE[kind]
    text = text | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1}
    image = getattr(tokenizer, "image_token_id", None) or processor.image_token_id
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=vision | UNLIKE_VISION, image_token_id=image, **options
    )
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    for parameter in model.parameters():
        if not parameter.any():  # such as Gemma's projection, without which an image changes nothing
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def make_unlike_processor(kind: str, processor):
    size = {"height": 56, "width": 56}
    if kind == "gemma3":
        names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
        turns = {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}
        tokenizer = sentencepiece_tokenizer(names | turns)
        return Gemma3Processor(Gemma3ImageProcessor(size=size), tokenizer, GEMMA_TEMPLATE, image_seq_length=4)
    if kind == "idefics3":
        tokenizer = sentencepiece_tokenizer({"eot_token": "<end_of_utterance>"})
        images = Idefics3ImageProcessor(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
        return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    if kind == "llava_onevision":
        images = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS)
        template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>\\n")
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        options |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
        return LlavaOnevisionProcessor(
            images, processor.tokenizer, LlavaOnevisionVideoProcessor(), chat_template=template, **options
        )
    names = ("start_image", "end_image", "context_image", "video")
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = AutoTokenizer.from_pretrained(
        TINY, extra_special_tokens={f"{name}_token": token for name, token in zip(names, tokens)}
    )
    template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>\\n")
    images = GotOcr2ImageProcessor(size=size)
    return InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=template)


def sentencepiece_tokenizer(special: dict[str, str]) -> GemmaTokenizer:
    """Characters and bytes, with tokens of their own for a letter after a blank; it adds `<bos>`."""
    letters = [f"▁{letter}" for letter in LETTERS]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *special.values()]
    pieces += [*(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁", *map(chr, range(33, 127)), *letters]
    return GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", letter) for letter in LETTERS],
        extra_special_tokens=special,
        add_bos_token=True,
    )


def make_family(kind: str, processor, folder: Path) -> str:
    """A folder with the model and the processor of the family `kind`; Qwen2.5-VL's is the embedded one."""
    if kind == "qwen2_5_vl":
        return TINY
    if kind in UNLIKE:
        return make_unlike_family(kind, processor, folder)
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
