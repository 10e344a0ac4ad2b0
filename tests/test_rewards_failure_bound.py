"""A run that can no longer grade stops, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RewardError
from burnish.rewards.failure_bound import FailureBound
from test_trainers import grpo

FAILED = {"judge": "no service"}


def test_the_fraction_is_that_of_the_last_rollouts() -> None:
    bound = FailureBound(0.5)
    bound.add([True] * 4, [FAILED] * 4)  # one rollout proves nothing
    bound.add([False] * 4, [{}] * 4)  # half of all
    with pytest.raises(
        RewardError, match=r"5 of 9 .* 3 rollouts.*max_failed_rewards = 0\.5.*judge 5 times.*no service"
    ):
        bound.add([True], [FAILED])


def test_old_rollouts_are_forgotten() -> None:
    bound = FailureBound(0.5)
    for _ in range(8):
        bound.add([False, False], [{}, {}])
    for _ in range(4):
        bound.add([True, True], [FAILED] * 2)
    with pytest.raises(RewardError, match="10 of 16"):
        bound.add([True, True], [FAILED] * 2)


def test_one_never_stops_and_zero_stops_at_once() -> None:
    never, strict = FailureBound(1.0), FailureBound(0.0)
    for _ in range(3):
        never.add([True], [{}])
    strict.add([False], [{}])
    with pytest.raises(RewardError, match="other ranks"):
        strict.add([True, False], [])


@pytest.mark.parametrize(("most", "stops"), [(0.5, True), (1.0, False)])
def test_a_run_stops(most: float, stops: bool, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(completions: list[str], **columns: Any) -> list[Any]:
        calls.append(len(completions))
        return [1.0, *[ValueError("the service is gone")] * (len(completions) - 1)]

    trainer = grpo(tmp_path, rewards=failing, max_steps=4, max_failed_rewards=most)
    if not stops:
        trainer.train()
        return
    with pytest.raises(RewardError, match=r"failing .* times, last: .*the service is gone"):
        trainer.train()
    assert len(calls) == 2
