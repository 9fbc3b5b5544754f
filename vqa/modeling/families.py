"""What differs between model families, in one table; only windows.py, which speeds one of them up, names a family too.

Any chat model of transformers that takes ready image features (`mm_encoder_outputs`) and whose processor resizes by
`patch_size` and `merge_size`, as Qwen's do, fits; a family that is not in the table only goes without the fp16 guard.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """vision: the vision tower's module within the model.

    Within the tower, last_projection: the output layer of its last block's MLP, which overflows fp16 for some images
    (vqa/precision.py); last_norm: what reads that output.
    """

    vision: str
    last_projection: str | None
    last_norm: str | None


FAMILIES = {
    "qwen2_vl": Family("model.visual", "blocks.{last}.mlp.fc2", "merger.ln_q"),
    "qwen2_5_vl": Family("model.visual", "blocks.{last}.mlp.down_proj", "merger.ln_q"),
    "qwen3_vl": Family("model.visual", "blocks.{last}.mlp.linear_fc2", "merger.norm"),
}


OTHER = Family("model.visual", None, None)


def family_of(model: torch.nn.Module) -> Family:
    return FAMILIES.get(model.config.model_type, OTHER)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower of a base model."""
    return model.get_submodule(family_of(model).vision)


def last_vision_projection(model: torch.nn.Module) -> tuple[torch.nn.Linear, torch.nn.Module] | None:
    """(output layer of the last vision block's MLP, norm that reads it), where the family is known."""
    family, tower = family_of(model), vision_tower(model)
    if family.last_projection is None:
        return None
    last = family.last_projection.format(last=len(tower.blocks) - 1)
    return tower.get_submodule(last), tower.get_submodule(family.last_norm)
