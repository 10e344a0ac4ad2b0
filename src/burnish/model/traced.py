"""What a traced forward stands for: fake tensors have shapes and dtypes, but neither values nor, here, a device.

A trace runs on fake CPU tensors, since autograd needs the device's library, and means another device: code that chooses
by device asks `device_type`, and what it puts into host memory it puts there inside `on_host`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

__all__ = ["device_type", "has_values", "is_on_host", "is_traced", "on_host", "standing_for"]

_device: ContextVar[str] = ContextVar("burnish_traced_device", default="cpu")
_host: ContextVar[bool] = ContextVar("burnish_on_host", default=False)


@contextmanager
def standing_for(device: str) -> Generator[None]:
    """Let fake tensors stand for tensors on a device of this type."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


@contextmanager
def on_host() -> Generator[None]:
    """Mark the storages that are made inside as host memory."""
    token = _host.set(True)
    try:
        yield
    finally:
        _host.reset(token)


def is_on_host() -> bool:
    """Return whether storages made now are in host memory."""
    return _host.get()


def device_type(tensor: Tensor) -> str:
    """Return the type of a tensor's device, or of the one that a fake tensor stands for."""
    return _device.get() if is_fake(tensor) else tensor.device.type


def has_values(tensor: Tensor) -> bool:
    """Return whether values can be read, and without waiting for a device."""
    return tensor.device.type == "cpu" and not is_fake(tensor)


def is_traced(model: nn.Module) -> bool:
    """Return whether a model's weights are fake, so that no numeric probe of it can be made."""
    parameter = next(model.parameters(), torch.empty(0))
    return is_fake(parameter)
