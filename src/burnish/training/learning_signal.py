"""Detect optimizer steps without a learning signal, warn of them by name and stop the run; see docs/checks.md."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.errors import CheckFailed
from burnish.rewards import Rubric, count_answers
from burnish.rollout.prompts import Shard
from burnish.types import Completion

__all__ = [
    "UNKNOWN",
    "Assessment",
    "LearningMonitor",
    "Outcome",
    "assess_gradient",
    "assess_loss",
    "assess_rewards",
    "assess_rollout",
]

_logger = logging.getLogger(__name__)

_NO_GRADIENT = 1e-12
"""A gradient norm below this moves no weight: rounding alone makes more in a model that still learns."""

_LOSS_LEFT = 0.05
"""Fraction of the first loss below which learning may be complete."""

_NO_REWARDS = (math.inf, -math.inf)
"""The (lowest, highest) reward of an empty set."""

_WARN_AFTER = 5
"""Steps in a row before a run that has learned is warned: one batch of solved prompts is ordinary."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """The learning signal of an optimizer step.

    Attributes:
        kind: "learning", "unknown", or the name of the problem; each problem is reported once.
        problem: a clause that describes the problem.
        fix: a sentence that says what to do next.
        final: True if a run that has finished learning never looks like this.
        stops: whether the problem may stop the run; False where other terms of the loss have a signal.
        level: the reward that every completion got, where it must be compared with that of other steps.
        lowest, highest: range of the step's rewards.
    """

    kind: str = "learning"
    problem: str = ""
    fix: str = ""
    final: bool = True
    stops: bool = True
    level: float | None = None
    lowest: float = math.inf
    highest: float = -math.inf


UNKNOWN = Assessment("unknown")
"""Assessment of a step that is not counted, such as one that trains only the critic."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rewards of one completion.

    Attributes:
        rewards: the inputs of its advantage, one number or one per criterion; None where it has no reward.
        is_masked: excluded from the loss because it was truncated.
    """

    rewards: tuple[float, ...] | None
    is_masked: bool = False


def assess_rewards(
    groups: Sequence[Sequence[Outcome]],
    *,
    compared: str = "group",
    max_completion_length: int,
    diagnose: Callable[[], str | None] = lambda: None,
) -> Assessment:
    """Assess whether rewards carry a learning signal.

    Args:
        groups: outcomes of each prompt's completions.
        compared: the baseline of a completion's reward: its "group", the "batch" (the whole step), or the "run" (all
            steps, from each of which a critic learns).
        max_completion_length: for the message.
        diagnose: describes what the rubric reads from these completions; called only where there is no signal.
    """
    outcomes = [outcome for group in groups for outcome in group]
    count = len(outcomes)
    if all(outcome.rewards is None for outcome in outcomes):
        fix = diagnose() or "Every reward failed or abstained: read `errors` in the transcripts."
        return Assessment("no_reward", f"none of {count} completions has a reward", fix)
    if all(outcome.is_masked or outcome.rewards is None for outcome in outcomes):
        return Assessment(
            "all_truncated",
            f"all {count} completions are truncated at max_completion_length = {max_completion_length} and masked",
            "Raise max_completion_length, give stop strings or an EOS token that the model writes, or set "
            "mask_truncated_completions = false.",
        )
    kept = [[o.rewards for o in group if o.rewards is not None and not o.is_masked] for group in groups]
    seen = [rewards for group in kept for rewards in group]
    lowest, highest = min(map(min, seen)), max(map(max, seen))
    if any(len(set(rows)) > 1 for rows in (kept if compared == "group" else [seen])):
        return Assessment(lowest=lowest, highest=highest)
    values = f"all {len(seen)} are {lowest:g}"
    if lowest != highest:
        values = f"those of each prompt are equal, from {lowest:g} to {highest:g}"
    return Assessment(
        "constant_reward",
        f"no reward differs from those it is compared with: {values}",
        diagnose() or "Read the transcripts; give prompts that are neither always nor never solved, or finer rewards.",
        final=False,
        level=highest if compared == "run" else None,
        lowest=lowest,
        highest=highest,
    )


def assess_rollout(
    shards: Sequence[Shard],
    *,
    rubric: Rubric,
    outcome: Callable[[Completion], Outcome],
    gathered: Callable[[Sequence[Any]], list[Any]],
    compared: str,
    max_completion_length: int,
    is_first: bool,
) -> Assessment:
    """Assess the rewards of a rollout over all ranks; after the first one, warn of criteria that find no answer.

    Args:
        shards: this rank's shard of the batch.
        rubric: the rubric that scored it.
        outcome: the outcome of a completion.
        gathered: concatenates the lists of all ranks.
        compared: see `assess_rewards`.
        max_completion_length: for the message.
        is_first: whether this is the run's first rollout.
    """
    groups: dict[int, list[Outcome]] = defaultdict(list)
    for position, outcomes in gathered([(s.position, [outcome(c) for c in s.group.completions]) for s in shards]):
        groups[position] += outcomes

    def diagnose() -> str | None:
        texts = [completion.text for shard in shards for completion in shard.group.completions]
        return " ".join(message for counts in count_answers(rubric, texts) if (message := counts.message())) or None

    assessment = assess_rewards(
        list(groups.values()), compared=compared, max_completion_length=max_completion_length, diagnose=diagnose
    )
    if is_first and assessment.kind == "learning" and (message := diagnose()):
        _logger.warning("the first completions: %s", message)
    return assessment


def assess_gradient(grad_norm: float, *, loss_left: float = 1.0) -> Assessment:
    """Assess whether the gradient moves any weight.

    Args:
        grad_norm: norm of the complete gradient, before clipping.
        loss_left: the loss over that of the first step: near 0, a zero gradient may be the end of learning.
    """
    if grad_norm > _NO_GRADIENT:
        return Assessment()
    return Assessment(
        "zero_gradient",
        f"the gradient is zero (norm {grad_norm:g})",
        "The loss is saturated, or does not depend on the weights that train: lower learning_rate, and check which "
        "weights require a gradient.",
        final=loss_left > _LOSS_LEFT,
    )


def assess_loss(loss: float, start: float, *, uniform: float | None) -> Assessment:
    """Assess whether the loss diverged: far above its start, and above that of guessing.

    Args:
        loss: loss of this step.
        start: loss of the first step.
        uniform: ln V, the loss of a uniform distribution, for a loss of tokens; None for others.
    """
    bound = 10 * max(start, 0.5) if uniform is None else max(0.9 * uniform, 1.2 * start)
    if loss < bound:
        return Assessment()
    guess = "" if uniform is None else f"; guessing costs ln V = {uniform:.3g}"
    return Assessment(
        "diverged",
        f"the loss is {loss:.3g}, after {start:.3g} in the first step{guess}",
        "The weights are destroyed: start again or resume from an earlier checkpoint, with a lower learning_rate or a "
        "longer warm-up.",
    )


class LearningMonitor:
    """Count consecutive steps without a learning signal, warn of each problem, and stop the run after too many.

    A run that has learned for at least as many steps continues where it may be complete: every prompt is solved, or a
    loss near zero has no gradient. It stops where it cannot be complete: no completion has a reward, all are truncated,
    the loss diverged, or every completion gets the lowest reward of the run so far.

    Args:
        limit: `max_dead_steps`; 0 or None only warns.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit or 0
        self.uniform_loss: float | None = None
        """ln V, the loss of a uniform distribution, where the loss is one of tokens."""
        self.learning_steps = 0
        """Steps so far with a learning signal."""
        self.dead_steps = 0
        """Consecutive steps up to now without one."""
        self.start_loss: float | None = None
        self.has_work = False
        """True if any rank has a completion with a gradient in this step."""
        self._count = 0.0
        self._assessment: Assessment | None = None
        self._losses: list[torch.Tensor] = []
        self._watched: list[torch.Tensor] = []
        self._range_of_run = self._range_of_streak = _NO_REWARDS
        self._level: float | None = None
        self._last = UNKNOWN
        self._warned: set[str] = set()

    def begin_step(self, count: float, *, has_work: bool, assessment: Assessment | None = None) -> None:
        """Begin a step: forget the losses of the last one.

        Args:
            count: terms of its loss, over all ranks.
            has_work: whether any rank has a group with a gradient.
            assessment: that of its samples; None to assess its loss.
        """
        self._count, self.has_work, self._assessment = count, has_work, assessment
        self._losses, self._watched = [], []

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a part of the step's loss."""
        self._losses.append(loss.detach())

    def watch(self, loss: torch.Tensor) -> None:
        """Add a part of another loss, which is assessed instead of the step's."""
        self._watched.append(loss.detach())

    def assess_step(self, grad_norm: float, mean_over_ranks: Callable[[float], float]) -> Assessment:
        """Assess a step by its samples or its loss, and by its gradient; the same on every rank.

        Args:
            grad_norm: norm of the complete gradient.
            mean_over_ranks: averages this rank's part of the loss.
        """
        if self._assessment is not None:
            if self._assessment.kind != "learning":
                return self._assessment
            flat = assess_gradient(grad_norm) if self.has_work else UNKNOWN
            return self._assessment if flat.kind == "learning" else flat
        loss = mean_over_ranks(float(sum(self._watched or self._losses)))
        if self._count == 0:
            return Assessment(
                "nothing_scored",
                "nothing of the step is in the loss",
                "Every token is masked, or every row was truncated: check assistant_only_loss, completion_only_loss "
                "and max_length.",
            )
        start = self.start_loss = loss if self.start_loss is None else self.start_loss
        flat = assess_gradient(grad_norm, loss_left=abs(loss) / max(abs(start), 1e-6))
        return flat if flat.kind != "learning" else assess_loss(loss, start, uniform=self.uniform_loss)

    def end_step(self, step: int, assessment: Assessment) -> None:
        """Count one optimizer step, before its update.

        Args:
            step: its number, from 1.
            assessment: its assessment.

        Raises:
            CheckFailed: the limit is reached.
        """
        if assessment.kind == "unknown":
            return
        before, self._level = self._level, assessment.level
        if assessment.level is not None and before not in (None, assessment.level):
            # Rewards are equal within the step only, and a critic compares them with those of other steps.
            assessment = Assessment(lowest=assessment.lowest, highest=assessment.highest)
        self._last = assessment
        self._range_of_run = _extended(self._range_of_run, assessment)
        if assessment.kind == "learning":
            self.learning_steps, self.dead_steps, self._range_of_streak = self.learning_steps + 1, 0, _NO_REWARDS
            return
        self.dead_steps += 1
        self._range_of_streak = _extended(self._range_of_streak, assessment)
        stops = assessment.stops and self.limit > 0 and not self._may_be_complete(assessment)
        if stops and self.dead_steps >= self.limit:
            raise CheckFailed(
                f"step {step}: {self.dead_steps} optimizer steps in a row had no learning signal: "
                f"{assessment.problem}. {assessment.fix} (max_dead_steps = {self.limit} stops such a run; 0 lets it "
                "continue.)"
            )
        if self.dead_steps >= (_WARN_AFTER if self.learning_steps else 1) and assessment.kind not in self._warned:
            self._warned.add(assessment.kind)
            then = f" The run stops after {self.limit} such steps in a row (max_dead_steps)." if stops else ""
            _logger.warning("step %d has no learning signal: %s. %s%s", step, assessment.problem, assessment.fix, then)

    def _may_be_complete(self, assessment: Assessment) -> bool:
        if assessment.final or not self.learning_steps:
            return False
        if assessment.kind == "constant_reward":
            (lowest, highest), (least, most) = self._range_of_run, self._range_of_streak
            if most <= lowest:
                return False
            if least >= highest:
                return True
        return self.learning_steps >= self.limit

    def end_run(self) -> None:
        """Warn if no step of the run had a learning signal."""
        if self.dead_steps and not self.learning_steps:
            _logger.warning(
                "none of the run's %d steps had a learning signal: %s. %s",
                self.dead_steps, self._last.problem, self._last.fix,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and reward ranges, as JSON."""
        return {
            "learning_steps": self.learning_steps,
            "dead_steps": self.dead_steps,
            "start_loss": self.start_loss,
            "level": self._level,
            "range_of_run": list(self._range_of_run),
            "range_of_streak": list(self._range_of_streak),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.learning_steps, self.dead_steps = int(state["learning_steps"]), int(state["dead_steps"])
        self.start_loss, self._level = state["start_loss"], state["level"]
        self._range_of_run, self._range_of_streak = tuple(state["range_of_run"]), tuple(state["range_of_streak"])


def _extended(rewards: tuple[float, float], assessment: Assessment) -> tuple[float, float]:
    return min(rewards[0], assessment.lowest), max(rewards[1], assessment.highest)
