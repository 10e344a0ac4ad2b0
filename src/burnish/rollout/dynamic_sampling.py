"""Which groups of several rounds of sampling make a batch: refills for groups without spread, replay of good ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import stdev

from burnish.types import Completion, Group

__all__ = ["Batch", "Replay", "fill_batch", "has_spread"]

logger = logging.getLogger(__name__)

_LEAST_YIELD = 0.25
"""A refill samples at most this many times fewer useful groups than it hopes for: 4 prompts for each missing group."""


def has_spread(group: Group) -> bool:
    """Whether the rewards of a group differ, so that its advantages are not all 0."""
    known = [reward for c in group.completions if (reward := c.reward) is not None]
    return len(known) > 1 and max(known) > min(known)


@dataclass(slots=True)
class Batch:
    """The groups of a batch, by place, and how they came about.

    Attributes:
        groups: place -> whole group, `wanted` of them.
        num_rounds: rounds of sampling.
        num_sampled: groups sampled.
        num_flat: groups without spread that are in the batch all the same.
        num_replayed: groups from earlier rounds.
    """

    groups: dict[int, Group]
    num_rounds: int
    num_sampled: int
    num_flat: int
    num_replayed: int = 0

    def metrics(self, num_generations: int) -> dict[str, float]:
        """How much was sampled for it."""
        return {
            "sampling/rounds": self.num_rounds,
            "sampling/extra_completions": (self.num_sampled - len(self.groups)) * num_generations,
            "sampling/replayed_groups": self.num_replayed,
        }

    def warn_if_flat(self) -> None:
        """Say that refills have not replaced every group without spread."""
        if self.num_flat:
            logger.warning(
                "%d of %d groups have equal rewards after %d rounds of sampling: raise max_sampling_rounds, or give "
                "prompts that are neither always nor never solved.",
                self.num_flat, len(self.groups), self.num_rounds,
            )  # fmt: skip


class Replay:
    """Groups with spread that were trained on, to stand in once for new ones without.

    Their log-probabilities at sampling become `old_logprobs`, so that the ratio to them is clipped.

    Args:
        size: groups kept, the newest ones; 0 for none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.groups: dict[int, Group] = {}

    def take(self, number: int) -> dict[int, Group]:
        """Up to `number` groups, those of widest spread, which are then forgotten."""
        best = sorted(self.groups, key=lambda place: (-_spread(self.groups[place]), -place))[:number]
        return {place: _as_replayed(self.groups.pop(place)) for place in best}

    def keep(self, groups: dict[int, Group]) -> None:
        """Remember fresh groups with spread."""
        self.groups |= {place: _copy(group) for place, group in groups.items() if has_spread(group)}
        for place in sorted(self.groups)[: max(len(self.groups) - self.size, 0)]:
            del self.groups[place]


def _copy(group: Group) -> Group:
    """Copy scores and streams too: each rank changes those of its share, and all must remember the same."""
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


def _as_replayed(group: Group) -> Group:
    """Copy a group, with its log-probabilities at sampling as its old ones."""
    completions: list[Completion] = []
    for c in group.completions:
        old = c.policy_logprobs or c.token.get("old_logprobs") or c.sampler_logprobs
        token = c.token if old is None else {**c.token, "old_logprobs": old}
        completions.append(dataclasses.replace(c, policy_logprobs=None, token=token))
    return dataclasses.replace(group, completions=completions)


def _spread(group: Group) -> float:
    return stdev(reward for c in group.completions if (reward := c.reward) is not None)


@dataclass(slots=True)
class _Found:
    good: dict[int, Group] = field(default_factory=dict[int, Group])
    flat: dict[int, Group] = field(default_factory=dict[int, Group])

    def add(self, groups: dict[int, Group]) -> None:
        for place, group in groups.items():
            (self.good if has_spread(group) else self.flat)[place] = group


def fill_batch(
    sample: Callable[[int], dict[int, Group]], wanted: int, *, max_rounds: int, replay: Replay, multiple: int = 1
) -> Batch:
    """Sample rounds until a batch holds `wanted` groups with spread (DAPO's dynamic sampling, 2503.14476).

    Args:
        sample: number of prompts -> their whole, scored groups by place, the same on every rank.
        wanted: groups of the batch.
        max_rounds: rounds at most; then remembered groups, then groups without spread fill the batch.
        replay: groups with spread from earlier batches.
        multiple: a round's number of prompts is a multiple of it (each rank samples equally many completions).

    Returns:
        A batch of exactly `wanted` groups, in the order of their places.
    """
    found, rounds = _Found(), 0
    while rounds < max_rounds and len(found.good) < wanted:
        missing, sampled = wanted - len(found.good), len(found.good) + len(found.flat)
        hoped = max(len(found.good) / sampled, _LEAST_YIELD) if sampled else 1.0
        number = min(-(-missing // hoped), wanted)
        found.add(sample(int(-(-number // multiple) * multiple)))
        rounds += 1
    fresh = dict(sorted(found.good.items())[:wanted])
    again = replay.take(wanted - len(fresh)) if replay.size else {}
    flat = dict(sorted(found.flat.items())[: wanted - len(fresh) - len(again)])
    if replay.size:
        replay.keep(fresh)
    groups = dict(sorted((fresh | again | flat).items()))
    return Batch(groups, rounds, len(found.good) + len(found.flat), len(flat), len(again))
