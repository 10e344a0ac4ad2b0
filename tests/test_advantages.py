"""Advantages: hand-computed values and invariances."""

from __future__ import annotations

import math

import pytest

from burnish.objectives.advantages import (
    ADVANTAGES,
    Rewards,
    group_advantages,
    leave_one_out_advantages,
    mean_normalized_advantages,
    per_criterion_advantages,
    token_advantages,
    whitened_advantages,
)


def test_z_score_by_hand() -> None:
    (row,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], eps=0.0)
    std = math.sqrt(4 * 0.25 / 3)
    assert row == pytest.approx([0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std])


def test_scales_by_hand() -> None:
    rewards = [[1.0, 3.0], [0.0, 0.0]]
    assert group_advantages(rewards, scale="none") == [[-1.0, 1.0], [0.0, 0.0]]
    # Of 1, 3, 0 and 8 around 3; another number than the groups' own, sqrt(2) and sqrt(32).
    batch_std = math.sqrt((4 + 0 + 9 + 25) / 3)
    rows = group_advantages([[1.0, 3.0], [0.0, 8.0]], scale="batch", eps=0.0)
    assert rows[0] == pytest.approx([-1 / batch_std, 1 / batch_std])
    assert rows[1] == pytest.approx([-4 / batch_std, 4 / batch_std])


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


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out_advantages([[1.0, 2.0, 6.0]])[0] == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    assert leave_one_out_advantages([[1.0, None, 3.0]])[0] == pytest.approx([-2.0, 0.0, 2.0])
    whitened = leave_one_out_advantages([[1.0, 0.0], [3.0, 3.0]], scale="batch", eps=0.0)
    std = math.sqrt(2 / 3)  # of 1, -1, 0, 0
    assert whitened[0] == pytest.approx([1 / std, -1 / std])
    assert whitened[1] == [0.0, 0.0]


def test_maxrl_by_hand() -> None:
    assert mean_normalized_advantages([[1.0, 0.0, 0.0, 0.0]], eps=0.0) == [[3.0, -1.0, -1.0, -1.0]]
    assert mean_normalized_advantages([[0.0, 0.0], [1.0, 1.0]]) == [[0.0, 0.0], [0.0, 0.0]]


def test_maxrl_is_the_gradient_of_the_truncated_log_pass_rate() -> None:
    """E[sum_j A_j grad log pi(y_j)] / G over all outcomes of G draws of pass or fail, by the chance p of a pass."""
    p, size = 0.3, 3
    total = 0.0
    for outcome in range(2**size):
        rewards = [float(outcome >> j & 1) for j in range(size)]
        chance = math.prod(p if r else 1 - p for r in rewards)
        (advantages,) = mean_normalized_advantages([rewards], eps=0.0)
        scores = [1 / p if r else -1 / (1 - p) for r in rewards]  # d log pi / dp
        total += chance * sum(a * s for a, s in zip(advantages, scores, strict=True)) / size
    # The estimator that only averages successes has sum_{k<=G} (1-p)^(k-1); the baseline takes off its k = G term.
    assert total == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size + 1)) - (1 - p) ** (size - 1))


def test_whitening_by_hand_with_and_without_lengths() -> None:
    rows = whitened_advantages([[1.0, 0.0], [None, 2.0]], eps=0.0)
    assert [x for row in rows for x in row] == pytest.approx([0.0, -1.0, 0.0, 1.0])
    weighted = whitened_advantages([[1.0, 0.0]], lengths=[[3, 1]], eps=0.0)[0]
    std = math.sqrt((3 * 0.25**2 + 0.75**2) / 3)
    assert weighted == pytest.approx([0.25 / std, -0.75 / std])
    assert whitened_advantages([[2.0, 2.0]]) == [[0.0, 0.0]]
    assert whitened_advantages([[None]]) == [[0.0]]


def test_group_batch_is_centred_then_whitened() -> None:
    table = Rewards(totals=[[1.0, 0.0], [10.0, 10.0]], lengths=[[1, 1], [1, 1]])
    rows = ADVANTAGES["group_batch"](table)
    std = math.sqrt(0.5 / 3) + 1e-4  # of 0.5, -0.5, 0, 0
    assert rows[0] == pytest.approx([0.5 / std, -0.5 / std])
    assert rows[1] == [0.0, 0.0]


def test_each_criterion_is_scaled_within_its_group() -> None:
    """A reward of hundredths counts as much as one of hundreds."""
    small, large = [[0.01, 0.0], [0.0, 0.0]], [[0.0, 100.0], [0.0, 300.0]]
    totals = [[small[i][j] + large[i][j] for j in range(2)] for i in range(2)]
    rows = per_criterion_advantages([small, large], [1.0, 1.0], totals, eps=0.0)
    assert rows[0] == pytest.approx([0.0, 0.0])
    half = math.sqrt(1 / 2) / math.sqrt((1 / 2 + 1 / 2) / 3)
    assert rows[1] == pytest.approx([-half, half])
    assert per_criterion_advantages([small, large], [1.0, 0.0], totals, eps=0.0)[1] == [0.0, 0.0]
    failed = per_criterion_advantages([[[1.0, 0.0, 5.0]]], [1.0], [[1.0, 0.0, None]])
    assert failed[0][2] == 0.0


def test_rewards_to_go_by_hand() -> None:
    rows = token_advantages([[1.0, 0.0]], [[[0.5, 0.25], [0.0]]], eps=0.0)
    # What follows each token: 1 - 0.75, 1 - 0.25, 0.
    values = [0.25, 0.75, 0.0]
    mean = sum(values) / 3
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    assert rows[0][0] == pytest.approx([(0.25 - mean) / std, (0.75 - mean) / std])
    assert rows[0][1] == pytest.approx([-mean / std])
    assert token_advantages([[1.0, None]], [[[0.5], [0.1]]])[0][1] == [0.0]


def test_without_penalties_tokens_have_the_whitened_reward() -> None:
    rewards, lengths = [[1.0, 0.0], [0.5, 0.25]], [[3, 1], [2, 4]]
    zeros = [[[0.0] * n for n in row] for row in lengths]
    by_token = token_advantages(rewards, zeros)
    by_completion = whitened_advantages(rewards, lengths=lengths)
    for tokens, values in zip(by_token, by_completion, strict=True):
        for token, value in zip(tokens, values, strict=True):
            assert token == pytest.approx([value] * len(token))


@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_every_estimator_ignores_failed_rewards_and_equal_ones(name: str) -> None:
    lengths = [[2, 3, 1], [1, 1, 1]]
    rows = ADVANTAGES[name](Rewards(totals=[[1.0, None, 0.0], [None, None, None]], lengths=lengths))
    assert rows[0][1] == 0.0
    assert rows[0][0] > 0 > rows[0][2]
    assert rows[1] == [0.0, 0.0, 0.0]
    assert ADVANTAGES[name](Rewards(totals=[[2.0, 2.0]], lengths=[[1, 5]])) == [[0.0, 0.0]]
