"""Metrics between two logs, over ranks that need not have measured the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from burnish.training.metrics import StepMetrics
from burnish.training.step import Loss


def together(*ranks: StepMetrics) -> list[dict[str, float]]:
    """What every rank logs, each after one meeting with all the others."""
    messages: list[Any] = []

    def meet(own: Sequence[Any]) -> list[Any]:
        messages.extend(own)
        return list(own)

    copies = [rank.state_dict() for rank in ranks]
    for rank in ranks:
        rank.flush(meet)
    assert len(messages) == len(ranks)
    everywhere: Callable[[Sequence[Any]], list[Any]] = lambda own: messages  # noqa: E731
    for rank, state in zip(ranks, copies, strict=True):
        rank.load_state_dict(state)
    return [rank.flush(everywhere) for rank in ranks]


def test_ranks_may_have_measured_different_things() -> None:
    """A rank without a judged completion or a token in the loss must not wait for a number that it does not have."""
    one, two = StepMetrics(), StepMetrics()
    for value in (1.0, 3.0):
        one.add("reward", value)
    two.add("reward", 5.0)
    two.add("rewards/judge/mean", 0.25)
    one.add_tokens("entropy", torch.tensor([1.0, 2.0]))
    two.add_tokens("entropy", torch.tensor([6.0]))
    one.add_tokens("kl", torch.tensor([4.0]))
    two.add_loss(Loss(torch.zeros(()), sums={"policy_loss": 0.25}), step=0, scale=2)
    two.add_loss(Loss(torch.zeros(()), sums={"policy_loss": 0.125}), step=0, scale=2)
    expected = {"reward": 3.5, "rewards/judge/mean": 0.25, "entropy": 3.0, "kl": 4.0, "policy_loss": 0.75}
    assert together(one, two) == [expected, expected]


def test_nothing_is_counted_twice() -> None:
    metrics = StepMetrics()
    metrics.add("reward", 1.0)
    metrics.add_tokens("entropy", torch.ones(2))
    metrics.add_loss(Loss(torch.zeros(()), sums={"policy_loss": 1.0}), step=0, scale=1)
    assert metrics.flush(list) == {"reward": 1.0, "entropy": 1.0, "policy_loss": 1.0}
    assert metrics.flush(list) == {}


def test_no_tokens_are_no_metric() -> None:
    metrics = StepMetrics()
    metrics.add_tokens("entropy", torch.ones(0))
    assert metrics.flush(list) == {}
