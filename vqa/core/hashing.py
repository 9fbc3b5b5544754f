"""Fingerprints of weights, to show that each fold starts from the same untouched base."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from vqa.core.distributed import full_tensor
from vqa.core.errors import UserError


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The first 16 hex digits of SHA-256 over names, shapes, dtypes and bytes of (name, tensor) in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        tensor = full_tensor(tensor)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def frozen_fingerprint(model: torch.nn.Module) -> str:
    """Of everything that is not trained."""
    return fingerprint((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def trainable_fingerprint(model: torch.nn.Module) -> str:
    """Of everything that is trained."""
    return fingerprint((name, p) for name, p in model.named_parameters() if p.requires_grad)


def checkpoint_fingerprint(model: str) -> str:
    """Of a base model's weights as they lie on disk, whatever they are loaded as: the first row of every tensor.

    `model` is its folder or its name on a hub. Every fine-tuning moves those rows, and reading them takes no time.
    """
    folder = model if Path(model).is_dir() else snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])

    def first_rows():
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                yield from ((name, file.get_slice(name)[:1]) for name in file.keys())

    return fingerprint(first_rows())


def rows_fingerprint(*parts: list[dict]) -> str:
    """Of lists of rows, such as those that a fold trains on and validates on: every cell, in order, list by list."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def hash_files(images: Sequence[str]) -> list[str]:
    """A fingerprint of each image's bytes, equal for byte-identical files."""
    try:
        seen = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in set(images)}
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; copy the image again, or drop its rows") from None
    return [seen[path] for path in images]
