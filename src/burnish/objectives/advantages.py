"""Advantages from rewards: pure functions, one row per prompt.

Rewards are rows of P prompts with G completions each; None where a reward failed: such a completion counts in no mean
and gets 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

__all__ = [
    "ADVANTAGES",
    "Rewards",
    "Scale",
    "group_advantages",
    "leave_one_out_advantages",
    "mean_normalized_advantages",
    "per_criterion_advantages",
    "token_advantages",
    "whitened_advantages",
]

Scale = Literal["group", "batch", "none"]
Rows: TypeAlias = Sequence[Sequence[float | None]]


def group_advantages(rewards: Rows, *, scale: Scale = "group", eps: float = 1e-4) -> list[list[float]]:
    r"""Rewards relative to the group's mean (GRPO, 2402.03300; without scaling Dr. GRPO, 2503.20783).

    .. math:: A_{ij} = \frac{r_{ij} - \mathrm{mean}_j r_{ij}}{\sigma + \epsilon}

    with sigma the unbiased standard deviation of the group, of the whole batch, or the division left out.

    Args:
        rewards: P rows of G rewards.
        scale: what sigma is.
        eps: added to sigma.

    Returns:
        P rows of G advantages. A group with fewer than two rewards has none to compare: all 0.
    """
    batch_std = _std([r for row in rewards for r in row if r is not None]) if scale == "batch" else 0.0

    def divisor(values: Sequence[float]) -> float:
        return 1.0 if scale == "none" else (_std(values) if scale == "group" else batch_std) + eps

    return _centred(rewards, divisor)


def mean_normalized_advantages(rewards: Rows, *, eps: float = 1e-6) -> list[list[float]]:
    r"""MaxRL (2602.02710): the policy gradient of the log pass rate, to order G in the failure rate.

    .. math:: A_{ij} = \frac{r_{ij} - \bar r_i}{\bar r_i + \epsilon}

    Args:
        rewards: P rows of G rewards, at least 0 (1 for success, 0 for failure).
        eps: added to the mean.

    Returns:
        P rows of G advantages; all 0 where nothing succeeded, or everything.
    """
    return _centred(rewards, lambda values: math.fsum(values) / len(values) + eps)


def leave_one_out_advantages(rewards: Rows, *, scale: Scale = "none", eps: float = 1e-4) -> list[list[float]]:
    r"""Rewards relative to the mean of the group's other rewards (RLOO, 2402.14740).

    .. math:: A_{ij} = r_{ij} - \frac{1}{G-1} \sum_{k \ne j} r_{ik} = \frac{G}{G-1} (r_{ij} - \bar r_i)

    Args:
        rewards: P rows of G rewards.
        scale: batch whitens the advantages over the batch; group divides by the group's standard deviation.
        eps: added to a standard deviation.
    """
    rows = _centred(
        rewards, lambda values: (len(values) - 1) / len(values) * (_std(values) + eps if scale == "group" else 1)
    )
    return whitened_advantages(_known(rewards, rows), eps=eps) if scale == "batch" else rows


def whitened_advantages(
    values: Rows, *, lengths: Sequence[Sequence[int]] | None = None, eps: float = 1e-4
) -> list[list[float]]:
    r"""Values whitened over the whole batch (REINFORCE++, 2501.03262).

    .. math:: A_{ij} = \frac{v_{ij} - \mathrm{mean}\,v}{\mathrm{std}\,v + \epsilon}

    Args:
        values: P rows of G rewards, or of advantages.
        lengths: P rows of G token counts: a value weighs as often as it has tokens. None: each weighs 1.
        eps: added to the unbiased standard deviation.
    """
    weights = lengths if lengths is not None else [[1] * len(row) for row in values]
    known = [
        (v, n) for row, counts in zip(values, weights, strict=True) for v, n in zip(row, counts, strict=True)
        if v is not None
    ]  # fmt: skip
    if not known or max(known)[0] == min(known)[0]:
        return [[0.0] * len(row) for row in values]
    count = sum(n for _, n in known)
    mean = math.fsum(v * n for v, n in known) / count
    std = math.sqrt(math.fsum(n * (v - mean) ** 2 for v, n in known) / max(count - 1, 1))
    return [[0.0 if v is None else (v - mean) / (std + eps) for v in row] for row in values]


def per_criterion_advantages(
    criteria: Sequence[Rows], weights: Sequence[float], rewards: Rows, *, eps: float = 1e-4
) -> list[list[float]]:
    r"""GDPO (2601.05242): each criterion scaled within its group, so that none drowns the others; the sum whitened.

    .. math:: A = \mathrm{whiten}\Big(\sum_k w_k \frac{r^k_{ij} - \bar r^k_i}{\sigma^k_i + \epsilon}\Big)

    Args:
        criteria: K times P rows of G values.
        weights: K weights.
        rewards: P rows of G totals; None there excludes the completion.
        eps: added to standard deviations.
    """
    scaled = [group_advantages(rows, eps=eps) for rows in criteria]
    sums = [
        [math.fsum(w * s[i][j] for w, s in zip(weights, scaled, strict=True)) for j in range(len(row))]
        for i, row in enumerate(rewards)
    ]
    return whitened_advantages(_known(rewards, sums), eps=eps)


def token_advantages(
    rewards: Rows, penalties: Sequence[Sequence[Sequence[float]]], *, eps: float = 1e-4
) -> list[list[list[float]]]:
    r"""The sum of what follows each token, whitened over all tokens of the batch (REINFORCE++, 2501.03262).

    .. math:: R_t = r - \sum_{u \ge t} k_u, \qquad A_t = \frac{R_t - \mathrm{mean}\,R}{\mathrm{std}\,R + \epsilon}

    Args:
        rewards: P rows of G rewards.
        penalties: P rows of G lists of a number k for each token, such as beta times its KL divergence.
        eps: added to the unbiased standard deviation.

    Returns:
        P rows of G lists of advantages, one a token.
    """
    sums: list[list[list[float | None]]] = []
    for row, given in zip(rewards, penalties, strict=True):
        after = [list(accumulate(reversed(tokens)))[::-1] for tokens in given]
        sums.append([[None if r is None else r - x for x in rest] for r, rest in zip(row, after, strict=True)])
    flat = whitened_advantages([tokens for row in sums for tokens in row], eps=eps)
    found = iter(flat)
    return [[next(found) for _ in row] for row in sums]


@dataclass(frozen=True, slots=True)
class Rewards:
    """What an advantage estimator is a function of: the rewards of a whole round of samples, over all ranks.

    Attributes:
        totals: P rows of G rewards.
        lengths: P rows of G token counts.
        criteria: K times P rows of G values of single criteria.
        weights: K weights of them.
        scale: what centred rewards are divided by.
    """

    totals: Rows
    lengths: Sequence[Sequence[int]] = ()
    criteria: Sequence[Rows] = ()
    weights: Sequence[float] = ()
    scale: Scale = field(default="group")


Estimator: TypeAlias = Callable[[Rewards], list[list[float]]]

ADVANTAGES: dict[str, Estimator] = {
    "group": lambda r: group_advantages(r.totals, scale=r.scale),
    "leave_one_out": lambda r: leave_one_out_advantages(r.totals, scale=r.scale),
    "batch": lambda r: whitened_advantages(r.totals, lengths=r.lengths),
    "group_batch": lambda r: whitened_advantages(
        _known(r.totals, group_advantages(r.totals, scale="none")), lengths=r.lengths
    ),
    "mean_normalized": lambda r: mean_normalized_advantages(r.totals),
}
"""`advantage_estimator` -> function; `burnish.algorithms.register` adds to it."""


def _centred(rewards: Rows, divisor: Callable[[Sequence[float]], float]) -> list[list[float]]:
    result: list[list[float]] = []
    for row in rewards:
        values = [r for r in row if r is not None]
        # Equal rewards carry no signal; their rounding error must not be blown up by a tiny divisor.
        if len(values) < 2 or max(values) == min(values):
            result.append([0.0] * len(row))
            continue
        mean, by = math.fsum(values) / len(values), divisor(values)
        result.append([0.0 if r is None else (r - mean) / by for r in row])
    return result


def _known(rewards: Rows, rows: Rows) -> Rows:
    """The rows, with None where the reward failed."""
    return [[None if r is None else v for r, v in zip(*pair, strict=True)] for pair in zip(rewards, rows, strict=True)]


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
