"""Interface of online algorithms: the advantages of scored samples, and the loss of the steps that train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from burnish.model.scoring import Scores
from burnish.rollout.prompts import Shard
from burnish.training.stage import Run
from burnish.training.step import Loss, Step
from burnish.types import Completion, Group, PackedBatch

if TYPE_CHECKING:
    from burnish.stages.online import OnlineStage

__all__ = ["Algorithm"]


class Algorithm:
    """An online algorithm: turns rewards into advantages, groups into steps, and log-probabilities into a loss.

    Args:
        args: the trainer's config.
    """

    whole_groups = False
    """True if the loss couples the completions of a group."""

    needs_entropy = False
    """True if the loss uses the entropy of each token."""

    stage: OnlineStage
    run: Run

    def __init__(self, args: Any) -> None:
        self.args = args

    def join(self, stage: OnlineStage) -> None:
        """Build what depends on the model; the stage already has its reference and its engine."""
        self.stage, self.run = stage, stage.run

    @property
    def compared(self) -> str:
        """The baseline of a completion's reward: "group", "batch" or "run"; see `assess_rewards`."""
        return "group"

    @property
    def passes(self) -> int:
        """Passes over each rollout."""
        return 1

    @property
    def corrects_sampling(self) -> bool:
        """Whether the loss corrects for samples from a distribution other than the policy's."""
        return False

    def check_samples(self, completions: Sequence[Completion], engine: str) -> None:
        """Refuse samples that lack what the loss needs; `engine` is the name of their engine."""

    def in_loss(self, completion: Completion) -> bool:
        """Return whether a completion has a reward and is not masked as truncated."""
        masked = self.args.mask_truncated_completions and completion.is_truncated
        return completion.reward is not None and not masked

    def reward_components(self, completion: Completion) -> tuple[float, ...] | None:
        """Return the rewards that a completion's advantage is computed from, or None where it has none."""
        reward = completion.reward
        return None if reward is None else (reward,)

    def learns_without_rewards(self) -> bool:
        """Return whether other terms of the loss have a gradient where no reward differs."""
        return False

    def needs_old_logprobs(self, group: Group) -> bool:
        """Return whether `assign_advantages` uses the policy's recomputed log-probabilities of a fresh group."""
        return False

    def assign_advantages(self, shards: Sequence[Shard]) -> Mapping[str, float]:
        """Write the advantages of a rollout into the streams of its completions.

        Args:
            shards: this rank's shard of the scored groups, with their log-probabilities.

        Returns:
            Metrics of the rollout.
        """
        return {}

    def begin_step(self, groups: Sequence[Group], *, is_on_policy: bool) -> Step:
        """Return the step that trains on groups; a critic is updated here."""
        return self.step(groups, is_on_policy=is_on_policy)

    def step(self, groups: Sequence[Group], *, is_on_policy: bool = False) -> Step:
        """Select the groups with a gradient and count the terms of their loss over all ranks."""
        raise NotImplementedError

    def loss(self, scores: Scores, batch: PackedBatch, step: Step) -> Loss:
        """Compute the contribution of a packed part, which may be empty, to the loss of the step."""
        raise NotImplementedError

    def differentiates_entropy(self, step: Step) -> bool:
        """Return whether the loss of a step has a gradient by the entropy; without one, the head is faster."""
        return True

    def end_step(self) -> Mapping[str, float]:
        """Update adaptive coefficients once the gradients of a step are complete; return metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the adaptive coefficients, as JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; fixed coefficients come from the configuration."""

    def save_state(self, folder: Path) -> None:
        """Save what is too large for `state_dict`; called on the first rank."""

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Load what `save_state` saved; the settings in `changed` take precedence."""

    def save_beside(self, folder: Path) -> None:
        """Save models delivered beside the policy."""

    def trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the other models that train, by argument of the trainer."""
        return {}
