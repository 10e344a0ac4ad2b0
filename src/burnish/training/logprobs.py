"""Log-probabilities of sampled completions under a model, kept beside their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from burnish.errors import CheckFailed
from burnish.model.packing import pack, unpack
from burnish.model.scoring import score
from burnish.types import Group

__all__ = ["LogprobName", "fill_logprobs"]

LogprobName = Literal["old_logprobs", "ref_logprobs"]
"""Attributes of a completion that `fill_logprobs` writes."""


@torch.no_grad()
def fill_logprobs(groups: Sequence[Group], name: LogprobName, model: torch.nn.Module, *, args: Any, step: int) -> None:
    """Write the log-probability of every token under a model into the completions, in one forward.

    Args:
        groups: within the token budget.
        name: the attribute to write.
        model: prepared for scoring.
        args: the trainer's config, for `device` and `temperature`.
        step: of the optimizer, for messages.

    Raises:
        CheckFailed: one is not finite.
    """
    batch = pack(groups).to(args.device)
    logprobs = unpack(groups, score(model, batch, temperature=args.temperature).logprobs.tolist())
    completions = [completion for group in groups for completion in group.completions]
    for completion, values in zip(completions, logprobs, strict=True):
        if not all(map(math.isfinite, values)):
            raise CheckFailed(
                f"step {step}: {name} are not finite. The policy or its reference overflows: lower learning_rate, or "
                "go back to an earlier checkpoint."
            )
        setattr(completion, name, values)
