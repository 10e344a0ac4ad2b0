"""The prompt order and each rank's shard of a rollout: functions of the seed, the position and the curriculum level."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch

from burnish.data.columns import meant_columns, rename_tip
from burnish.errors import DataError
from burnish.types import Completion, Group

__all__ = ["Order", "PromptSource", "Shard", "empty_shard", "gather_by_prompt", "shards_of", "whole_groups"]

T = TypeVar("T")

Order = Literal["given", "permutation", "weighted", "curriculum"]

_LEVEL_STEP = 0.02
"""Change of the curriculum level after each round; levels range from 0 to 1."""

_LEVEL_WIDTH = 0.1
"""Standard deviation of the prompts drawn around the level, as a fraction of the data set."""


@dataclass(slots=True)
class Shard:
    """This rank's part of one prompt's completions.

    Attributes:
        position: the prompt's position in the endless order, which identifies the group on every rank.
        first: index within the group of the first of these completions.
        group: the prompt with this part of its completions.
    """

    position: int
    first: int
    group: Group


class PromptSource:
    """An endless order of prompts.

    Args:
        prompts: groups without completions.
        seed: seed of the order.
        order: given (as in the data set, repeated), permutation (reshuffled each epoch), weighted (drawn by the column
            `weight`), or curriculum (drawn around a level that moves through the prompts sorted by `difficulty`).
        target: mean reward at which the curriculum level stays put.

    Raises:
        DataError: a column that the order needs is missing or not numeric.
    """

    def __init__(self, prompts: Sequence[Group], *, seed: int, order: Order, target: float = 0.5) -> None:
        self.prompts = prompts
        self.level = 0.0
        """Curriculum level, from 0 (the easiest prompts) to 1 (the hardest)."""
        self.position = 0
        """Number of prompts handed out so far."""
        self._order = order
        self._seed = seed
        self._target = target
        self._permutation: tuple[int, list[int]] = (-1, [])
        self._cumulative: tuple[float, list[float]] = (-1.0, [])
        if order == "weighted":
            weights = _column(prompts, "weight")
            if not sum(weights) > 0:
                raise DataError("column weight of train_dataset: every weight is 0, so no prompt can be drawn.")
            self._cumulative = (0.0, list(accumulate(weights)))
        elif order == "curriculum":
            difficulties = _column(prompts, "difficulty")
            ranked = sorted(range(len(prompts)), key=lambda i: difficulties[i])
            self._ranks = [0.0] * len(prompts)
            for rank, i in enumerate(ranked):
                self._ranks[i] = rank / max(len(prompts) - 1, 1)

    def at(self, position: int) -> Group:
        """Return the prompt at a position, without completions."""
        if self._order in ("weighted", "curriculum"):
            # One generator per position: a draw does not depend on which positions were asked for before.
            draw = random.Random(f"{self._seed} {position}")
            return draw.choices(self.prompts, cum_weights=self._weights())[0]
        epoch, offset = divmod(position, len(self.prompts))
        if self._order == "given":
            return self.prompts[offset]
        if self._permutation[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._permutation = (epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        return self.prompts[self._permutation[1][offset]]

    def _weights(self) -> list[float]:
        if self._order == "curriculum" and self._cumulative[0] != self.level:
            near = [math.exp(-0.5 * ((rank - self.level) / _LEVEL_WIDTH) ** 2) for rank in self._ranks]
            self._cumulative = (self.level, list(accumulate(near)))
        return self._cumulative[1]

    def learn(self, mean_reward: float) -> None:
        """Raise the curriculum level where the mean reward is above the target, lower it where it is below."""
        if self._order == "curriculum" and mean_reward != self._target:
            step = _LEVEL_STEP if mean_reward > self._target else -_LEVEL_STEP
            self.level = min(max(self.level + step, 0.0), 1.0)

    def take(self, *, num_prompts: int, num_samples: int, rank: int, world: int) -> list[Shard]:
        """Return this rank's shards of the next P prompts with G empty completions each; see `shards_of`."""
        positions = range(self.position, self.position + num_prompts)
        groups = {p: dataclasses.replace(self.at(p), completions=_empty(num_samples)) for p in positions}
        self.position += num_prompts
        return shards_of(groups, rank=rank, world=world)


def shards_of(groups: dict[int, Group], *, rank: int, world: int) -> list[Shard]:
    """Split whole groups evenly over the ranks; a group may be split between several.

    Args:
        groups: by position; the total number of completions is a multiple of `world`.
        rank: this process, 0 .. world - 1.
        world: number of processes.

    Returns:
        This rank's shards; every completion is on exactly one rank.
    """
    size, rest = divmod(sum(len(group.completions) for group in groups.values()), world)
    assert rest == 0
    begin, start, shards = rank * size, 0, list[Shard]()
    for position, group in groups.items():
        low, high = (min(max(edge - start, 0), len(group.completions)) for edge in (begin, begin + size))
        if low < high:
            part = dataclasses.replace(group, completions=group.completions[low:high])
            shards.append(Shard(position, low, part))
        start += len(group.completions)
    return shards


def empty_shard(prompt: Group, position: int, *, number: int) -> Shard:
    """Return a shard with the first `number` completions of a prompt, all empty."""
    return Shard(position, 0, dataclasses.replace(prompt, completions=_empty(number)))


def _empty(number: int) -> list[Completion]:
    return [Completion([]) for _ in range(number)]


def _column(prompts: Sequence[Group], name: str) -> list[float]:
    values: list[Any] = [group.row.get(name) for group in prompts]
    if prompts and all(value is None for value in values) and (names := meant_columns(prompts[0].row, [(name,)])):
        raise DataError(f"train_dataset: prompt_sampling needs the column {name}: {rename_tip(names)}.")
    for row, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or (name == "weight" and value < 0):
            fix = "a number of at least 0" if name == "weight" else "a number, higher for harder prompts"
            raise DataError(
                f"row {row} of train_dataset has {name} = {value!r}: prompt_sampling needs {fix} in every row."
            )
    return [float(value) for value in values]


def gather_by_prompt(
    shards: Sequence[Shard], value_of: Callable[[Completion], T], gathered: Callable[[list[Any]], list[Any]]
) -> dict[int, list[T]]:
    """Gather one value per completion over all ranks, by prompt.

    Args:
        shards: this rank's shards.
        value_of: completion -> value.
        gathered: all-gather: a list -> the concatenated lists of all ranks.

    Returns:
        [P] rows of G values by position, in ascending order of positions, the same on every rank.
    """
    local = [(shard.position, shard.first, [value_of(c) for c in shard.group.completions]) for shard in shards]
    rows: dict[int, list[T]] = defaultdict(list)
    for position, _, values in sorted(gathered(local), key=lambda entry: entry[:2]):
        rows[position] += values
    return rows


def whole_groups(shards: Sequence[Shard]) -> dict[int, Group]:
    """Reassemble groups from the shards of several ranks, by position."""
    groups: dict[int, Group] = {}
    for shard in sorted(shards, key=lambda shard: (shard.position, shard.first)):
        if shard.position in groups:
            groups[shard.position].completions += shard.group.completions
        else:
            groups[shard.position] = dataclasses.replace(shard.group, completions=list(shard.group.completions))
    return groups
