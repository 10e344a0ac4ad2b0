"""Per-token policy-gradient losses on the importance ratio between the current policy and the sampling policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from burnish.objectives.aggregate import Reduction, sequence_means, sequence_sums

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
    "sequence_log_weight",
    "vespo",
    "vespo_weight",
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
    r"""Log importance ratio of each token, at token or sequence level.

    With d_t = log pi(y_t) - log pi_old(y_t) and sg the stop-gradient:

    .. math::
        \text{token: } d_t \qquad
        \text{sequence: } \bar d = \frac{1}{|s|}\sum_{u \in s} d_u \qquad
        \text{sequence\_token: } \mathrm{sg}[\bar d] + d_t - \mathrm{sg}[d_t] \qquad
        \text{product: } \sum_{u \in s} d_u

    The sequence levels are GSPO's (2507.18071): `sequence_token` has the value of `sequence` and per-token gradients.
    The product is the ratio of whole sequences, as in RLOO (2402.14740).

    Args:
        logprobs_N: [N] log-probabilities under the current policy.
        old_logprobs_N: [N] log-probabilities under the sampling policy; no gradient.
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
    if level == "product":
        return sequence_sums(difference_N, sequence_index_N, num_sequences)[sequence_index_N]
    means_N = sequence_means(difference_N, sequence_index_N, num_sequences)[sequence_index_N]
    return means_N if level == "sequence" else means_N.detach() + difference_N - difference_N.detach()


