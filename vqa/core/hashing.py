"""Fingerprints of weights. They show that each fold starts from the same unchanged base model."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The first 16 hex digits of SHA-256 over names, shapes, dtypes and bytes of (name, tensor) in sorted order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def parameter_fingerprint(model: torch.nn.Module, trained: bool) -> str:
    """The fingerprint of the parameters that are trained, or of those that are not."""
    return fingerprint((name, p) for name, p in model.named_parameters() if p.requires_grad == trained)


def checkpoint_fingerprint(model: str) -> str:
    """The fingerprint of a base model's files: of the first row of every tensor, which every fine-tuning changes.

    `model` is a folder or a name on a model hub. It does not depend on the dtype that the model is loaded in.
    """
    folder = model if Path(model).is_dir() else snapshot_download(model, allow_patterns=["*.json", "*.safetensors"])

    def first_rows():
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    rows = file.get_slice(name)
                    yield name, rows[:1] if rows.get_shape() else file.get_tensor(name)

    return fingerprint(first_rows())
