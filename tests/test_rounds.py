"""Batches from several rounds of sampling."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from burnish.rollout.dynamic_sampling import Replay, fill_batch, has_reward_variance
from burnish.types import Completion, Group, Score


def group(*rewards: float | None) -> Group:
    return Group([1], [Completion([2], policy_logprobs=[-1.0], score=Score(r)) for r in rewards])


GOOD, FLAT = (1.0, 0.0), (1.0, 1.0)


class Rounds:
    """Groups in a given order; remembers how many were asked for."""

    def __init__(self, *rewards: Sequence[float | None]) -> None:
        self.rewards, self.asked, self.place = rewards, list[int](), 0

    def __call__(self, number: int) -> dict[int, Group]:
        self.asked.append(number)
        start, self.place = self.place, self.place + number
        return {place: group(*self.rewards[place % len(self.rewards)]) for place in range(start, self.place)}


def test_has_spread() -> None:
    assert has_reward_variance(group(*GOOD))
    assert not has_reward_variance(group(*FLAT))
    assert not has_reward_variance(group(1.0, None))
    assert not has_reward_variance(group(None, None))
    assert has_reward_variance(group(0.5, None, 0.25))


def test_a_full_batch_takes_one_round() -> None:
    rounds = Rounds(GOOD)
    batch = fill_batch(rounds, 3, max_rounds=10, replay=Replay(0))
    assert (rounds.asked, list(batch.groups), batch.num_flat, batch.num_sampled) == ([3], [0, 1, 2], 0, 3)


def test_flat_groups_are_replaced_and_counted() -> None:
    rounds = Rounds(FLAT, GOOD)  # half of them carry no signal
    batch = fill_batch(rounds, 4, max_rounds=10, replay=Replay(0))
    assert all(has_reward_variance(g) for g in batch.groups.values())
    assert len(batch.groups) == 4
    # Half are useful, so twice the missing ones are asked for.
    assert rounds.asked == [4, 4]
    assert batch.num_sampled == 8
    assert list(batch.groups) == [1, 3, 5, 7]


def test_the_number_asked_for_is_a_multiple() -> None:
    rounds = Rounds(FLAT, GOOD, GOOD, GOOD)
    fill_batch(rounds, 8, max_rounds=10, replay=Replay(0), multiple=4)
    assert rounds.asked == [8, 4]


def test_flat_groups_fill_a_batch_when_rounds_run_out() -> None:
    rounds = Rounds(FLAT, FLAT, FLAT, FLAT, GOOD)
    batch = fill_batch(rounds, 4, max_rounds=2, replay=Replay(0))
    assert batch.num_rounds == 2
    assert batch.num_flat == 3
    assert len(batch.groups) == 4
    assert sum(has_reward_variance(g) for g in batch.groups.values()) == 1


def test_remembered_groups_stand_in_once_with_their_old_logprobs() -> None:
    replay = Replay(2)
    fill_batch(Rounds(GOOD, (1.0, 0.9), (5.0, 0.0)), 3, max_rounds=1, replay=replay)
    assert sorted(replay.groups) == [1, 2], "the newest two are kept"
    batch = fill_batch(Rounds(FLAT), 1, max_rounds=1, replay=replay)
    assert (batch.num_replayed, batch.num_flat, list(batch.groups)) == (1, 0, [2]), "the highest variance first"
    for completion in batch.groups[2].completions:
        assert completion.policy_logprobs is None
        assert completion.token["old_logprobs"] == [-1.0]
    assert sorted(replay.groups) == [1]
    batch = fill_batch(Rounds(FLAT), 2, max_rounds=1, replay=replay)
    assert (batch.num_replayed, batch.num_flat) == (1, 1)
    assert not replay.groups


def test_what_a_rank_does_to_scores_does_not_change_what_is_remembered() -> None:
    """Each rank penalises the completions of its own shard only; all must choose the same groups later."""
    replay = Replay(4)
    batch = fill_batch(Rounds((1.0, 0.0), (2.0, 0.0)), 2, max_rounds=1, replay=replay)
    for completion in batch.groups[1].completions:
        assert completion.score is not None
        completion.score.criteria["overlong"] = -1.0
        completion.score.total = 0.5
    again = replay.take(1)
    assert list(again) == [1]
    assert [c.score for c in again[1].completions] == [Score(2.0), Score(0.0)]


def test_a_replayed_completion_is_never_on_policy() -> None:
    """Whatever log-probabilities the engine gave: without old ones the ratio would be 1."""
    replay = Replay(1)
    completions = [Completion([2], sampler_logprobs=[-2.0], score=Score(r)) for r in (0.0, 1.0)]
    replay.keep({0: Group([1], completions)})
    assert [c.token["old_logprobs"] for c in replay.take(1)[0].completions] == [[-2.0], [-2.0]]


@pytest.mark.parametrize("wanted", [1, 2, 7])
def test_a_batch_has_exactly_the_groups_wanted(wanted: int) -> None:
    batch = fill_batch(Rounds(GOOD, FLAT, FLAT), wanted, max_rounds=3, replay=Replay(0))
    assert len(batch.groups) == wanted
    assert list(batch.groups) == sorted(batch.groups)