def clipped_surrogate(
    log_ratio_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""PPO's clipped surrogate (1707.06347) with asymmetric bounds (DAPO, 2503.14476) and an optional dual clip.

    .. math:: -\min\big(\min(r_t, \delta) A_t,\ \mathrm{clip}(r_t, 1-\epsilon_{low}, 1+\epsilon_{high}) A_t\big)

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        epsilon_low: in [0, 1].
        epsilon_high: at least 0.
        delta: cap on the unclipped ratio (INTELLECT-2, 2505.07291), above 1 + epsilon_high; None for none. It acts
            where A < 0, as the dual clip max(min(r A, clip(r) A), delta A) of 1912.09729.

    Returns:
        [N] losses, not reduced, and an [N] mask of tokens whose gradient the clip removed.
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
    r"""CISPO (2506.13585): the clipped ratio is a detached weight, so every token keeps its gradient.

    .. math:: -\mathrm{sg}[\min(r_t, c)]\, A_t \log \pi(y_t)

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        logprobs_N: [N] log-probabilities under the current policy.
        bound: c, on the ratio itself (5, not an epsilon such as 0.2), above 1.

    Returns:
        [N] losses, not reduced, and an [N] mask of tokens with A > 0 whose weight was clipped.
    """
    assert log_ratio_N.shape == advantages_N.shape == logprobs_N.shape and bound > 1
    ratio_N = log_ratio_N.detach().exp()
    return -ratio_N.clamp(max=bound) * advantages_N.detach() * logprobs_N, (ratio_N > bound) & (advantages_N > 0)


def sapo(
    log_ratio_N: torch.Tensor, advantages_N: torch.Tensor, *, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    r"""Soft adaptive policy optimisation (2511.20347): a sigmoid gate with slope 1 at ratio 1 replaces the clip.

    .. math:: -\frac{4}{\tau}\, \sigma(\tau (r_t - 1))\, A_t

    with tau = temperature_pos where A_t > 0 and temperature_neg elsewhere.

    Args:
        log_ratio_N: [N] log of r.
        advantages_N: [N] A; no gradient.
        temperature_pos: tau where the advantage is positive.
        temperature_neg: tau elsewhere.

    Returns:
        [N] losses, not reduced. At r = 1 the value is -2 A / tau and the gradient that of -r A.
    """
    assert log_ratio_N.shape == advantages_N.shape
    advantages_N = advantages_N.detach()
    tau_N = torch.full_like(advantages_N, temperature_neg).masked_fill(advantages_N > 0, temperature_pos)
    return -4 / tau_N * torch.sigmoid(tau_N * (log_ratio_N.exp() - 1)) * advantages_N


_LEAST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT = math.log(1e-8), 20.0


def sequence_log_weight(
    logprobs_N: torch.Tensor,
    old_logprobs_N: torch.Tensor,
    weights_N: torch.Tensor | None = None,
    *,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
) -> torch.Tensor:
    r"""Log importance weight of whole sequences, including the sampler correction where given.

    .. math:: \log w_s = \sum_{t \in s} \log\frac{\pi(y_t)}{\pi_{old}(y_t)} + \log w_t

    Args:
        logprobs_N: [N] log-probabilities under the current policy.
        old_logprobs_N: [N] log-probabilities under the sampling policy.
        weights_N: [N] w_t, token weights of the sampler correction (see `correction_weights`); a masked one, 0, counts
            as 1e-8.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] log w of each token's sequence, within [log 1e-8, 20]; no gradient.
    """
    assert logprobs_N.shape == old_logprobs_N.shape == sequence_index_N.shape
    terms_N = (logprobs_N - old_logprobs_N).detach()
    if weights_N is not None:
        terms_N = terms_N + weights_N.log().clamp(_LEAST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)
    sums_S = sequence_sums(terms_N, sequence_index_N, num_sequences)
    return sums_S.clamp(_LEAST_LOG_WEIGHT, _LARGEST_LOG_WEIGHT)[sequence_index_N]


def vespo_weight(
    sequence_log_weight_N: torch.Tensor,
    advantages_N: torch.Tensor,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
) -> torch.Tensor:
    r"""VESPO's sequence weight (2602.10693): a gamma density in w, scaled to 1 on-policy.

    .. math:: \phi(w) = w^k e^{\lambda (1 - w)}

    with its peak at w = k / lambda, and separate parameters for A >= 0 and A < 0.

    Args:
        sequence_log_weight_N: [N] log w of each token's sequence.
        advantages_N: [N] A.
        k_pos: k where the advantage is at least 0.
        lambda_pos: lambda there.
        k_neg: k where the advantage is negative.
        lambda_neg: lambda there.

    Returns:
        [N] phi; no gradient.
    """
    assert sequence_log_weight_N.shape == advantages_N.shape
    log_w_N, positive_N = sequence_log_weight_N.detach(), advantages_N >= 0
    k_N = torch.full_like(log_w_N, k_neg).masked_fill(positive_N, k_pos)
    lambda_N = torch.full_like(log_w_N, lambda_neg).masked_fill(positive_N, lambda_pos)
    return (k_N * log_w_N + lambda_N * (1 - log_w_N.exp())).exp()


def vespo(weights_N: torch.Tensor, advantages_N: torch.Tensor, logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Variational sequence-level soft policy optimisation (2602.10693): a soft sequence weight replaces the clip.

    .. math:: -\mathrm{sg}[\phi(w_s)]\, A_t \log \pi(y_t)

    Args:
        weights_N: [N] phi, see `vespo_weight`.
        advantages_N: [N] A; no gradient.
        logprobs_N: [N] log-probabilities under the current policy.

    Returns:
        [N] losses, not reduced.
    """
    assert weights_N.shape == advantages_N.shape == logprobs_N.shape
    return -weights_N.detach() * advantages_N.detach() * logprobs_N


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Inputs of a policy loss.

    Attributes:
        log_ratio: [N] log of the importance ratio, with gradient (see `log_ratio`).
        advantages: [N] advantages, no gradient.
        logprobs: [N] log-probabilities under the current policy.
        sequence_log_weight: [N] log importance weight of the whole sequence, no gradient (see `sequence_log_weight`).
    """

    log_ratio: torch.Tensor
    advantages: torch.Tensor
    logprobs: torch.Tensor
    sequence_log_weight: torch.Tensor


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """Hyperparameters of the losses, named as their configuration fields."""

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    @property
    def high(self) -> float:
        """Upper clip range."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


Metric = Callable[[PolicyTerms, PolicyOptions], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """One policy loss: a row of `POLICY_LOSSES`.

    Attributes:
        compute: (terms, options) -> [N] losses and an [N] mask of clipped tokens.
        reduction: see `aggregate`.
        takes_correction: include the sampler-correction weights in `terms.sequence_log_weight` instead of multiplying
            the losses by them.
        metrics: name -> (terms, options) -> [N] values; the mean over sequences of their means is logged.
    """

    compute: Callable[[PolicyTerms, PolicyOptions], tuple[torch.Tensor, torch.Tensor]]
    reduction: Reduction
    takes_correction: bool = False
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])


def _clip(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    return clipped_surrogate(
        terms.log_ratio,
        terms.advantages,
        epsilon_low=options.epsilon,
        epsilon_high=options.high,
        delta=options.delta,
    )


def _sapo(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    losses_N = sapo(
        terms.log_ratio,
        terms.advantages,
        temperature_pos=options.sapo_temperature_pos,
        temperature_neg=options.sapo_temperature_neg,
    )
    return losses_N, torch.zeros_like(losses_N, dtype=torch.bool)


def _vespo_weight(terms: PolicyTerms, options: PolicyOptions) -> torch.Tensor:
    return vespo_weight(
        terms.sequence_log_weight,
        terms.advantages,
        k_pos=options.vespo_k_pos,
        lambda_pos=options.vespo_lambda_pos,
        k_neg=options.vespo_k_neg,
        lambda_neg=options.vespo_lambda_neg,
    )


def _vespo(terms: PolicyTerms, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    losses_N = vespo(_vespo_weight(terms, options), terms.advantages, terms.logprobs)
    return losses_N, torch.zeros_like(losses_N, dtype=torch.bool)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss(_clip, "sequence"),
    "bnpo": PolicyLoss(_clip, "token"),
    "dapo": PolicyLoss(_clip, "token"),
    "dr_grpo": PolicyLoss(_clip, "constant"),
    "luspo": PolicyLoss(_clip, "sum"),
    "cispo": PolicyLoss(lambda t, o: cispo(t.log_ratio, t.advantages, t.logprobs, bound=o.high), "token"),
    "sapo": PolicyLoss(_sapo, "sequence"),
    "vespo": PolicyLoss(_vespo, "token", takes_correction=True, metrics={"vespo/phi_seq_mean": _vespo_weight}),
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
    r"""DeepSeek-V3.2's off-policy mask (2512.02556): drop negative samples that have become unlikely.

    .. math::
        m_t = 0 \text{ where } A_t < 0 \text{ and }
        \frac{1}{|s|} \sum_{u \in s} \log\frac{\pi_{old}(y_u)}{\pi(y_u)} > \delta, \quad 1 \text{ elsewhere}

    Args:
        logprobs_N: [N] log-probabilities under the current policy.
        sampled_logprobs_N: [N] log-probabilities when the completions were sampled.
        advantages_N: [N] A.
        threshold: delta, in nats per token.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] 1 or 0; no gradient.
    """
    assert logprobs_N.shape == sampled_logprobs_N.shape == advantages_N.shape == sequence_index_N.shape
    moved_N = (sampled_logprobs_N - logprobs_N).detach()
    means_N = sequence_means(moved_N, sequence_index_N, num_sequences)[sequence_index_N]
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
    r"""Importance weights that correct for a sampler whose distribution differs from the trainer's.

    .. math:: w_t = \frac{\pi_{old}(y_t)}{\mu(y_t)}, \qquad w_s = \prod_{t \in s} w_t

    with mu the sampler's distribution. `truncate` bounds weights from above (truncated importance sampling); `mask`
    zeroes those outside the bounds (IcePop, 2510.18855, uses 0.5 and 5 per token).

    Args:
        old_logprobs_N: [N] log-probabilities under the trainer before the first update on these samples.
        sampler_logprobs_N: [N] log-probabilities of the sampler.
        kind: level (token or sequence) and treatment (truncate or mask).
        maximum: largest weight; None for no bound.
        minimum: smallest weight of a mask; None for no bound.
        sequence_index_N: [N] sequence of each token.
        num_sequences: S.

    Returns:
        [N] weights; no gradient.
    """
    assert old_logprobs_N.shape == sampler_logprobs_N.shape == sequence_index_N.shape
    level, treatment = kind.split("_")
    difference_N = (old_logprobs_N - sampler_logprobs_N).detach()
    if level == "sequence":
        difference_N = sequence_sums(difference_N, sequence_index_N, num_sequences)[sequence_index_N]
    weights_N = difference_N.exp()
    low, high = minimum or 0.0, float("inf") if maximum is None else maximum
    if treatment == "truncate":
        return weights_N.clamp(max=high)
    return torch.where((weights_N >= low) & (weights_N <= high), weights_N, 0.0)
