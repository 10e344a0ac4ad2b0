"""Policy-gradient losses: per-token values of surrogates built on the ratio between the policy and an older one."""

from __future__ import annotations

from typing import Literal

import torch

from burnish.objectives.aggregate import sequence_sums

__all__ = ["RatioLevel", "clipped_surrogate", "log_ratio"]

RatioLevel = Literal["token", "sequence"]


def log_ratio(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    *,
    level: RatioLevel,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    r"""Log importance ratio of each token, per token or shared by its sequence.

    .. math::
        \text{token: } \log\frac{\pi(y_t)}{\pi_{old}(y_t)} \qquad
        \text{sequence: } \frac{1}{|s|}\sum_{t \in s} \log\frac{\pi(y_t)}{\pi_{old}(y_t)}

    The sequence level is GSPO's (2507.18071): its gradient reaches every token of the sequence.

    Args:
        logprobs_N: [N] log-probabilities under the policy that is trained.
        old_logprobs_N: [N] log-probabilities under the policy that sampled; no gradient.
        level: as above.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] log-ratios.
    """
    assert logprobs_N.shape == old_logprobs_N.shape == sequence_index_N.shape
    difference_N = logprobs_N - old_logprobs_N.detach()
    if level == "token":
        return difference_N
    lengths_S = sequence_sums(torch.ones_like(difference_N), sequence_index_N, num_sequences).clamp(min=1)
    return (sequence_sums(difference_N, sequence_index_N, num_sequences) / lengths_S)[sequence_index_N]


def clipped_surrogate(
    log_ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""PPO's clipped surrogate (1707.06347), with separate bounds (DAPO, 2503.14476) and a two-sided cap.

    .. math:: -\min\big(\min(r_t, \delta) A_t,\ \mathrm{clip}(r_t, 1-\epsilon_{low}, 1+\epsilon_{high}) A_t\big)

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        epsilon_low: in [0, 1].
        epsilon_high: at least 0.
        delta: cap on the unclipped ratio (INTELLECT-2, 2505.07291), above 1 + epsilon_high; None for none.

    Returns:
        [N] losses, not reduced, and [N] booleans: whether the clip removed the token's gradient.
    """
    assert log_ratio_N.shape == advantages_N.shape
    ratio_N = log_ratio_N.exp()
    advantages_N = advantages_N.detach()
    clipped_N = ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)
    unclipped_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    is_clipped_N = torch.where(advantages_N > 0, ratio_N > 1 + epsilon_high, ratio_N < 1 - epsilon_low)
    return -torch.minimum(unclipped_N * advantages_N, clipped_N * advantages_N), is_clipped_N & (advantages_N != 0)
