"""Supervised fine-tuning losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["SUPERVISED_LOSSES", "dft", "nll"]


def nll(logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of each scored token, :math:`-\log \pi(y_t \mid y_{<t})`, in nats.

    Args:
        logprobs_N: [N] log-probabilities.

    Returns:
        [N] losses, not reduced.
    """
    return -logprobs_N


def dft(logprobs_N: torch.Tensor) -> torch.Tensor:
    r"""Dynamic fine-tuning (2508.05629): negative log-likelihood weighted by the token's own probability.

    .. math:: -\mathrm{sg}[\pi(y_t \mid y_{<t})] \log \pi(y_t \mid y_{<t})

    The weight is detached, so the gradient is :math:`-\nabla \pi(y_t)`: unlikely tokens count for less than in `nll`.

    Args:
        logprobs_N: [N] log-probabilities.

    Returns:
        [N] losses, not reduced.
    """
    return -logprobs_N.detach().exp() * logprobs_N


SUPERVISED_LOSSES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"dft": dft, "nll": nll}
"""`loss_type` -> per-token loss; each is divided by the number of scored tokens."""
