r"""Token rewards, generalised advantage estimation and the value loss of a critic.

V_t is the critic's value of the state before token t, r_t the token's reward. The steps of an episode are the scored
tokens of a sequence, numbered without gaps: tokens excluded from the loss, such as a tool's output, are part of the
state before the next scored token, and have neither a value nor a reward of their own.
"""

from __future__ import annotations

import torch

__all__ = ["clipped_value_loss", "explained_variance", "gae", "moments", "token_rewards", "whiten"]


def token_rewards(
    kl_N: torch.Tensor,
    rewards_S: torch.Tensor,
    *,
    sequence_index_N: torch.Tensor,
    beta: float,
    early_rewards_N: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Place the sequence reward on its last token, with a KL penalty on every token (1909.08593).

    .. math:: r_t = -\beta\,\mathrm{KL}_t + e_t + \mathbb 1[t \text{ is last}]\, \big(R_s - \sum_u e_u\big)

    with e the part of R that was earned before the end, so the rewards of a sequence add up to R whatever e is.

    Args:
        kl_N: [N] estimated divergence from the reference, in nats; no gradient.
        rewards_S: [S] rewards; that of a sequence without scored tokens is dropped.
        sequence_index_N: [N] sequence of each token, ascending.
        beta: weight of the penalty, at least 0.
        early_rewards_N: [N] e: the reward of each turn but the last, on the turn's last token; None means 0.

    Returns:
        [N] rewards.
    """
    assert kl_N.shape == sequence_index_N.shape
    early_N = torch.zeros_like(kl_N) if early_rewards_N is None else early_rewards_N.to(kl_N.dtype)
    assert early_N.shape == kl_N.shape
    _, is_last_N = _ends(sequence_index_N)
    rewards_S = rewards_S.to(kl_N.dtype)
    left_S = rewards_S - torch.zeros_like(rewards_S).index_add(0, sequence_index_N, early_N)
    rewards_N = early_N + torch.where(is_last_N, left_S[sequence_index_N], 0.0)
    return rewards_N - beta * kl_N.detach()


def gae(
    rewards_N: torch.Tensor,
    values_N: torch.Tensor,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
    *,
    gamma: float,
    lam: float,
    last_values_S: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Estimate advantages and returns by GAE (1506.02438).

    .. math::
        \delta_t = r_t + \gamma V_{t+1} - V_t \qquad
        A_t = \sum_{k \ge 0} (\gamma\lambda)^k\, \delta_{t+k} \qquad R_t = A_t + V_t

    Token t + 1 is the next scored token of the sequence. At the last token of a turn it is the first of the next turn,
    whose value sees what the environment wrote in between: that is the state the turn led to. So gamma and lambda count
    the policy's tokens alone. With gamma = lambda = 1, the advantage of a token is the sum of the rewards from it on,
    less its value.

    Args:
        rewards_N: [N] token rewards.
        values_N: [N] V_t; no gradient.
        sequence_index_N: [N] sequence of each token, 0 .. S-1, ascending.
        num_sequences: S.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]: 0 trusts the values (one-step differences), 1 the rewards (Monte Carlo).
        last_values_S: [S] value after the last token of each sequence, to bootstrap truncated episodes; None means 0.

    Returns:
        [N] advantages and [N] returns, in the dtype of the values (computed in float64).
    """
    assert rewards_N.shape == values_N.shape == sequence_index_N.shape and values_N.ndim == 1
    time_N, is_last_N = _ends(sequence_index_N)
    rewards, values = rewards_N.detach().double(), values_N.detach().double()
    after_S = values.new_zeros(num_sequences) if last_values_S is None else last_values_S.detach().double()
    next_values_N = torch.where(is_last_N, after_S[sequence_index_N], values.roll(-1))
    longest = int(time_N.max()) + 1 if time_N.numel() else 0
    sums_TS = values.new_zeros(longest, num_sequences)
    sums_TS[time_N, sequence_index_N] = rewards + gamma * next_values_N - values
    for time in reversed(range(longest - 1)):
        sums_TS[time] += gamma * lam * sums_TS[time + 1]
    advantages_N = sums_TS[time_N, sequence_index_N]
    return advantages_N.to(values_N.dtype), (advantages_N + values).to(values_N.dtype)


def _ends(sequence_index_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the [N] index of each token in its sequence, and an [N] mask of last tokens."""
    if not sequence_index_N.numel():
        return sequence_index_N, sequence_index_N.bool()
    step_N = sequence_index_N.diff()
    assert bool((step_N >= 0).all()), "sequence_index is not ascending"
    edge = torch.ones(1, dtype=torch.bool, device=sequence_index_N.device)
    is_first_N, is_last_N = torch.cat((edge, step_N > 0)), torch.cat((step_N > 0, edge))
    all_N = torch.arange(len(sequence_index_N), device=sequence_index_N.device)
    return all_N - (all_N * is_first_N).cummax(0).values, is_last_N


def clipped_value_loss(
    values_N: torch.Tensor, old_values_N: torch.Tensor, returns_N: torch.Tensor, *, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Squared error of values clipped around their old ones (PPO's value loss, 1707.06347; 2005.12729).

    .. math::
        \tfrac12 \max\big( (V - R)^2, (\mathrm{clip}(V, V_{old} - c, V_{old} + c) - R)^2 \big)

    Args:
        values_N: [N] V.
        old_values_N: [N] values from before the first update on these returns; no gradient.
        returns_N: [N] R; no gradient.
        clip: c, positive; None for the plain squared error.

    Returns:
        [N] losses, not reduced, and an [N] mask of tokens whose gradient the clip removed.
    """
    assert values_N.shape == old_values_N.shape == returns_N.shape
    old_values_N, returns_N = old_values_N.detach(), returns_N.detach()
    losses_N = 0.5 * (values_N - returns_N) ** 2
    if clip is None:
        return losses_N, torch.zeros_like(losses_N, dtype=torch.bool)
    near_N = torch.maximum(torch.minimum(values_N, old_values_N + clip), old_values_N - clip)
    near_losses_N = 0.5 * (near_N - returns_N) ** 2
    is_clipped_N = near_losses_N > losses_N
    return torch.where(is_clipped_N, near_losses_N, losses_N), is_clipped_N.detach()


def moments(values_N: torch.Tensor) -> torch.Tensor:
    """Count, sum and sum of squares, which add up over batches and ranks.

    Args:
        values_N: [N] values.

    Returns:
        [3] float64.
    """
    wide_N = values_N.detach().double()
    return torch.stack((wide_N.new_tensor(float(wide_N.numel())), wide_N.sum(), (wide_N**2).sum()))


def whiten(
    values_N: torch.Tensor, moments_3: torch.Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> torch.Tensor:
    r"""Scale values to unit variance, and to mean 0 unless the mean is kept.

    .. math:: \frac{v - \bar v}{\sqrt{s^2 + \epsilon}} \;[\; + \bar v\;], \quad
        s^2 = \frac{1}{N - 1} \sum_i (v_i - \bar v)^2

    As in TRL's PPO, the variance is unbiased and epsilon is under the root.

    Args:
        values_N: [N] values.
        moments_3: [3] `moments` over all batches and ranks; None takes those of `values_N` alone.
        shift_mean: move the mean to 0.
        eps: added to the variance.

    Returns:
        [N] values; with a count below two, zeros with `shift_mean`, unchanged without.
    """
    count, total, squares = (moments(values_N) if moments_3 is None else moments_3).tolist()
    if count < 2:
        return torch.zeros_like(values_N) if shift_mean else values_N
    mean = total / count
    # Rounding may make the variance of equal values slightly negative.
    variance = max(squares - total * mean, 0.0) / (count - 1)
    whitened_N = (values_N.double() - mean) / (variance + eps) ** 0.5
    return (whitened_N if shift_mean else whitened_N + mean).to(values_N.dtype)


def explained_variance(error_moments_3: torch.Tensor, return_moments_3: torch.Tensor) -> float:
    r"""Fraction of the returns' variance that the values explain.

    .. math:: 1 - \frac{\mathrm{Var}(R - V)}{\mathrm{Var}(R)}

    with variances over all N tokens: 1 for exact values, 0 for a constant, negative for worse than a constant.

    Args:
        error_moments_3: [3] `moments` of R - V.
        return_moments_3: [3] `moments` of R.

    Returns:
        At most 1; 0 where the returns are constant.
    """
    variance, square = _variance(return_moments_3)
    # Float64 rounding leaves up to about 1e-15 of the mean square where the true variance is 0.
    if variance <= 1e-14 * square:
        return 0.0
    return 1 - _variance(error_moments_3)[0] / variance


def _variance(moments_3: torch.Tensor) -> tuple[float, float]:
    """Return the population variance and the mean square."""
    count, total, squares = moments_3.tolist()
    count = max(count, 1.0)
    return max(squares / count - (total / count) ** 2, 0.0), squares / count
