"""Detection of non-finite weights before they are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from burnish.errors import CheckFailed

__all__ = ["check_finite", "non_finite_weights"]


@torch.no_grad()
def non_finite_weights(model: torch.nn.Module) -> list[str]:
    """Name the floating-point weights that hold a NaN or an infinity, in one pass and one device synchronisation.

    With adapters, only the weights that are saved are read: those that require a gradient.
    """
    has_adapters = hasattr(model, "peft_config")
    named: list[tuple[str, torch.Tensor]] = []
    for name, parameter in model.named_parameters():
        shard: Any = parameter  # a DTensor under FSDP2
        local: torch.Tensor = shard.to_local() if hasattr(shard, "to_local") else shard
        is_read = local.is_floating_point() and local.dtype.itemsize > 1 and local.numel()
        if is_read and (parameter.requires_grad or not has_adapters):
            named.append((name, local))
    if not named:
        return []
    # Extrema propagate NaN and, unlike a sum, cannot overflow; a mask would need memory of its own.
    finite = [torch.stack(weight.aminmax()).isfinite().all() for _, weight in named]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return [name for (name, _), flag in zip(named, flags, strict=True) if not flag]


def check_finite(model: torch.nn.Module, where: str, max_over_ranks: Callable[[float], float] = float) -> None:
    """Refuse to save a model with non-finite weights.

    Args:
        model: about to be saved.
        where: begins the message, such as "step 12".
        max_over_ranks: maximum over all ranks: each may hold a shard, and all must raise.

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
