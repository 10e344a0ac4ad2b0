"""Steps that teach nothing: named once, and stopped where nothing else happens (the rule is in docs/checks.md)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.errors import CheckFailed

__all__ = [
    "UNJUDGED",
    "Liveness",
    "Outcome",
    "Verdict",
    "judge_gradient",
    "judge_loss",
    "judge_rewards",
    "nothing_scored",
    "only_said",
]

_logger = logging.getLogger(__name__)

_NO_GRADIENT = 1e-12
"""A gradient norm below this moves no weight: rounding alone makes more in a model that still learns."""

_LOSS_LEFT = 0.05
"""Share of the first loss below which learning may be over."""

_NO_REWARDS = (math.inf, -math.inf)
"""Lowest and highest of none."""

_WARN_AFTER = 5
"""Steps in a row before a run that has learned is warned: one batch of solved prompts is ordinary."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an optimizer step can teach anything.

    Attributes:
        kind: "alive", "unjudged", or the name of what is wrong; each name is said once.
        problem: what is wrong, as a clause.
        fix: what to do next, as a sentence.
        final: no good end looks like this; False: the run may simply be done.
        stops: whether it may stop the run; False where other terms of the loss teach.
        level: the one reward that every completion got, where steps must be compared with each other.
        lowest, highest: rewards of the step.
    """

    kind: str = "alive"
    problem: str = ""
    fix: str = ""
    final: bool = True
    stops: bool = True
    level: float | None = None
    lowest: float = math.inf
    highest: float = -math.inf


UNJUDGED = Verdict("unjudged")
"""Of a step that says nothing either way, such as one in which only the critic learns."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one completion.

    Attributes:
        rewards: what its advantage is made of, one number or one for each criterion; None where it has no reward.
        is_masked: left out of the loss because it was cut.
    """

    rewards: tuple[float, ...] | None
    is_masked: bool = False


def judge_rewards(
    groups: Sequence[Sequence[Outcome]],
    *,
    compared: str = "group",
    max_completion_length: int,
    diagnose: Callable[[], str | None] = lambda: None,
) -> Verdict:
    """Judge whether rewards carry a signal.

    Args:
        groups: the outcomes of each prompt's completions.
        compared: with what a completion is compared: "group", "batch" (the whole step), or "run" (all steps: a critic
            learns from each).
        max_completion_length: for the message.
        diagnose: what the rubric makes of these completions; asked only where they carry no signal.
    """
    outcomes = [outcome for group in groups for outcome in group]
    count = len(outcomes)
    if all(outcome.rewards is None for outcome in outcomes):
        fix = diagnose() or "Every reward failed or abstained: read `errors` in the transcripts."
        return Verdict("no_reward", f"none of {count} completions has a reward", fix)
    if all(outcome.is_masked or outcome.rewards is None for outcome in outcomes):
        return Verdict(
            "all_truncated",
            f"all {count} completions are cut at max_completion_length = {max_completion_length} and masked",
            "Raise max_completion_length, give stop strings or an EOS token that the model writes, or set "
            "mask_truncated_completions = false.",
        )
    kept = [[o.rewards for o in group if o.rewards is not None and not o.is_masked] for group in groups]
    seen = [rewards for group in kept for rewards in group]
    lowest, highest = min(map(min, seen)), max(map(max, seen))
    if any(len(set(rows)) > 1 for rows in (kept if compared == "group" else [seen])):
        return Verdict(lowest=lowest, highest=highest)
    values = f"all {len(seen)} are {lowest:g}"
    if lowest != highest:
        values = f"those of each prompt are equal, from {lowest:g} to {highest:g}"
    return Verdict(
        "constant_reward",
        f"no reward differs from those it is compared with: {values}",
        diagnose() or "Read the transcripts; give prompts that are neither always nor never solved, or finer rewards.",
        final=False,
        level=highest if compared == "run" else None,
        lowest=lowest,
        highest=highest,
    )


def nothing_scored() -> Verdict:
    """Say that no token and no pair of the step is in the loss."""
    return Verdict(
        "nothing_scored",
        "nothing of the step is in the loss",
        "Every token is masked, or every row was cut: check assistant_only_loss, completion_only_loss and max_length.",
    )


def judge_gradient(grad_norm: float, *, loss_left: float = 1.0) -> Verdict:
    """Judge whether the gradient moves any weight.

    Args:
        grad_norm: of the complete gradient, before clipping.
        loss_left: the loss over that of the first step: near 0, a gradient of zero may be the end of learning.
    """
    if grad_norm > _NO_GRADIENT:
        return Verdict()
    return Verdict(
        "zero_gradient",
        f"the gradient is zero (norm {grad_norm:g})",
        "The loss is saturated, or does not depend on the weights that train: lower learning_rate, and check which "
        "weights require a gradient.",
        final=loss_left > _LOSS_LEFT,
    )


def judge_loss(loss: float, start: float, *, uniform: float | None) -> Verdict:
    """Judge whether the weights are destroyed: a loss far above its start, and above what guessing costs.

    Args:
        loss: of this step.
        start: of the first step.
        uniform: ln V, the loss of a model that knows nothing, where the loss is one of tokens; None for others.
    """
    bound = 10 * max(start, 0.5) if uniform is None else max(0.9 * uniform, 1.2 * start)
    if loss < bound:
        return Verdict()
    guess = "" if uniform is None else f"; guessing costs ln V = {uniform:.3g}"
    return Verdict(
        "diverged",
        f"the loss is {loss:.3g}, after {start:.3g} in the first step{guess}",
        "The weights are destroyed: start again or resume from an earlier checkpoint, with a lower learning_rate or a "
        "longer warm-up.",
    )


class Liveness:
    """Counts steps in a row that teach nothing, warns by name, and stops the run after too many.

    A run that has learned for at least as many steps goes on where it may be done: every prompt is solved, or a loss of
    almost nothing has no gradient. It stops where it cannot be: no completion has a reward, all are cut, the loss is
    destroyed, or every completion gets the lowest reward that the run has seen.

    Args:
        limit: steps in a row; 0 or None only warns.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit or 0
        self.uniform_loss: float | None = None
        """ln V, the loss of a model that guesses, where the loss is one of tokens."""
        self.alive_steps = 0
        """Steps so far that could teach something."""
        self.dead_steps = 0
        """Steps in a row, up to now, that could not."""
        self.start_loss: float | None = None
        self.has_work = False
        """Whether the step has a completion with a gradient, on any rank."""
        self._count = 0.0
        self._verdict: Verdict | None = None
        self._own_losses: list[torch.Tensor] = []
        self._watched: list[torch.Tensor] = []
        self._seen = self._streak = _NO_REWARDS
        self._level: float | None = None
        self._last = UNJUDGED
        self._said: set[str] = set()

    def begin_step(self, count: float, *, has_work: bool, verdict: Verdict | None = None) -> None:
        """Take what is known of a step before its loss, and forget the losses of the step before.

        Args:
            count: terms of its loss, over all ranks.
            has_work: whether any rank has a group with a gradient.
            verdict: of its samples; None: the loss will say.
        """
        self._count, self.has_work, self._verdict = count, has_work, verdict
        self._own_losses, self._watched = [], []

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a part of the step's loss."""
        self._own_losses.append(loss.detach())

    def watch(self, loss: torch.Tensor) -> None:
        """Add a part of another loss, which is watched instead."""
        self._watched.append(loss.detach())

    def judge_step(self, grad_norm: float, mean_over_ranks: Callable[[float], float]) -> Verdict:
        """Judge a step by its samples and gradient, or by its loss and gradient; the same on every rank.

        Args:
            grad_norm: of the complete gradient.
            mean_over_ranks: averages this rank's part of the loss that grows where the weights are destroyed.
        """
        if self._verdict is not None:
            if self._verdict.kind != "alive":
                return self._verdict
            flat = judge_gradient(grad_norm) if self.has_work else UNJUDGED
            return self._verdict if flat.kind == "alive" else flat
        loss = mean_over_ranks(float(sum(self._watched or self._own_losses)))
        if self._count == 0:
            return nothing_scored()
        start = self.start_loss = loss if self.start_loss is None else self.start_loss
        flat = judge_gradient(grad_norm, loss_left=abs(loss) / max(abs(start), 1e-6))
        return flat if flat.kind != "alive" else judge_loss(loss, start, uniform=self.uniform_loss)

    def end_step(self, step: int, verdict: Verdict) -> None:
        """Count one optimizer step, before its update.

        Args:
            step: its number, from 1.
            verdict: of the step.

        Raises:
            CheckFailed: the limit is reached.
        """
        if verdict.kind == "unjudged":
            return
        before, self._level = self._level, verdict.level
        if verdict.level is not None and before not in (None, verdict.level):
            verdict = Verdict(lowest=verdict.lowest, highest=verdict.highest)  # equal within the step only
        self._last = verdict
        self._seen = _hull(self._seen, verdict)
        if verdict.kind == "alive":
            self.alive_steps, self.dead_steps, self._streak = self.alive_steps + 1, 0, _NO_REWARDS
            return
        self.dead_steps += 1
        self._streak = _hull(self._streak, verdict)
        stops = verdict.stops and self.limit > 0 and not self._may_be_done(verdict)
        if stops and self.dead_steps >= self.limit:
            raise CheckFailed(
                f"step {step}: {self.dead_steps} optimizer steps in a row taught nothing: {verdict.problem}. "
                f"{verdict.fix} (max_dead_steps = {self.limit} stops such a run; with 0 it goes on.)"
            )
        if self.dead_steps >= (_WARN_AFTER if self.alive_steps else 1) and verdict.kind not in self._said:
            self._said.add(verdict.kind)
            then = f" The run stops after {self.limit} such steps in a row (max_dead_steps)." if stops else ""
            _logger.warning("step %d teaches nothing: %s. %s%s", step, verdict.problem, verdict.fix, then)

    def _may_be_done(self, verdict: Verdict) -> bool:
        if verdict.final or not self.alive_steps:
            return False
        if verdict.kind == "constant_reward":
            (lowest, highest), (least, most) = self._seen, self._streak
            if most <= lowest:
                return False
            if least >= highest:
                return True
        return self.alive_steps >= self.limit

    def end_run(self) -> None:
        """Say that no step of the run could teach anything, where that is so."""
        if self.dead_steps and not self.alive_steps:
            _logger.warning(
                "none of the run's %d steps taught anything: %s. %s",
                self.dead_steps, self._last.problem, self._last.fix,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "alive_steps": self.alive_steps,
            "dead_steps": self.dead_steps,
            "start_loss": self.start_loss,
            "level": self._level,
            "seen": list(self._seen),
            "streak": list(self._streak),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting where `state_dict` was taken."""
        self.alive_steps, self.dead_steps = int(state["alive_steps"]), int(state["dead_steps"])
        self.start_loss, self._level = state["start_loss"], state["level"]
        self._seen, self._streak = tuple(state["seen"]), tuple(state["streak"])


def _hull(rewards: tuple[float, float], verdict: Verdict) -> tuple[float, float]:
    """The lowest and the highest reward of both."""
    return min(rewards[0], verdict.lowest), max(rewards[1], verdict.highest)


def only_said(verdict: Verdict) -> Verdict:
    """The same, without stopping the run: other terms of the loss teach."""
    return dataclasses.replace(verdict, stops=False)
