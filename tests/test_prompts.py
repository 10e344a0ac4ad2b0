"""The order of prompts, and each rank's part of a rollout."""

from __future__ import annotations

import pytest

from burnish.trainers.prompts import PromptSource
from burnish.types import Group


def source(number: int, **changes: object) -> PromptSource:
    prompts = [Group([i], [], index=i) for i in range(number)]
    return PromptSource(prompts, **{"seed": 3, "shuffle": True, **changes})  # type: ignore[arg-type]


def test_every_epoch_is_a_permutation_and_a_function_of_the_seed() -> None:
    order = [source(5).at(place).index for place in range(15)]
    epochs = [order[:5], order[5:10], order[10:]]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = source(5)
    assert [again.at(place).index for place in (14, 0, 7)] == [order[14], order[0], order[7]]
    assert [source(5, seed=4).at(place).index for place in range(15)] != order


def test_without_shuffling_the_given_order_repeats() -> None:
    assert [source(3, shuffle=False).at(place).index for place in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_together_hold_every_sample_once(world: int) -> None:
    samples = []
    for rank in range(world):
        shares = source(7).shares(2, num_prompts=3, num_samples=4, rank=rank, world=world)
        mine = [(s.place, s.first + j, s.group.index) for s in shares for j in range(len(s.group.completions))]
        assert len(mine) == 12 // world
        samples += mine
    assert sorted(samples)[:4] == [(6, j, source(7).at(6).index) for j in range(4)]
    assert [(place, j) for place, j, _ in sorted(samples)] == [(p, j) for p in (6, 7, 8) for j in range(4)]
