"""Policy-gradient losses: per-token values of surrogates built on the ratio between the policy and an older one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from burnish.objectives.aggregate import Reduction, sequence_sums

__all__ = [
    "POLICY_LOSSES",
    "Correction",
    "PolicyLoss",
    "PolicyOptions",
    "PolicyTerms",
    "RatioLevel",
    "cispo",
    "clipped_surrogate",
    "correction_weights",
    "log_ratio",
    "off_policy_mask",
    "sapo",
]

RatioLevel = Literal["token", "sequence", "sequence_token", "product"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def log_ratio(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    *,
    level: RatioLevel,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    r"""Log importance ratio of each token, per token or shared by its sequence.

    With d_t = log pi(y_t) - log pi_old(y_t) and sg what stops gradients:

    .. math::
        \text{token: } d_t \qquad
        \text{sequence: } \bar d = \frac{1}{|s|}\sum_{u \in s} d_u \qquad
        \text{sequence\_token: } \mathrm{sg}[\bar d] + d_t - \mathrm{sg}[d_t] \qquad
        \text{product: } \sum_{u \in s} d_u

    The sequence levels are GSPO's (2507.18071), whose second form has the value of the first and each token's own
    gradient; the product is the ratio of whole sequences, as in RLOO (2402.14740).

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
    sums_S = sequence_sums(difference_N, sequence_index_N, num_sequences)
    if level == "product":
        return sums_S[sequence_index_N]
    lengths_S = sequence_sums(torch.ones_like(difference_N), sequence_index_N, num_sequences).clamp(min=1)
    means_N = (sums_S / lengths_S)[sequence_index_N]
    return means_N if level == "sequence" else means_N.detach() + difference_N - difference_N.detach()


