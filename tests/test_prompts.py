"""The order of prompts, and each rank's part of a round."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from burnish.errors import DataError
from burnish.rollout.prompts import PromptSource, shards_of
from burnish.types import Completion, Group


def source(number: int, column: str = "", values: Any = (), **changes: Any) -> PromptSource:
    rows = [{column: values[i]} if column else {} for i in range(number)]
    prompts = [Group([i], [], row=row, index=i) for i, row in enumerate(rows)]
    return PromptSource(prompts, **{"seed": 3, "order": "permutation", **changes})


def test_every_epoch_is_a_permutation_and_a_function_of_the_seed() -> None:
    order = [source(5).at(place).index for place in range(15)]
    epochs = [order[:5], order[5:10], order[10:]]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = source(5)
    assert [again.at(place).index for place in (14, 0, 7)] == [order[14], order[0], order[7]]
    assert [source(5, seed=4).at(place).index for place in range(15)] != order


def test_without_shuffling_the_given_order_repeats() -> None:
    assert [source(3, order="given").at(place).index for place in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_ranks_together_hold_every_sample_once(world: int) -> None:
    samples = []
    for rank in range(world):
        one = source(7)
        one.position = 6
        shards = one.take(num_prompts=3, num_samples=4, rank=rank, world=world)
        assert one.position == 9
        mine = [(s.position, s.first + j, s.group.index) for s in shards for j in range(len(s.group.completions))]
        assert len(mine) == 12 // world
        samples += mine
    assert sorted(samples)[:4] == [(6, j, source(7).at(6).index) for j in range(4)]
    assert [(place, j) for place, j, _ in sorted(samples)] == [(p, j) for p in (6, 7, 8) for j in range(4)]


def test_shards_of_whole_groups_keep_their_completions() -> None:
    groups = {place: Group([place], [Completion([place, j]) for j in range(3)]) for place in (4, 9)}
    shards = [shard for rank in (0, 1) for shard in shards_of(groups, rank=rank, world=2)]
    assert [(s.position, s.first, [c.token_ids for c in s.group.completions]) for s in shards] == [
        (4, 0, [[4, 0], [4, 1], [4, 2]]),
        (9, 0, [[9, 0], [9, 1], [9, 2]]),
    ]
    thirds = [shard for rank in range(6) for shard in shards_of(groups, rank=rank, world=6)]
    assert [(s.position, s.first) for s in thirds] == [(4, 0), (4, 1), (4, 2), (9, 0), (9, 1), (9, 2)]


def test_weighted_prompts_come_in_proportion() -> None:
    made = source(3, "weight", (1.0, 0.0, 3.0), order="weighted")
    drawn = Counter(made.at(place).index for place in range(4000))
    assert drawn[1] == 0
    # Three standard deviations of a binomial share of 3/4.
    assert abs(drawn[2] / 4000 - 0.75) < 3 * (0.75 * 0.25 / 4000) ** 0.5
    assert [made.at(place).index for place in (5, 900)] == [
        source(3, "weight", (1.0, 0.0, 3.0), order="weighted").at(place).index for place in (5, 900)
    ]


def test_a_curriculum_goes_from_easy_to_hard_with_the_rewards_and_back() -> None:
    made = source(100, "difficulty", [99 - i for i in range(100)], order="curriculum", target=0.5)

    def mean() -> float:
        return sum(99 - made.at(place).index for place in range(500)) / 500

    easy = mean()
    assert easy < 15
    for _ in range(25):
        made.learn(0.9)
    assert made.level == pytest.approx(0.5)
    assert 44 < mean() < 55
    made.learn(0.5)
    assert made.level == pytest.approx(0.5)
    for _ in range(100):
        made.learn(0.1)
    assert made.level == 0.0
    assert mean() == easy


@pytest.mark.parametrize(
    ("column", "values", "order", "message"),
    [
        ("weight", (1.0, None), "weighted", "row 1 of train_dataset has weight = None"),
        ("weight", (1.0, -2.0), "weighted", "weight = -2.0: .* at least 0"),
        ("weight", (0.0, 0.0), "weighted", "every weight is 0"),
        ("difficulty", (1, "hard"), "curriculum", "difficulty = 'hard'"),
        ("", (), "curriculum", "difficulty = None"),
        ("difficulty", (1, float("nan")), "curriculum", "difficulty = nan"),
    ],
)
def test_a_column_that_the_order_needs(column: str, values: Any, order: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(2, column, values, order=order)
