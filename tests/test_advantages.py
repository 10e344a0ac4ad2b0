"""Advantages: hand-computed values and invariances."""

from __future__ import annotations

import math

import pytest

from burnish.advantages import group_advantages


def test_z_score_by_hand() -> None:
    (row,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], eps=0.0)
    std = math.sqrt(4 * 0.25 / 3)
    assert row == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std])


def test_scales_by_hand() -> None:
    rewards = [[1.0, 3.0], [0.0, 0.0]]
    assert group_advantages(rewards, scale="none") == [[-1.0, 1.0], [0.0, 0.0]]
    batch_std = math.sqrt(((1 - 1) ** 2 + (3 - 1) ** 2 + 2 * (0 - 1) ** 2) / 3)
    assert group_advantages(rewards, scale="batch", eps=0.0)[0] == pytest.approx([-1 / batch_std, 1 / batch_std])


def test_equal_rewards_give_exact_zeros() -> None:
    assert group_advantages([[0.1 + 0.2] * 3]) == [[0.0, 0.0, 0.0]]


def test_failed_rewards_count_in_no_mean() -> None:
    with_failure = group_advantages([[1.0, None, 0.0]])[0]
    without = group_advantages([[1.0, 0.0]])[0]
    assert with_failure == [without[0], 0.0, without[1]]
    assert group_advantages([[1.0, None], [None, None]]) == [[0.0, 0.0], [0.0, 0.0]]


def test_shift_invariance_and_zero_sum() -> None:
    base = group_advantages([[0.2, 0.9, 0.4]])[0]
    assert group_advantages([[5.2, 5.9, 5.4]])[0] == pytest.approx(base)
    assert sum(base) == pytest.approx(0.0, abs=1e-12)
