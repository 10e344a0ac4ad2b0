"""The order of prompts and each rank's part of a round: functions of the seed, the place and the curriculum's level."""

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

__all__ = ["Order", "PromptSource", "Share", "gather_by_prompt", "share_of", "shares_of", "whole_groups"]

T = TypeVar("T")

Order = Literal["given", "permutation", "weighted", "curriculum"]

_LEVEL_STEP = 0.02
"""What the curriculum's level moves by after a round, of a range of 1."""

_LEVEL_WIDTH = 0.1
"""Standard deviation, in shares of the data set, of the prompts drawn around the level."""


@dataclass(slots=True)
class Share:
    """This rank's part of one prompt's completions.

    Attributes:
        place: the prompt's place in the endless order: what the ranks that hold the same group agree on.
        first: number of the first of these completions in the group.
        group: the prompt with this part of its completions.
    """

    place: int
    first: int
    group: Group


class PromptSource:
    """An endless order of prompts.

    Args:
        prompts: groups without completions.
        seed: of the order.
        order: given (again and again), permutation (a new one each epoch), weighted (drawn by the column `weight`), or
            curriculum (drawn around a level that moves through the data set in the order of the column `difficulty`).
        target: mean reward at which the curriculum's level stays.

    Raises:
        DataError: a column that the order needs is missing, or holds something else than numbers.
    """

    def __init__(self, prompts: Sequence[Group], *, seed: int, order: Order, target: float = 0.5) -> None:
        self.prompts = prompts
        self.level = 0.0
        """Where the curriculum stands, from 0 (the easiest prompts) to 1 (the hardest)."""
        self.place = 0
        """Prompts handed out so far."""
        self._order = order
        self._seed = seed
        self._target = target
        self._permutation: tuple[int, list[int]] = (-1, [])
        self._cumulative: tuple[float, list[float]] = (-1.0, [])
        if order == "weighted":
            self._cumulative = (0.0, _cumulative(_column(prompts, "weight")))
        elif order == "curriculum":
            difficulties = _column(prompts, "difficulty")
            ranked = sorted(range(len(prompts)), key=lambda i: difficulties[i])
            self._ranks = [0.0] * len(prompts)
            for place, i in enumerate(ranked):
                self._ranks[i] = place / max(len(prompts) - 1, 1)

    def at(self, place: int) -> Group:
        """The prompt at a place, without completions."""
        if self._order in ("weighted", "curriculum"):
            # A generator of its own for each place: what is drawn does not depend on how often anyone asked.
            draw = random.Random(f"{self._seed} {place}")
            return draw.choices(self.prompts, cum_weights=self._weights())[0]
        epoch, offset = divmod(place, len(self.prompts))
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
        """Move the curriculum: up where rewards are above the target, down where they are below."""
        if self._order == "curriculum" and mean_reward != self._target:
            step = _LEVEL_STEP if mean_reward > self._target else -_LEVEL_STEP
            self.level = min(max(self.level + step, 0.0), 1.0)

    def take(self, *, num_prompts: int, num_samples: int, rank: int, world: int) -> list[Share]:
        """This rank's part of the next P prompts with G samples each; see `shares_of`."""
        groups = {place: self.at(place) for place in range(self.place, self.place + num_prompts)}
        self.place += num_prompts
        empty = {p: dataclasses.replace(g, completions=_empty(num_samples)) for p, g in groups.items()}
        return shares_of(empty, rank=rank, world=world)


def shares_of(groups: dict[int, Group], *, rank: int, world: int) -> list[Share]:
    """This rank's part of whole groups; a group may lie on several ranks.

    Args:
        groups: by place; their completions together are a multiple of `world`.
        rank: this process, 0 .. world - 1.
        world: processes.

    Returns:
        Shares with this rank's completions; over all ranks every completion once.
    """
    size, rest = divmod(sum(len(group.completions) for group in groups.values()), world)
    assert rest == 0
    begin, start, shares = rank * size, 0, list[Share]()
    for place, group in groups.items():
        low, high = (min(max(edge - start, 0), len(group.completions)) for edge in (begin, begin + size))
        if low < high:
            own = dataclasses.replace(group, completions=group.completions[low:high])
            shares.append(Share(place, low, own))
        start += len(group.completions)
    return shares


def share_of(prompt: Group, place: int, *, first: int, number: int) -> Share:
    """A share with `number` empty completions."""
    return Share(place, first, dataclasses.replace(prompt, completions=_empty(number)))


def _empty(number: int) -> list[Completion]:
    return [Completion([]) for _ in range(number)]


def _column(prompts: Sequence[Group], name: str) -> list[float]:
    values: list[Any] = [group.row.get(name) for group in prompts]
    if prompts and all(value is None for value in values) and (names := meant_columns(prompts[0].row, [(name,)])):
        raise DataError(f"train_dataset: prompt_sampling needs the column {name}: {rename_tip(names)}.")
    for number, value in enumerate(values):
        number_like = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number_like or (name == "weight" and value < 0):
            fix = "a number of at least 0" if name == "weight" else "a number, higher for harder prompts"
            raise DataError(
                f"row {number} of train_dataset has {name} = {value!r}: prompt_sampling needs {fix} in every row."
            )
    return [float(value) for value in values]


def _cumulative(weights: Sequence[float]) -> list[float]:
    if not sum(weights) > 0:
        raise DataError("column weight of train_dataset: every weight is 0, so no prompt can be drawn.")
    return list(accumulate(weights))


def gather_by_prompt(
    shares: Sequence[Share], value_of: Callable[[Completion], T], gathered: Callable[[list[Any]], list[Any]]
) -> dict[int, list[T]]:
    """Collect a value of every completion over all ranks: a group may lie on several.

    Args:
        shares: this rank's.
        value_of: completion -> value.
        gathered: a list -> the lists of all ranks, in one.

    Returns:
        [P] rows of G values by the place of the prompt, in the order of places, the same on every rank.
    """
    own = [(share.place, share.first, [value_of(c) for c in share.group.completions]) for share in shares]
    rows: dict[int, list[T]] = defaultdict(list)
    for place, _, values in sorted(gathered(own), key=lambda entry: entry[:2]):
        rows[place] += values
    return rows


def whole_groups(shares: Sequence[Share]) -> dict[int, Group]:
    """The groups that shares of several ranks are parts of, by place."""
    groups: dict[int, Group] = {}
    for share in sorted(shares, key=lambda share: (share.place, share.first)):
        if share.place in groups:
            groups[share.place].completions += share.group.completions
        else:
            groups[share.place] = dataclasses.replace(share.group, completions=list(share.group.completions))
    return groups
