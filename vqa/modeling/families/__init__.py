"""Model families, one file each; no other module names a family. docs/adding_a_model.md shows how to add one.

A model of an unlisted type is treated as GENERIC: Qwen's paths, and no guard against overflow in fp16.
"""

from torch import nn

from vqa.core.errors import UserError
from vqa.modeling.families import qwen2_5_vl, qwen2_vl, qwen3_vl
from vqa.modeling.families.base import Family

FAMILIES = {kind: m.FAMILY for m in (qwen2_vl, qwen2_5_vl, qwen3_vl) for kind in m.FAMILY.model_types}
GENERIC = Family(model_types=())


def family_of(model) -> Family:
    """The family of a base model of transformers."""
    return family_of_type(model.config.model_type)


def family_of_type(model_type: str) -> Family:
    """The family of a config's `model_type`; GENERIC where no file names it."""
    return FAMILIES.get(model_type, GENERIC)


def vision_tower(model: nn.Module) -> nn.Module:
    """The vision tower of a base model."""
    return _submodule(model, family_of(model).vision_tower)


def language_model(model: nn.Module) -> nn.Module:
    """The module of a base model that holds the decoder layers."""
    return _submodule(model, family_of(model).language_model)


def last_vision_projection(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(output layer of the last vision block's MLP, norm that reads it), or None where no overflow is known."""
    family, tower = family_of(model), vision_tower(model)
    if family.last_vision_projection is None or family.last_vision_norm is None:
        return None
    path = family.last_vision_projection.format(last=len(tower.get_submodule("blocks")) - 1)  # type: ignore[arg-type]
    return tower.get_submodule(path), tower.get_submodule(family.last_vision_norm)


def _submodule(model, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"models of type {model.config.model_type!r} are not supported: there is no module {path!r}; "
            f"use a model of type {', '.join(FAMILIES)}, or add a file to vqa/modeling/families"
        ) from None
