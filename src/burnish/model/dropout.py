"""Dropout off: preferences and rewards compare completions, and noise between them is no signal."""

from __future__ import annotations

import torch

__all__ = ["disable_dropout"]


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of a model, adapters included, to 0; its configuration stays as it is.

    Dropout layers hold theirs as `p`; modules that call the function hold theirs as a number (`attention_dropout`).

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith(("_drop", "_pdrop"))):
                setattr(module, name, 0.0)
