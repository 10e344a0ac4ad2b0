"""Advantages from rewards: pure functions, one row per prompt.

Rewards are P rows, one per prompt, of G completions each. A failed reward is None: it is excluded from every mean and
its advantage is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
    "turn_advantages",
    "whitened_advantages",
]

Scale = Literal["group", "batch", "none"]
Rows: TypeAlias = Sequence[Sequence[float | None]]
Turns: TypeAlias = list[list[list[float]]]


def group_advantages(rewards: Rows, *, scale: Scale = "group", eps: float = 1e-4) -> list[list[float]]:
    r"""Centre rewards on their group's mean (GRPO, 2402.03300; without scaling Dr. GRPO, 2503.20783).

    .. math:: A_{ij} = \frac{r_{ij} - \mathrm{mean}_j r_{ij}}{\sigma + \epsilon}

    with sigma the unbiased standard deviation of the group or of the batch; `none` skips the division.

    Args:
        rewards: P rows of G rewards.
        scale: group, batch or none, as above.
        eps: added to sigma.

    Returns:
        P rows of G advantages; all 0 in a group with fewer than two known rewards.
    """
    batch_std = _std([r for row in rewards for r in row if r is not None]) if scale == "batch" else 0.0

    def divisor(values: Sequence[float]) -> float:
        return 1.0 if scale == "none" else (_std(values) if scale == "group" else batch_std) + eps

    return _centred(rewards, divisor)


def mean_normalized_advantages(rewards: Rows, *, eps: float = 1e-6) -> list[list[float]]:
    r"""Centre rewards and divide by the mean: MaxRL (2602.02710), the policy gradient of the log pass rate to order G.

    .. math:: A_{ij} = \frac{r_{ij} - \bar r_i}{\bar r_i + \epsilon}

    Args:
        rewards: P rows of G rewards, at least 0 (1 for success, 0 for failure).
        eps: added to the mean.

    Returns:
        P rows of G advantages; all 0 where every completion failed or every one succeeded.
    """
    return _centred(rewards, lambda values: math.fsum(values) / len(values) + eps)


def leave_one_out_advantages(rewards: Rows, *, scale: Scale = "none", eps: float = 1e-4) -> list[list[float]]:
    r"""Subtract the mean of the group's other rewards (RLOO, 2402.14740).

    .. math:: A_{ij} = r_{ij} - \frac{1}{G-1} \sum_{k \ne j} r_{ik} = \frac{G}{G-1} (r_{ij} - \bar r_i)

    Args:
        rewards: P rows of G rewards.
        scale: batch whitens the advantages over the batch; group divides by the group's standard deviation.
        eps: added to the standard deviation.

    Returns:
        P rows of G advantages.
    """
    rows = _centred(
        rewards, lambda values: (len(values) - 1) / len(values) * (_std(values) + eps if scale == "group" else 1)
    )
    return whitened_advantages(_known(rewards, rows), eps=eps) if scale == "batch" else rows


def whitened_advantages(
    values: Rows, *, lengths: Sequence[Sequence[int]] | None = None, eps: float = 1e-4
) -> list[list[float]]:
    r"""Whiten values over the whole batch (REINFORCE++, 2501.03262).

    .. math:: A_{ij} = \frac{v_{ij} - \mathrm{mean}\,v}{\mathrm{std}\,v + \epsilon}

    Args:
        values: P rows of G rewards, or of advantages.
        lengths: P rows of G token counts that weight the values; None weights all equally.
        eps: added to the unbiased standard deviation.

    Returns:
        P rows of G values; all 0 where the known ones are equal.
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
    r"""Normalise each criterion within its group, then whiten their weighted sum (GDPO, 2601.05242).

    .. math:: A = \mathrm{whiten}\Big(\sum_k w_k \frac{r^k_{ij} - \bar r^k_i}{\sigma^k_i + \epsilon}\Big)

    Args:
        criteria: K tables of P rows of G values.
        weights: K weights.
        rewards: P rows of G totals; None excludes the completion.
        eps: added to standard deviations.

    Returns:
        P rows of G advantages.
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
    r"""Whiten the return of each token over all tokens of the batch (REINFORCE++, 2501.03262).

    .. math:: R_t = r - \sum_{u \ge t} k_u, \qquad A_t = \frac{R_t - \mathrm{mean}\,R}{\mathrm{std}\,R + \epsilon}

    Args:
        rewards: P rows of G rewards.
        penalties: P rows of G lists of k_t, one per token, such as beta times its KL divergence.
        eps: added to the unbiased standard deviation.

    Returns:
        P rows of G lists of advantages, one per token.
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
    """Inputs of an advantage estimator: the rewards of a whole rollout, over all ranks.

    Attributes:
        totals: P rows of G rewards.
        lengths: P rows of G token counts.
        criteria: K tables of P rows of G values, one per criterion.
        weights: K criterion weights.
        scale: divisor of centred rewards, see `group_advantages`.
    """

    totals: Rows
    lengths: Sequence[Sequence[int]] = ()
    criteria: Sequence[Rows] = ()
    weights: Sequence[float] = ()
    scale: Scale = field(default="group")


def turn_advantages(rewards: Rewards, turns: Sequence[Sequence[Sequence[float]]], estimator: Estimator) -> Turns:
    r"""Estimate the advantage of each turn from the rewards that follow it: the reward to go, per turn.

    .. math:: g_{ijk} = r_{ij} - \sum_{l < k} w_{ijl}, \qquad A_{\cdot\cdot k} = \mathrm{estimator}(g_{\cdot\cdot k})

    with w the reward of a turn. Turn k is compared with the k-th turns of the other completions of its group that have
    one. Where only the last turn is rewarded, the advantage of the first turn is that of the completion.

    Args:
        rewards: P rows of G rewards r.
        turns: P rows of G lists of w, one per turn.
        estimator: a row of :data:`ADVANTAGES`.

    Returns:
        P rows of G lists of advantages, one per turn.
    """
    found: Turns = [[[] for _ in row] for row in turns]
    for k in range(max((len(own) for row in turns for own in row), default=0)):
        to_go = [
            [None if r is None or k >= len(own) else r - math.fsum(own[:k]) for r, own in zip(*rows, strict=True)]
            for rows in zip(rewards.totals, turns, strict=True)
        ]
        for row, own, advantages in zip(found, turns, estimator(replace(rewards, totals=to_go)), strict=True):
            for listed, given, advantage in zip(row, own, advantages, strict=True):
                listed.extend([advantage] if k < len(given) else [])
    return found


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
        # Equal rewards carry no signal; a tiny divisor must not amplify their rounding error.
        if len(values) < 2 or max(values) == min(values):
            result.append([0.0] * len(row))
            continue
        mean, by = math.fsum(values) / len(values), divisor(values)
        result.append([0.0 if r is None else (r - mean) / by for r in row])
    return result


def _known(rewards: Rows, rows: Rows) -> Rows:
    """Restore None in rows where the reward failed."""
    return [[None if r is None else v for r, v in zip(*pair, strict=True)] for pair in zip(rewards, rows, strict=True)]


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
