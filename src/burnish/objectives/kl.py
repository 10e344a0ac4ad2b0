"""Estimators of the Kullback-Leibler divergence to a reference policy from samples of the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["KL_ESTIMATORS", "adapted_beta", "kl_k1", "kl_k2", "kl_k3"]


def kl_k1(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""The log-ratio, an unbiased estimate of KL(pi || ref) that may be negative.

    .. math:: \log \pi(y_t) - \log \pi_{ref}(y_t)

    Its gradient is that of the log-likelihood, 0 on average: in a loss it needs the importance ratio as a factor.

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    assert logprobs_N.shape == ref_logprobs_N.shape
    return logprobs_N - ref_logprobs_N.detach()


def kl_k2(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Half the squared log-ratio: a biased estimate of KL(pi || ref) whose gradient is unbiased.

    .. math:: \tfrac12 \big(\log \pi(y_t) - \log \pi_{ref}(y_t)\big)^2

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    return 0.5 * kl_k1(logprobs_N, ref_logprobs_N) ** 2


def kl_k3(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Schulman's k3 estimator of KL(pi || ref), unbiased and non-negative, as GRPO uses it (2402.03300).

    .. math:: e^{d} - d - 1, \quad d = \log \pi_{ref}(y_t) - \log \pi(y_t)

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    difference_N = -kl_k1(logprobs_N, ref_logprobs_N)
    return difference_N.exp() - difference_N - 1


KL_ESTIMATORS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
}
"""`kl_estimator` -> function."""


def adapted_beta(beta: float, kl: float, *, target: float, num_completions: int, horizon: int) -> float:
    r"""The next KL coefficient of Ziegler et al.'s controller (1909.08593).

    .. math:: \beta \Big(1 + \mathrm{clip}\big(\tfrac{KL}{target} - 1, -0.2, 0.2\big) \tfrac{n}{horizon}\Big)

    Args:
        beta: the coefficient so far.
        kl: mean divergence of a completion, in nats.
        target: the divergence to reach, in nats a completion.
        num_completions: n, completions since the last change.
        horizon: completions over which beta may change by a factor.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * num_completions / horizon)
