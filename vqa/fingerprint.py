"""Fingerprints of weights, to show that each fold starts from the same untouched base."""

import hashlib
import json
from collections.abc import Iterable

import torch

from callbacks import gathered


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The first 16 hex digits of SHA-256 over names, shapes, dtypes and bytes of (name, tensor) in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        tensor = gathered(tensor)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def base_fingerprint(model: torch.nn.Module) -> str:
    """Of everything that is not trained."""
    return fingerprint((name, p) for name, p in model.named_parameters() if not p.requires_grad)


def adapter_fingerprint(model: torch.nn.Module) -> str:
    """Of everything that is trained."""
    return fingerprint((name, p) for name, p in model.named_parameters() if p.requires_grad)


def rows_fingerprint(train_rows: list[dict], valid_rows: list[dict]) -> str:
    """Of what a fold trains on and validates on: every cell of the rows, their order, and which half each is in."""
    return hashlib.sha256(json.dumps([train_rows, valid_rows]).encode()).hexdigest()[:16]
