"""Estimators of the KL divergence from a reference policy, on samples of the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["KL_ESTIMATORS", "adapted_beta", "kl_k1", "kl_k2", "kl_k3"]


def kl_k1(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Estimate KL(pi || ref) by the log-ratio: unbiased, but may be negative.

    .. math:: \log \pi(y_t) - \log \pi_{ref}(y_t)

    Its gradient is the score function, 0 in expectation: in a loss it must be multiplied by the importance ratio.

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    assert logprobs_N.shape == ref_logprobs_N.shape
    return logprobs_N - ref_logprobs_N.detach()


def kl_k2(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Estimate KL(pi || ref) by half the squared log-ratio: biased, but with an unbiased gradient.

    .. math:: \tfrac12 \big(\log \pi(y_t) - \log \pi_{ref}(y_t)\big)^2

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    return 0.5 * kl_k1(logprobs_N, ref_logprobs_N) ** 2


def kl_k3(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Estimate KL(pi || ref) by Schulman's k3, unbiased and non-negative, as in GRPO (2402.03300).

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
    r"""Update the KL coefficient by Ziegler et al.'s controller (1909.08593).

    .. math:: \beta \Big(1 + \mathrm{clip}\big(\tfrac{KL}{target} - 1, -0.2, 0.2\big) \tfrac{n}{horizon}\Big)

    Args:
        beta: the current coefficient.
        kl: mean divergence per completion, in nats.
        target: target divergence per completion, in nats.
        num_completions: n, completions since the last update.
        horizon: time constant of the controller, in completions.

    Returns:
        The next coefficient.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * num_completions / horizon)
