"""Losses of imitation."""

from __future__ import annotations

import torch

__all__ = ["nll"]


def nll(logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of each scored token, :math:`-\log \pi(y_t \mid y_{<t})`, in nats.

    Args:
        logprobs_N: [N] log-probabilities.

    Returns:
        [N] losses, not reduced.
    """
    return -logprobs_N
