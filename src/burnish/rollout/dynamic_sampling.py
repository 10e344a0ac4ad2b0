"""Dynamic sampling: refill a batch until its groups have reward variance; replay earlier groups where that fails."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from statistics import stdev

from burnish.types import Group

__all__ = ["Batch", "Replay", "fill_batch", "has_reward_variance"]

logger = logging.getLogger(__name__)

_LEAST_YIELD = 0.25
"""Lowest yield of useful groups that a refill plans for: at most 4 prompts for each missing group."""


def has_reward_variance(group: Group) -> bool:
    """Tell groups with differing rewards from those whose advantages are all 0."""
    known = _rewards(group)
    return len(known) > 1 and max(known) > min(known)


def _rewards(group: Group) -> list[float]:
    return [reward for c in group.completions if (reward := c.reward) is not None]


@dataclass(slots=True)
class Batch:
    """The groups of a batch, by position, with counts of how they were sampled.

    Attributes:
        groups: position -> whole group, `wanted` of them.
        num_rounds: rounds of sampling.
        num_sampled: groups sampled.
        num_flat: groups in the batch despite having no reward variance.
        num_replayed: groups from earlier batches.
    """

    groups: dict[int, Group]
    num_rounds: int
    num_sampled: int
    num_flat: int
    num_replayed: int = 0

    def metrics(self, num_generations: int) -> dict[str, float]:
        """Count rounds, completions beyond the batch, and replayed groups."""
        return {
            "sampling/rounds": self.num_rounds,
            "sampling/extra_completions": (self.num_sampled - len(self.groups)) * num_generations,
            "sampling/replayed_groups": self.num_replayed,
        }

    def warn_if_flat(self) -> None:
        """Warn that the batch holds groups without reward variance despite refills."""
        if self.num_flat:
            logger.warning(
                "%d of %d groups have equal rewards after %d rounds of sampling: raise max_sampling_rounds, or give "
                "prompts that are neither always nor never solved.",
                self.num_flat, len(self.groups), self.num_rounds,
            )  # fmt: skip


class Replay:
    """Trained-on groups with reward variance, each replayed at most once where new groups have none.

    Log-probabilities from sampling become `old_logprobs`, so that the ratio to the sampling policy is clipped.

    Args:
        size: number of groups kept, the newest ones; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.groups: dict[int, Group] = {}

    def take(self, number: int) -> dict[int, Group]:
        """Remove and return up to `number` groups, those with the highest reward variance first."""
        best = sorted(self.groups, key=lambda p: (-stdev(_rewards(self.groups[p])), -p))[:number]
        taken = {position: self.groups.pop(position) for position in best}
        for completion in (c for group in taken.values() for c in group.completions):
            old = completion.policy_logprobs or completion.token.get("old_logprobs") or completion.sampler_logprobs
            if old is not None:
                completion.token["old_logprobs"] = old
            completion.policy_logprobs = None
        return taken

    def keep(self, groups: dict[int, Group]) -> None:
        """Remember fresh groups with reward variance."""
        self.groups |= {position: _copy(group) for position, group in groups.items() if has_reward_variance(group)}
        for position in sorted(self.groups)[: max(len(self.groups) - self.size, 0)]:
            del self.groups[position]


def _copy(group: Group) -> Group:
    """Copy scores and streams too: each rank changes its shard in place, and all ranks must remember the same."""
    completions = [
        dataclasses.replace(
            c,
            score=c.score and dataclasses.replace(c.score, criteria=dict(c.score.criteria)),
            token=dict(c.token),
            sequence=dict(c.sequence),
        )
        for c in group.completions
    ]
    return dataclasses.replace(group, completions=completions)


def fill_batch(
    sample: Callable[[int], dict[int, Group]], wanted: int, *, max_rounds: int, replay: Replay, multiple: int = 1
) -> Batch:
    """Sample rounds until a batch holds `wanted` groups with reward variance (DAPO's dynamic sampling, 2503.14476).

    Args:
        sample: number of prompts -> their whole, scored groups by position, the same on every rank.
        wanted: groups of the batch.
        max_rounds: most rounds; then replayed groups, then groups without reward variance fill the batch.
        replay: groups with reward variance from earlier batches.
        multiple: each round's number of prompts is a multiple of it, so that ranks sample equally many completions.

    Returns:
        A batch of exactly `wanted` groups, in ascending order of positions.
    """
    good, flat, rounds = dict[int, Group](), dict[int, Group](), 0
    while rounds < max_rounds and len(good) < wanted:
        missing, sampled = wanted - len(good), len(good) + len(flat)
        expected_yield = max(len(good) / sampled, _LEAST_YIELD) if sampled else 1.0
        number = min(-(-missing // expected_yield), wanted)
        for position, group in sample(int(-(-number // multiple) * multiple)).items():
            (good if has_reward_variance(group) else flat)[position] = group
        rounds += 1
    fresh = dict(sorted(good.items())[:wanted])
    replayed = replay.take(wanted - len(fresh)) if replay.size else {}
    filler = dict(sorted(flat.items())[: wanted - len(fresh) - len(replayed)])
    if replay.size:
        replay.keep(fresh)
    groups = dict(sorted((fresh | replayed | filler).items()))
    return Batch(groups, rounds, len(good) + len(flat), len(filler), len(replayed))
