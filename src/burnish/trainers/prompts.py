"""The order of prompts and each rank's part of a rollout: functions of (seed, number of rollouts), nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from burnish.types import Completion, Group

__all__ = ["PromptSource", "Share", "share_of"]


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
    """An endless order of prompts: a new permutation each epoch.

    Args:
        prompts: groups without completions.
        seed: of the permutations.
        shuffle: False keeps the given order.
    """

    def __init__(self, prompts: Sequence[Group], *, seed: int, shuffle: bool) -> None:
        self.prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._order: tuple[int, list[int]] = (-1, [])

    def at(self, place: int) -> Group:
        """The prompt at a place, without completions."""
        epoch, offset = divmod(place, len(self.prompts))
        if not self._shuffle:
            return self.prompts[offset]
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed + epoch)
            self._order = (epoch, torch.randperm(len(self.prompts), generator=generator).tolist())
        return self.prompts[self._order[1][offset]]

    def shares(self, rollout: int, *, num_prompts: int, num_samples: int, rank: int, world: int) -> list[Share]:
        """This rank's part of a rollout of P prompts with G samples each; a group may lie on several ranks.

        Args:
            rollout: number of the rollout, from 0.
            num_prompts: P.
            num_samples: G.
            rank: this process, 0 .. world - 1.
            world: processes; divides P * G.

        Returns:
            Groups whose completions are empty and to be filled; over all ranks every sample once.
        """
        size = num_prompts * num_samples // world
        begin = rank * size
        shares: list[Share] = []
        for offset in range(num_prompts):
            low, high = max(begin, offset * num_samples), min(begin + size, (offset + 1) * num_samples)
            if low < high:
                place = rollout * num_prompts + offset
                shares.append(share_of(self.at(place), place, first=low - offset * num_samples, number=high - low))
        return shares


def share_of(prompt: Group, place: int, *, first: int, number: int) -> Share:
    """A share with `number` empty completions."""
    return Share(place, first, dataclasses.replace(prompt, completions=[Completion([]) for _ in range(number)]))
