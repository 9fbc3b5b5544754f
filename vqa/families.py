"""What differs between model families, in one table; nothing else in the project names a family.

Any chat model of transformers that takes ready image features (`mm_encoder_outputs`) and whose processor resizes by
`patch_size` and `merge_size`, as Qwen's do, fits; a family that is not in the table only goes without the fp16 guard.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """vision: the vision tower's module within the model. last_projection: within the tower, the output layer of its
    last block's MLP, which overflows fp16 for some images (vqa/precision.py)."""

    vision: str
    last_projection: str | None


FAMILIES = {
    "qwen2_vl": Family("model.visual", "blocks.{last}.mlp.fc2"),
    "qwen2_5_vl": Family("model.visual", "blocks.{last}.mlp.down_proj"),
    "qwen3_vl": Family("model.visual", "blocks.{last}.mlp.linear_fc2"),
}
OTHER = Family("model.visual", None)


def family_of(model: torch.nn.Module) -> Family:
    return FAMILIES.get(model.config.model_type, OTHER)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower of a base model."""
    return model.get_submodule(family_of(model).vision)


def last_projection(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The output layer of the last vision block's MLP, where the family is known."""
    path, tower = family_of(model).last_projection, vision_tower(model)
    return path and tower.get_submodule(path.format(last=len(tower.blocks) - 1))
