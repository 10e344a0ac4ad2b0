"""What an online algorithm is: what scored samples are worth, and the loss of the steps that learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.model.scoring import Scores
from burnish.rollout.prompts import Shard
from burnish.training.stage import Run
from burnish.training.step import Loss, Step
from burnish.types import Completion, Group, PackedBatch, StopReason

if TYPE_CHECKING:
    from burnish.stages.online import OnlineStage

__all__ = ["Algorithm"]


class Algorithm:
    """Rewards to advantages, groups to steps, scores to a loss.

    Args:
        args: the trainer's config.
    """

    whole_groups = False
    """Whether the completions of a group meet in one loss."""

    needs_entropy = False
    """Whether the loss reads the entropy at each token."""

    stage: OnlineStage
    run: Run

    def __init__(self, args: Any) -> None:
        self.args = args

    def join(self, stage: OnlineStage) -> None:
        """Make what needs the model in place; the stage has its reference and its engine."""
        self.stage, self.run = stage, stage.run

    @property
    def compared(self) -> str:
        """The baseline of a completion's reward: "group", "batch" or "run"; see `assess_rewards`."""
        return "group"

    @property
    def passes(self) -> int:
        """Times that each rollout is gone through."""
        return 1

    @property
    def corrects_sampling(self) -> bool:
        """Whether the loss accounts for samples from another distribution than the policy's."""
        return False

    def check_samples(self, completions: Sequence[Completion], engine: str) -> None:
        """Refuse samples that lack what the loss needs; `engine` names what they come from."""

    def in_loss(self, completion: Completion) -> bool:
        """Return whether a completion has a reward, and is not masked as truncated."""
        masked = self.args.mask_truncated_completions and completion.stop_reason is StopReason.LENGTH
        return completion.reward is not None and not masked

    def reward_components(self, completion: Completion) -> tuple[float, ...] | None:
        """Return the rewards that a completion's advantage is computed from, or None where it has none."""
        reward = completion.reward
        return None if reward is None else (reward,)

    def learns_without_rewards(self) -> bool:
        """Return whether other terms of the loss have a gradient where no reward differs."""
        return False

    def needs_old_logprobs(self, group: Group) -> bool:
        """Return whether `assign_advantages` reads the policy's own log-probabilities of a group it just sampled."""
        return False

    def assign_advantages(self, shards: Sequence[Shard]) -> Mapping[str, float]:
        """Turn the rewards of a rollout into streams of its completions.

        Args:
            shards: this rank's part of the scored groups, with their log-probabilities.

        Returns:
            Metrics of the rollout.
        """
        return {}

    def begin_step(self, groups: Sequence[Group], *, is_on_policy: bool) -> Step:
        """Make the step that trains on groups; a critic takes its own step here."""
        return self.step(groups, is_on_policy=is_on_policy)

    def step(self, groups: Sequence[Group], *, is_on_policy: bool = False) -> Step:
        """Select the groups with a gradient and count the terms of their loss, over all ranks."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: PackedBatch, step: Step) -> Loss:
        """Compute a packed part's share of the loss from its log-probabilities; a part may be empty."""
        raise NotImplementedError

    def end_step(self) -> Mapping[str, float]:
        """Adapt to a step whose gradients are complete; returns metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients that move during training, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; a coefficient that is fixed is the configuration's."""

    def save_state(self, folder: Path) -> None:
        """Write what is too large for `state_dict`; the first rank does."""

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Read back what `save_state` wrote; the settings in `changed` are new and win."""

    def save_beside(self, folder: Path) -> None:
        """Write what is delivered beside the policy."""

    def trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return models beside the policy that train too, by argument of the trainer."""
        return {}
