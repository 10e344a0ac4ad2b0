"""Fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

__all__ = ["weights_fingerprint"]


def weights_fingerprint(model: torch.nn.Module, *, counts: Callable[[str], bool] = lambda name: True) -> str:
    """Hash the names, shapes, dtypes and values of a model's weights and buffers.

    Args:
        model: in its compute dtype.
        counts: selects the names to include.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if counts(name) and isinstance(weight, torch.Tensor):
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
