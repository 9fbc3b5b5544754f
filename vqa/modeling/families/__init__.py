"""Model families, one file each; no other module names a family. docs/adding_a_model.md shows how to add one.

A model of an unlisted type is treated as GENERIC: the usual names, and no guard against overflow in fp16.
"""

import re
from fnmatch import fnmatch

from torch import nn

from vqa.core.errors import UserError
from vqa.modeling.families import gemma3, idefics3, internvl, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from vqa.modeling.families.base import Family

MODULES = (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, gemma3, internvl, idefics3)
FAMILIES = {kind: module.FAMILY for module in MODULES for kind in module.FAMILY.model_types}
GENERIC = Family(model_types=())


def family_of(model) -> Family:
    """The family of a base model of transformers."""
    return family_of_type(model.config.model_type)


def family_of_type(model_type: str) -> Family:
    """The family of a config's `model_type`; GENERIC where no file names it."""
    return FAMILIES.get(model_type, GENERIC)


def vision_tower(model) -> nn.Module:
    """The vision tower of a base model."""
    return _found(model, model.get_encoder(modality="image"), "the vision tower")


def language_model(model) -> nn.Module:
    """The module of a base model that holds the decoder layers."""
    return _found(model, model.get_decoder(), "the decoder")


def vision_blocks(model) -> nn.ModuleList:
    """The blocks of the vision tower: its largest list of modules."""
    lists = [module for module in vision_tower(model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def patch_embedding(model) -> nn.Module:
    """The first layer of the vision tower, whose weight has one row of pixels for each of its outputs."""
    layers = (m for m in vision_tower(model).modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear))
    return next(layers)


def fp32_vision_layers(model) -> tuple[list[nn.Module], list[nn.Module]]:
    """(linear layers of the vision tower that overflow float16 for some images, norms that read their output)."""
    family, tower = family_of(model), vision_tower(model)
    if not family.fp32_layers:
        return [], []
    last = len(vision_blocks(model)) - 1

    def matching(patterns: tuple[str, ...]) -> list[nn.Module]:
        wanted = [pattern.format(last=last) for pattern in patterns]
        return [module for name, module in tower.named_modules() if any(fnmatch(name, p) for p in wanted)]

    return matching(family.fp32_layers), matching(family.fp32_norms)


def lora_pattern(model, first_layer: int = 0, vision: bool = False) -> str:
    """Regular expression for the full names of the layers that get an adapter.

    Those are the language model's, from decoder layer `first_layer` on; bare names such as `gate_proj` would also
    match the MLPs of a vision tower. With `vision`, also the linear layers of the vision tower and its projector.
    """
    decoder, head = language_model(model), model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder)
    layers = ".*"
    if first_layer:
        total = model.config.get_text_config().num_hidden_layers
        if first_layer >= total:
            raise UserError(f"lora_first_layer is {first_layer}. The model has layers 0 to {total - 1}.")
        layers = rf"\.layers\.({'|'.join(map(str, range(first_layer, total)))})\..*"
    pattern = rf".*{path.rpartition('.')[2]}{layers}\.({'|'.join(family_of(model).lora_targets)})"
    if not vision:
        return pattern
    others = {*decoder.modules(), head}
    names = (n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module not in others)
    return "|".join([pattern, *sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names})])


def _found(model, module, part: str) -> nn.Module:
    """`module`, unless transformers returned the model itself, for want of such a part."""
    if module is model or module is model.base_model:
        raise UserError(
            f"models of type {model.config.model_type!r} are not supported: {part} was not found. Use a model of type "
            f"{', '.join(FAMILIES)}, or add a file to vqa/modeling/families."
        )
    return module
