"""The KL penalty towards the reference, in the reward or in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from burnish.objectives.kl import KL_ESTIMATORS, adapted_beta
from burnish.training.ranks import Ranks
from burnish.types import Completion

__all__ = ["KLPenalty"]


class KLPenalty:
    """The coefficient of the KL: fixed at `beta`, or adapted to `kl_target` after each rollout.

    Args:
        args: a config with the fields `beta` and `kl_*`.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self.coefficient: float = args.beta
        """Coefficient of the current rollout and its steps."""
        self._next: float = args.beta
        self.is_in_reward = args.kl_in == "reward"

    def begin_rollout(self, completions: Sequence[Completion], ranks: Ranks) -> dict[str, float]:
        """Write the stream `kl`, apply the coefficient adapted to the last rollout, and adapt the next.

        Args:
            completions: this rank's completions, with `ref_logprobs`, before the first update on them.
            ranks: the coefficient follows the KL over all ranks.

        Returns:
            Metrics of the rollout.
        """
        estimate = KL_ESTIMATORS[self._args.kl_estimator]
        for completion in completions:
            sampled = completion.token.get("old_logprobs") or completion.policy_logprobs
            reference = completion.token.get("ref_logprobs")
            if reference is not None and sampled is not None:
                wide = (torch.tensor(values, dtype=torch.float64) for values in (sampled, reference))
                completion.token["kl"] = estimate(*wide).tolist()
        self.coefficient = self._next
        kl_S = [sum(c.token["kl"]) for c in completions if "kl" in c.token]
        num_tokens = sum(c.num_scored_tokens for c in completions if "kl" in c.token)
        total, count, length = (ranks.sum(float(value)) for value in (sum(kl_S), len(kl_S), num_tokens))
        metrics = {"kl": total / max(length, 1.0)} if self.is_in_reward else {}
        if self._args.kl_target is not None:
            metrics["kl_coef"] = self.coefficient
            self._next = adapted_beta(
                self.coefficient,
                total / max(count, 1.0),
                target=self._args.kl_target,
                num_completions=round(count),
                horizon=self._args.kl_horizon,
            )
        return metrics

    def state_dict(self) -> dict[str, float]:
        """Return the coefficients of this rollout and the next, as JSON."""
        return {"beta": self.coefficient, "next_beta": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore adaptive coefficients; a fixed one comes from the configuration."""
        if self._args.kl_target is not None:
            self.coefficient, self._next = float(state["beta"]), float(state["next_beta"])
