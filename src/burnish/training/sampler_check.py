"""Check that fresh samples were drawn from the policy that the trainer differentiates."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from burnish.errors import CheckFailed
from burnish.objectives.kl import kl_k3

__all__ = ["SamplerCheck", "default_bound"]


_WINDOW_TOKENS = 2048
"""Fewest tokens that the divergence is averaged over. Rounding noise is heavy-tailed: at an undecided token of a bf16
model, which all samples of a prompt share, it can reach 2 nats."""

_CLIP_NATS = 1.0
"""Differences of single tokens are clipped to this."""


def default_bound(dtype: torch.dtype, *, cache_dtype: str | None = None) -> float:
    """Return the largest divergence that rounding explains, in nats per token.

    Args:
        dtype: the model's.
        cache_dtype: of the sampler's keys and values; None for the model's. int8 adds 2e-4, whatever the model's is.

    Rounding noise d between two ways of computing a log-probability contributes E[d^2]/2: below 0.004 for a bf16 model
    on text it finds surprising, where d is 0.08. Sampling such text at temperature 1.2 instead of 1 gives about 0.02.
    """
    return 1e-2 if cache_dtype == "int8" or dtype in (torch.bfloat16, torch.float16) else 1e-6


class SamplerCheck:
    """Compare the log-probabilities of sampler and trainer on fresh samples.

    At the first update on fresh samples both have the same distribution, up to rounding. Two statistics are bounded:
    the mean |difference| of each step, and the k3 estimate of KL(sampler || trainer), averaged over the tokens of as
    many of the last steps as hold 2,048 tokens. Differences of single tokens are clipped to 1 nat in both.

    Args:
        bound: bound of the KL, in nats per token.
        mean_bound: bound of the mean |difference| of a step, in nats; the square root of `bound` if None.
    """

    def __init__(self, bound: float, mean_bound: float | None = None) -> None:
        self.bound = bound
        self.mean_bound = math.sqrt(bound) if mean_bound is None else mean_bound
        self._parts: list[torch.Tensor] = []  # sums of k3, of |difference|, of tokens; the largest |difference|
        self._window: deque[tuple[float, float]] = deque()

    def report_only(self) -> None:
        """Fail only on values that are not finite: the loss corrects for the mismatch."""
        self.bound = self.mean_bound = math.inf

    def add(
        self, logprobs_N: torch.Tensor, sampled_logprobs_N: torch.Tensor, fresh_N: torch.Tensor | None = None
    ) -> None:
        """Add samples.

        Args:
            logprobs_N: [N] log-probabilities under the trainer.
            sampled_logprobs_N: [N] log-probabilities under the sampler.
            fresh_N: [N] mask of the tokens to compare; None for all.
        """
        fresh_N = torch.ones_like(logprobs_N, dtype=torch.bool) if fresh_N is None else fresh_N
        difference_N = torch.where(fresh_N, logprobs_N - sampled_logprobs_N, 0.0).double()
        divergence_N = kl_k3(torch.zeros_like(difference_N), difference_N.clamp(-_CLIP_NATS, _CLIP_NATS))
        size_N = difference_N.abs()
        sums = (divergence_N.sum(), size_N.clamp(max=_CLIP_NATS).sum(), fresh_N.sum().double())
        self._parts.append(torch.stack((*sums, size_N.max())))  # read once a step, when the device has got there

    def flush(
        self, step: int, sum_over_ranks: Callable[[float], float], max_over_ranks: Callable[[float], float]
    ) -> dict[str, float]:
        """Check the step and return its metrics; none if it compared no fresh samples.

        Raises:
            CheckFailed: the divergence is above the bound, or not a number.
        """
        parts = torch.stack(self._parts) if self._parts else torch.zeros(1, 4, dtype=torch.float64)
        self._parts = []
        divergence, difference, count = (sum_over_ranks(value) for value in parts[:, :3].sum(0).tolist())
        largest = max_over_ranks(float(parts[:, 3].max()))
        if count == 0:
            return {}
        self._window.append((divergence, count))
        while sum(tokens for _, tokens in self._window) - self._window[0][1] >= _WINDOW_TOKENS:
            self._window.popleft()
        tokens = sum(tokens for _, tokens in self._window)
        kl = sum(value for value, _ in self._window) / max(tokens, _WINDOW_TOKENS)
        if not math.isfinite(kl):
            raise CheckFailed(
                f"step {step}: log-probabilities of samples or of the trainer are not finite; the step is not taken. "
                "The policy diverged, or overflows: lower learning_rate, or go back to an earlier checkpoint."
            )
        if not (kl <= self.bound and difference / count <= self.mean_bound):
            raise CheckFailed(
                f"step {step}: sampler and trainer mismatch: their KL is {kl:.3g} nats per token over the last "
                f"{tokens:.0f} tokens (bound {self.bound:g}), and log-probabilities of this step differ by "
                f"{difference / count:.3g} on average (bound {self.mean_bound:g}), {largest:.3g} at most; the step is "
                "not taken. The engine samples with other weights, another temperature or another dtype; raise "
                "logprob_check_bound only if you know why."
            )
        return {
            "sampling/kl": divergence / count,
            "sampling/logprob_difference/mean": difference / count,
            "sampling/logprob_difference/max": largest,
        }