def clipped_surrogate(
    log_ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""PPO's clipped surrogate (1707.06347), with separate bounds (DAPO, 2503.14476) and a two-sided, or dual, clip.

    .. math:: -\min\big(\min(r_t, \delta) A_t,\ \mathrm{clip}(r_t, 1-\epsilon_{low}, 1+\epsilon_{high}) A_t\big)

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        epsilon_low: in [0, 1].
        epsilon_high: at least 0.
        delta: cap on the unclipped ratio (INTELLECT-2, 2505.07291), above 1 + epsilon_high; None for none. It acts
            where A < 0, and there it is the dual clip max(min(r A, clip(r) A), delta A) of 1912.09729.

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


def cispo(
    log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, logprobs_N: torch.Tensor, *, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""CISPO (2506.13585): the clipped ratio is a weight without gradient, so every token keeps its own.

    .. math:: -\mathrm{sg}[\min(r_t, c)]\, A_t \log \pi(y_t)

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        logprobs_N: [N] log-probabilities under the policy that is trained.
        bound: c, of the ratio itself (5, not an epsilon such as 0.2), above 1.

    Returns:
        [N] losses, not reduced, and [N] booleans: whether the weight was clipped.
    """
    assert log_ratio_N.shape == advantages_N.shape == logprobs_N.shape and bound > 1
    ratio_N = log_ratio_N.detach().exp()
    return -ratio_N.clamp(max=bound) * advantages_N.detach() * logprobs_N, (ratio_N > bound) & (advantages_N > 0)


def sapo(
    log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, *, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    r"""Soft adaptive policy optimisation (2511.20347): a gate of the ratio whose slope at 1 is 1, instead of a clip.

    .. math:: -\frac{4}{\tau}\, \sigma(\tau (r_t - 1))\, A_t

    with tau the first temperature where A_t > 0 and the second elsewhere.

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        temperature_pos: tau where the advantage is positive.
        temperature_neg: tau elsewhere.

    Returns:
        [N] losses, not reduced. Their value at r = 1 is -2 A / tau; their gradient there is that of -r A.
    """
    assert log_ratio_N.shape == advantages_N.shape
    advantages_N = advantages_N.detach()
    tau_N = torch.full_like(advantages_N, temperature_neg).masked_fill(advantages_N > 0, temperature_pos)
    return -4 / tau_N * torch.sigmoid(tau_N * (log_ratio_N.exp() - 1)) * advantages_N


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """What a policy loss is a function of.

    Attributes:
        log_ratio: [N] log of the importance ratio, with gradient (see `log_ratio`).
        advantages: [N] no gradient.
        logprobs: [N] log-probabilities under the policy that is trained.
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """The numbers of the losses, by the names of configuration fields."""

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    @property
    def high(self) -> float:
        """The upper clip range."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A row of the table.

    Attributes:
        compute: (terms, options) -> [N] losses, [N] booleans: where a clip acted.
        reduction: how the values become one number.
    """

    compute: Callable[[PolicyTerms, PolicyOptions], tuple[torch.Tensor, torch.Tensor]]
    reduction: Reduction


def _clip(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return clipped_surrogate(
        terms.log_ratio,
        terms.advantages,
        epsilon_low=options.epsilon,
        epsilon_high=options.high,
        delta=options.delta,
    )


def _cispo(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return cispo(terms.log_ratio, terms.advantages, terms.logprobs, bound=options.high)


def _sapo(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    losses_N = sapo(
        terms.log_ratio,
        terms.advantages,
        temperature_pos=options.sapo_temperature_pos,
        temperature_neg=options.sapo_temperature_neg,
    )
    return losses_N, torch.zeros_like(losses_N, dtype=torch.bool)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(_clip, "sequence"),
    "bnpo": PolicyLoss(_clip, "token"),
    "dapo": PolicyLoss(_clip, "token"),
    "dr_grpo": PolicyLoss(_clip, "constant"),
    "luspo": PolicyLoss(_clip, "sum"),
    "cispo": PolicyLoss(_cispo, "token"),
    "sapo": PolicyLoss(_sapo, "sequence"),
}
"""`loss_type` -> loss; `burnish.algorithms.register` adds to it."""


def off_policy_mask(
    logprobs_N: torch.Tensor,
    sampled_logprobs_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    threshold: float,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    r"""Off-policy sequence mask of DeepSeek-V3.2 (2512.02556): leave out bad samples that the policy has moved off.

    .. math::
        m_t = 0 \text{ where } A_t < 0 \text{ and }
        \frac{1}{|s|} \sum_{u \in s} \log\frac{\pi_{old}(y_u)}{\pi(y_u)} > \delta, \quad 1 \text{ elsewhere}

    Args:
        logprobs_N: [N] log-probabilities under the policy that is trained.
        sampled_logprobs_N: [N] log-probabilities when the completions were sampled.
        advantages_N: [N] A.
        threshold: delta, in nats a token.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] 1 or 0, without gradient.
    """
    assert logprobs_N.shape == sampled_logprobs_N.shape == advantages_N.shape == sequence_index_N.shape
    moved_N = (sampled_logprobs_N - logprobs_N).detach()
    lengths_S = sequence_sums(torch.ones_like(moved_N), sequence_index_N, num_sequences).clamp(min=1)
    means_N = (sequence_sums(moved_N, sequence_index_N, num_sequences) / lengths_S)[sequence_index_N]
    return ((advantages_N >= 0) | (means_N <= threshold)).to(logprobs_N.dtype)


def correction_weights(
    old_logprobs_N: torch.Tensor,
    sampler_logprobs_N: torch.Tensor,
    *,
    kind: Correction,
    maximum: float | None,
    minimum: float | None,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    r"""Weights that turn samples of one distribution into estimates for another.

    .. math:: w_t = \frac{\pi_{old}(y_t)}{\mu(y_t)}, \qquad w_s = \prod_{t \in s} w_t

    with mu the distribution that was sampled from. `truncate` bounds a weight from above (truncated importance
    sampling), `mask` sets one outside the bounds to 0 (with 0.5 and 5 a token it is IcePop, 2510.18855).

    Args:
        old_logprobs_N: [N] log-probabilities under the trainer before the first update on these samples.
        sampler_logprobs_N: [N] log-probabilities of the sampler.
        kind: level and way.
        maximum: largest weight; None for no bound.
        minimum: smallest weight of a mask; None for no bound.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] weights without gradient.
    """
    assert old_logprobs_N.shape == sampler_logprobs_N.shape == sequence_index_N.shape
    level, way = kind.split("_")
    difference_N = (old_logprobs_N - sampler_logprobs_N).detach()
    if level == "sequence":
        difference_N = sequence_sums(difference_N, sequence_index_N, num_sequences)[sequence_index_N]
    weights_N = difference_N.exp()
    low, high = minimum or 0.0, float("inf") if maximum is None else maximum
    if way == "truncate":
        return weights_N.clamp(max=high)
    return torch.where((weights_N >= low) & (weights_N <= high), weights_N, 0.0)
