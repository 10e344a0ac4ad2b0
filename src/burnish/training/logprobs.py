"""Log-probabilities of sampled completions under a model, as a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from burnish.errors import CheckFailed
from burnish.model.packing import unpack
from burnish.model.scoring import score
from burnish.types import Group, PackedBatch

__all__ = ["fill_logprobs"]


@torch.no_grad()
def fill_logprobs(
    groups: Sequence[Group], batch: PackedBatch, name: str, model: torch.nn.Module, *, temperature: float, step: int
) -> None:
    """Write the log-probability of every token under a model into a stream of the completions.

    Args:
        groups: groups to score.
        batch: the groups packed into one row, on the model's device.
        name: stream to write.
        model: a model prepared for scoring.
        temperature: as in sampling.
        step: optimizer step, for messages.

    Raises:
        CheckFailed: one is not finite.
    """
    logprobs = unpack(groups, score(model, batch, temperature=temperature).logprobs.tolist())
    completions = [completion for group in groups for completion in group.completions]
    for completion, values in zip(completions, logprobs, strict=True):
        if not all(map(math.isfinite, values)):
            raise CheckFailed(
                f"step {step}: {name} are not finite. The policy or its reference overflows: lower learning_rate, or "
                "go back to an earlier checkpoint."
            )
        completion.token[name] = values
