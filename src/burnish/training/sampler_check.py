"""The default check that fresh samples were drawn from the policy that the trainer differentiates."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from burnish.errors import CheckFailed
from burnish.objectives.kl import kl_k3

__all__ = ["Agreement", "default_bound"]


_WINDOW_TOKENS = 2048
"""Rounding noise is heavy-tailed: at an undecided token of a bf16 model, one that all samples of a prompt share, it can
reach 2 nats. So a verdict needs this many tokens, or as much divergence as they would need."""

_CLIP_NATS = 1.0
"""Largest difference that one token counts with."""


def default_bound(dtype: torch.dtype) -> float:
    """The divergence, in nats a token, that rounding does not explain.

    Rounding noise d between two ways of computing a log-probability contributes E[d^2]/2: below 0.004 for a bf16 model
    on text it finds surprising, where d is 0.08. Sampling such text at temperature 1.2 instead of 1 gives about 0.02.
    """
    return 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6


class Agreement:
    """Compares the log-probabilities of sampler and trainer on fresh samples.

    At the first update on fresh samples both are one distribution, and only rounding is left. Two statistics say
    whether it is: the mean |difference| of each step, and the mean over tokens of the k3 estimate of
    KL(sampler || trainer) over as many of the last steps as hold 2,048 tokens. In both a token counts with 1 nat at
    most.

    Args:
        bound: of the KL, in nats a token.
        mean_bound: of the mean |difference| of a step, in nats; the square root of `bound` if None.
    """

    def __init__(self, bound: float, mean_bound: float | None = None) -> None:
        self.bound = bound
        self.mean_bound = math.sqrt(bound) if mean_bound is None else mean_bound
        self._sums = torch.zeros(3, dtype=torch.float64)  # of k3, of |difference|, of tokens
        self._largest = 0.0
        self._window: deque[tuple[float, float]] = deque()

    def report_only(self) -> None:
        """Stop no run any more, but for what is not a number: somebody else accounts for the difference."""
        self.bound = self.mean_bound = math.inf

    def add(self, logprobs_N: torch.Tensor, sampled_logprobs_N: torch.Tensor) -> None:
        """[N] trainer's and [N] sampler's log-probabilities of fresh samples."""
        difference_N = (logprobs_N - sampled_logprobs_N).double()
        divergence = float(kl_k3(torch.zeros_like(difference_N), difference_N.clamp(-_CLIP_NATS, _CLIP_NATS)).sum())
        apart = difference_N.abs()
        clipped = float(apart.clamp(max=_CLIP_NATS).sum())
        self._sums += torch.tensor([divergence, clipped, apart.numel()], dtype=torch.float64)
        self._largest = max(self._largest, float(apart.max()))

    def flush(
        self, step: int, sum_over_ranks: Callable[[float], float], max_over_ranks: Callable[[float], float]
    ) -> dict[str, float]:
        """Metrics of the step; nothing where no fresh sample was compared.

        Raises:
            CheckFailed: the divergence is above the bound, or not a number.
        """
        divergence, difference, count = (sum_over_ranks(value) for value in self._sums.tolist())
        largest = max_over_ranks(self._largest)
        self._sums.zero_()
        self._largest = 0.0
        if count == 0:
            return {}
        self._window.append((divergence, count))
        while sum(tokens for _, tokens in self._window) - self._window[0][1] >= _WINDOW_TOKENS:
            self._window.popleft()
        tokens = sum(tokens for _, tokens in self._window)
        apart = sum(value for value, _ in self._window) / max(tokens, _WINDOW_TOKENS)
        if not math.isfinite(apart):
            raise CheckFailed(
                f"step {step}: log-probabilities of samples or of the trainer are not finite; the step is not taken. "
                "The policy diverged, or overflows: lower learning_rate, or go back to an earlier checkpoint."
            )
        if not (apart <= self.bound and difference / count <= self.mean_bound):
            raise CheckFailed(
                f"step {step}: samples and trainer are {apart:.3g} nats a token apart in KL over the last {tokens:.0f} "
                f"tokens (bound {self.bound:g}), and in this step log-probabilities differ by {difference / count:.3g} "
                f"on average (bound {self.mean_bound:g}), {largest:.3g} at most; the step is not taken. The engine "
                "samples from other weights, another temperature or another dtype; set logprob_check_bound only where "
                "you know why."
            )
        return {
            "sampling/kl": divergence / count,
            "sampling/logprob_difference/mean": difference / count,
            "sampling/logprob_difference/max": largest,
        }
