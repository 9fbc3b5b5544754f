"""The frozen vision tower: run outside of the graph, and its features checked before the language model reads them."""

import inspect
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqa.core.dtypes import half_autocast
from vqa.core.errors import UserError, preview
from vqa.modeling.families import vision_tower


@dataclass
class ReadyFeatures(BaseModelOutputWithPooling):
    """Image features as transformers takes them; with those that Qwen3-VL feeds into deeper layers."""

    deepstack_features: list[tuple[torch.Tensor]] | None = None


def encode_images(model: torch.nn.Module, batch: dict) -> dict:
    """The batch with ready features (`mm_encoder_outputs`) in place of `pixel_values`, or of stored `image_features`.

    Raises UserError where features are not finite.
    """
    features = batch.get("image_features")
    if features is None:
        features = image_features(model, batch["pixel_values"], batch["image_grid_thw"], batch["ids"])
    pooled, *deep = [(layer,) for layer in features]  # transformers joins the images of a batch, so one piece will do
    ready = ReadyFeatures(pooler_output=pooled, deepstack_features=deep or None)
    kept = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_features")}
    return kept | {"mm_encoder_outputs": {"image": ready}}


def image_features(
    model: torch.nn.Module, pixel_values: torch.Tensor, grids: torch.Tensor, names: list[str]
) -> torch.Tensor:
    """Features (1 + deepstack layers, image tokens of all images, hidden) of one image a name.

    The tower is frozen, so it runs under `no_grad` and outside gradient checkpointing: no activations are kept, and
    nothing is recomputed. Raises UserError where the features are not finite.
    """
    base = unwrap_base_model(model)
    tower = vision_tower(base)
    tower.eval()  # keeps transformers from checkpointing its layers
    with torch.no_grad(), half_autocast(base):
        seen = base.get_image_features(pixel_values, grids, return_dict=True)
    finite = torch.stack([features.isfinite().all() for features in seen.pooler_output]).tolist()
    if not all(finite):
        bad = [name for name, fine in zip(names, finite) if not fine]
        raise UserError(
            f"the image features of {preview(bad)} are not finite: the vision tower overflows in fp16 for these "
            "images; use a GPU with bf16, or drop the rows"
        )
    return torch.stack([torch.cat(layer) for layer in (seen.pooler_output, *seen.get("deepstack_features", ()))])


def is_vision_frozen(model: torch.nn.Module) -> bool:
    """Whether the vision tower is neither trained nor adapted, so that images alone decide its output."""
    tower = vision_tower(unwrap_base_model(model))
    adapted = any(isinstance(module, BaseTunerLayer) for module in tower.modules())
    return not adapted and not any(parameter.requires_grad for parameter in tower.parameters())


def unwrap_base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The base model within whatever wraps it: DDP, PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_accepts_features(model: torch.nn.Module) -> None:
    """Stop where the installed transformers would swallow ready features and train blind, as before 5.20."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} of the installed transformers takes no ready image features; install "
            "transformers 5.20 or newer, and use one of the families in the README"
        )
