"""Estimators of the Kullback-Leibler divergence to a reference policy from samples of the policy."""

from __future__ import annotations

import torch

__all__ = ["kl_k3"]


def kl_k3(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Schulman's k3 estimator of KL(pi || ref), unbiased and non-negative, as GRPO uses it (2402.03300).

    .. math:: e^{d} - d - 1, \quad d = \log \pi_{ref}(y_t) - \log \pi(y_t)

    Args:
        logprobs_N: [N] log-probabilities under the policy.
        ref_logprobs_N: [N] log-probabilities under the reference; no gradient.

    Returns:
        [N] estimates in nats.
    """
    assert logprobs_N.shape == ref_logprobs_N.shape
    difference_N = ref_logprobs_N.detach() - logprobs_N
    return difference_N.exp() - difference_N - 1
