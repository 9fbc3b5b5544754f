"""The frozen vision tower: run outside of the graph, and its features checked before the language model reads them."""

import inspect

import torch
from accelerate.utils import extract_model_from_parallel

from vqa.errors import UserError, first_few
from vqa.families import vision_tower
from vqa.precision import half_autocast


def encode_images(model: torch.nn.Module, batch: dict) -> dict:
    """The batch with image features in place of `pixel_values`, as transformers takes them (`mm_encoder_outputs`).

    The tower is frozen, so it runs under `no_grad` and outside gradient checkpointing: no activations are kept, and
    nothing is recomputed. Features (image tokens, hidden) per image. Raises UserError where they are not finite.
    """
    base = base_model(model)
    tower = vision_tower(base)
    tower.eval()  # keeps transformers from checkpointing its layers
    with torch.no_grad(), half_autocast(base):
        seen = base.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    finite = torch.stack([features.isfinite().all() for features in seen.pooler_output]).tolist()
    if not all(finite):
        bad = [row_id for row_id, fine in zip(batch["ids"], finite) if not fine]
        raise UserError(
            f"the image features of {first_few(bad)} are not finite: the vision tower overflows in fp16 for these "
            "images; use a GPU with bf16, or drop the rows"
        )
    deep = {"deepstack_features": seen.deepstack_features} if "deepstack_features" in seen else {}  # Qwen3-VL
    ready = type(seen)(pooler_output=seen.pooler_output, **deep)
    return {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": ready}}


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The base model within whatever wraps it: DDP, PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_takes_features(model: torch.nn.Module) -> None:
    """Stop where the installed transformers would swallow ready features and train blind, as before 5.20."""
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} of the installed transformers takes no ready image features; install "
            "transformers 5.20 or newer, and use one of the families in the README"
        )
