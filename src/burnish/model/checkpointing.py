"""Activation checkpointing by the names of the installed transformers: 5.17 has `gradient_checkpointing` only.

Later versions call it `activation_checkpointing` and keep the older names until 6, as mirrors that they do not read.
Modules carry the older name as a flag in all of them.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["checkpointing_field", "disable_checkpointing", "enable_checkpointing", "is_checkpointed"]


def checkpointing_field(args: Any) -> str:
    """Return the field of `TrainingArguments` that turns checkpointing on; that of its options ends in `_kwargs`."""
    return "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; reentrant checkpointing would need inputs with gradients."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_checkpointing(model: Any) -> None:
    """Keep activations for the backward pass."""
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def is_checkpointed(model: torch.nn.Module) -> bool:
    """Return whether a module of the model recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
