"""The entropy bonus of a policy gradient, with a fixed or adaptive coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from burnish.objectives.entropy import adapted_entropy_coef

__all__ = ["EntropyBonus"]


class EntropyBonus:
    """The coefficient of the mean entropy in the loss.

    With `use_adaptive_entropy` it is adapted after each optimizer step to the entropy of all tokens of that step, and
    applied only after a step whose entropy was at most the target; the first step has no bonus. So all parts of a step
    have the same coefficient, whatever the split.

    Args:
        args: a config with the fields `use_adaptive_entropy` and `entropy_*`.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._coef = float(args.entropy_coef)
        self._last = math.inf
        self._sum, self._count = 0.0, 0

    @property
    def is_on(self) -> bool:
        """Whether there may be a bonus: an adaptive coefficient may rise from 0."""
        return self._coef != 0 or self._args.use_adaptive_entropy

    @property
    def coefficient(self) -> float:
        """The coefficient in the current step."""
        waits = self._args.use_adaptive_entropy and self._last > self._args.entropy_target
        return 0.0 if waits else self._coef

    def add(self, entropy_N: torch.Tensor, kept_N: torch.Tensor) -> None:
        """Add the [N] entropies of a part of a step, at tokens where [N] `kept_N` is 1."""
        if self._args.use_adaptive_entropy:
            self._sum += float((entropy_N.detach().double() * kept_N).sum())
            self._count += int(kept_N.sum())

    def end_step(self, sum_over_ranks: Callable[[float], float]) -> dict[str, float]:
        """Adapt the coefficient to the entropy of the step's tokens on all ranks; return it as a metric."""
        args = self._args
        if args.use_adaptive_entropy:
            total, count = sum_over_ranks(self._sum), sum_over_ranks(float(self._count))
            self._sum, self._count = 0.0, 0
            # A step without tokens in the loss has no entropy to adapt to.
            if count:
                self._last = total / count
                self._coef = adapted_entropy_coef(
                    self._coef,
                    self._last,
                    target=args.entropy_target,
                    minimum=args.entropy_coef_min,
                    maximum=args.entropy_coef_max,
                    delta=args.entropy_coef_delta,
                )
        return {"entropy_coef": self._coef} if self.is_on else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive state, as JSON; a fixed coefficient comes from the configuration."""
        if not self._args.use_adaptive_entropy:
            return {}
        return {"coef": self._coef, "entropy": self._last if math.isfinite(self._last) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; an empty state starts from the configuration."""
        self._sum, self._count = 0.0, 0
        if self._args.use_adaptive_entropy and state:
            self._coef = float(state["coef"])
            self._last = math.inf if state["entropy"] is None else float(state["entropy"])
