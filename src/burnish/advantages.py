"""Advantages from rewards: pure functions, one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

__all__ = ["Scale", "group_advantages"]

Scale = Literal["group", "batch", "none"]


def group_advantages(
    rewards: Sequence[Sequence[float | None]], *, scale: Scale = "group", eps: float = 1e-4
) -> list[list[float]]:
    r"""Rewards relative to the group's mean (GRPO, 2402.03300; without scaling Dr. GRPO, 2503.20783).

    .. math:: A_{ij} = \frac{r_{ij} - \mathrm{mean}_j r_{ij}}{\sigma + \epsilon}

    with sigma the unbiased standard deviation of the group, of the whole batch, or the division left out.

    Args:
        rewards: P rows of G rewards; None where the reward failed: such a completion counts in no mean and gets 0.
        scale: what sigma is.
        eps: added to sigma.

    Returns:
        P rows of G advantages. A group with fewer than two rewards has none to compare: all 0.
    """
    known = [[r for r in row if r is not None] for row in rewards]
    batch_std = _std([r for row in known for r in row]) if scale == "batch" else 0.0
    result: list[list[float]] = []
    for row, values in zip(rewards, known, strict=True):
        if len(values) < 2:
            result.append([0.0] * len(row))
            continue
        mean = math.fsum(values) / len(values)
        # Equal rewards carry no signal; their rounding error must not be blown up by a tiny sigma.
        flat = max(values) == min(values)
        sigma = {"group": _std(values), "batch": batch_std, "none": 1.0}[scale]
        divisor = sigma if scale == "none" else sigma + eps
        result.append([0.0 if r is None or flat else (r - mean) / divisor for r in row])
    return result


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
