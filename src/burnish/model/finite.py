"""Weights that are not finite, found before they are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from burnish.errors import CheckFailed

__all__ = ["check_finite", "non_finite_weights"]


@torch.no_grad()
def non_finite_weights(model: torch.nn.Module) -> list[str]:
    """Name the floating-point weights that hold a NaN or an infinity: one pass over each, one synchronisation in all.

    Of a model with adapters, only what its save writes is read: the weights that require a gradient.
    """
    named = list(_saved_weights(model))
    if not named:
        return []
    # The extrema carry NaN along and, unlike a sum, cannot overflow; a mask would take memory of its own.
    finite = [torch.stack(weight.aminmax()).isfinite().all() for _, weight in named]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return [name for (name, _), flag in zip(named, flags, strict=True) if not flag]


def check_finite(model: torch.nn.Module, where: str, max_over_ranks: Callable[[float], float] = float) -> None:
    """Refuse to save a model that nobody can use.

    Args:
        model: about to be saved.
        where: begins the message, such as "step 12".
        max_over_ranks: largest of a number over all ranks: each may hold a shard, and all must raise.

    Raises:
        CheckFailed: a weight is not finite.
    """
    bad = non_finite_weights(model)
    count = max_over_ranks(len(bad))
    if count:
        example = f", such as {bad[0]}" if bad else " on another rank"
        raise CheckFailed(
            f"{where}: {count:.0f} weights are not finite{example}; nothing is saved. An update overflowed: lower "
            "learning_rate, then start again or resume from an earlier checkpoint."
        )


def _saved_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    has_adapters = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        own: Any = parameter  # a shard of a DTensor under FSDP2
        local: torch.Tensor = own.to_local() if hasattr(own, "to_local") else own
        is_read = local.is_floating_point() and local.dtype.itemsize > 1 and local.numel()
        if is_read and (parameter.requires_grad or not has_adapters):
            yield name, local
