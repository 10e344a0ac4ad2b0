"""Values: advantages and losses by hand, by an independent float64 loop, closed forms, finite differences, limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from burnish.objectives.value import clipped_value_loss, explained_variance, gae, moments, token_rewards, whiten

LENGTHS = (4, 1, 0, 7, 2)
"""Tokens of each sequence; one has none."""
INDEX = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_definition(
    rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float, last: float
) -> list[float]:
    """A_t as the sum over k of (gamma lambda)^k delta_(t+k), one sequence, no recursion."""
    after = [*values, last][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [math.fsum((gamma * lam) ** k * deltas[t + k] for k in range(len(deltas) - t)) for t in range(len(deltas))]


def test_gae_by_hand() -> None:
    """gamma = lambda = 1/2, rewards 0, 0, 1, values 2, 4, 2: deltas 0, -3, -1; A = 0 - 3/4 - 1/16, -3 - 1/4, -1."""
    advantages, returns = gae(f64(0, 0, 1), f64(2, 4, 2), torch.zeros(3).long(), 1, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-0.8125, -3.25, -1.0]
    assert returns.tolist() == [1.1875, 0.75, 1.0]


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.7)])
def test_gae_by_its_definition(gamma: float, lam: float, bootstrap: bool) -> None:
    rewards, values, last = normal(14), normal(14, seed=1), normal(5, seed=2)
    advantages, returns = gae(
        rewards, values, INDEX, 5, gamma=gamma, lam=lam, last_values_S=last if bootstrap else None
    )
    begin, expected = 0, []
    for sequence, length in enumerate(LENGTHS):
        part = slice(begin, begin + length)
        end = float(last[sequence]) if bootstrap else 0.0
        expected += by_definition(rewards[part].tolist(), values[part].tolist(), gamma, lam, end)
        begin += length
    torch.testing.assert_close(advantages, f64(*expected), rtol=0, atol=1e-14)
    torch.testing.assert_close(returns, f64(*expected) + values, rtol=0, atol=1e-14)


def test_gae_with_lambda_one_is_the_return_less_the_value() -> None:
    """Monte Carlo: with gamma = 1 the return of a token is the sum of all rewards from it on."""
    rewards, values = normal(7), normal(7, seed=1)
    advantages, returns = gae(rewards, values, torch.zeros(7).long(), 1, gamma=1.0, lam=1.0)
    to_go = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-14)
    torch.testing.assert_close(advantages, to_go - values, rtol=0, atol=1e-14)


def test_gae_with_lambda_zero_is_the_one_step_difference() -> None:
    rewards, values = normal(7), normal(7, seed=1)
    advantages, _ = gae(rewards, values, torch.zeros(7).long(), 1, gamma=0.9, lam=0.0)
    torch.testing.assert_close(advantages, rewards + 0.9 * torch.cat((values[1:], f64(0))) - values, rtol=0, atol=1e-15)


def test_gae_of_a_constant_reward_is_a_geometric_sum() -> None:
    """V = 0 and r = 1: A_t = (1 - (gamma lambda)^(T - t)) / (1 - gamma lambda); exact values leave no advantage."""
    ones, zeros, index = torch.ones(30).double(), torch.zeros(30).double(), torch.zeros(30).long()
    advantages, _ = gae(ones, zeros, index, 1, gamma=0.9, lam=0.8)
    expected = [(1 - 0.72 ** (30 - t)) / (1 - 0.72) for t in range(30)]
    torch.testing.assert_close(advantages, f64(*expected), rtol=0, atol=1e-13)
    exact = f64(*[(1 - 0.9 ** (30 - t)) / (1 - 0.9) for t in range(30)])
    advantages, returns = gae(ones, exact, index, 1, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, zeros, rtol=0, atol=1e-13)
    torch.testing.assert_close(returns, exact, rtol=0, atol=1e-13)


def test_gae_of_a_sequence_depends_on_itself_alone() -> None:
    rewards, values = normal(14), normal(14, seed=1)
    whole, _ = gae(rewards, values, INDEX, 5, gamma=0.9, lam=0.8)
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = torch.cat([(s == INDEX).nonzero()[:, 0] for s in order])
    again = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)[order])
    permuted, _ = gae(rewards[moved], values[moved], again, 5, gamma=0.9, lam=0.8)
    assert torch.equal(permuted, whole[moved])
    other = torch.where(INDEX == 3, rewards, rewards + 100)
    assert torch.equal(gae(other, values, INDEX, 5, gamma=0.9, lam=0.8)[0][INDEX == 3], whole[INDEX == 3])


def test_gae_keeps_the_dtype_and_takes_nothing() -> None:
    none = torch.zeros(0)
    advantages, returns = gae(none, none, none.long(), 3, gamma=1.0, lam=0.95)
    assert advantages.shape == returns.shape == (0,)
    wide, _ = gae(normal(14), normal(14, seed=1), INDEX, 5, gamma=1.0, lam=0.95)
    narrow, _ = gae(normal(14).float(), normal(14, seed=1).float(), INDEX, 5, gamma=1.0, lam=0.95)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="not ascending"):
        gae(f64(0, 0, 0), f64(0, 0, 0), torch.tensor([0, 1, 0]), 2, gamma=1.0, lam=1.0)


def test_token_rewards_by_hand() -> None:
    """Sequences of 2, 0 and 1 tokens: the reward 9 of the empty one has no place."""
    rewards = token_rewards(f64(0.5, -1, 2), f64(3, 9, -4), sequence_index_N=torch.tensor([0, 0, 2]), beta=0.1)
    torch.testing.assert_close(rewards, f64(-0.05, 3.1, -4.2), rtol=0, atol=1e-15)
    rewards = token_rewards(f64(0.5, -1, 2), f64(3, 9, -4), sequence_index_N=torch.tensor([0, 0, 2]), beta=0.0)
    assert rewards.tolist() == [0.0, 3.0, -4.0]


def test_rewards_of_turns_by_hand() -> None:
    """Two turns of 2 tokens each, the first rewarded with 2 of 5 in all; a sequence of one turn gets its reward 7."""
    index, early = torch.tensor([0, 0, 0, 0, 1]), f64(0, 2, 0, 0, 0)
    rewards = token_rewards(torch.zeros(5), f64(5, 7), sequence_index_N=index, beta=0.0, early_rewards_N=early)
    assert rewards.tolist() == [0.0, 2.0, 0.0, 3.0, 7.0]
    kl = f64(1, 2, 3, 4, 5)
    rewards = token_rewards(kl, f64(5, 7), sequence_index_N=index, beta=0.5, early_rewards_N=early)
    assert rewards.tolist() == [-0.5, 1.0, -1.5, 1.0, 4.5]


def test_rewards_of_turns_add_up_to_the_reward() -> None:
    early, reward = normal(14), normal(5, seed=1)
    rewards = token_rewards(torch.zeros(14).double(), reward, sequence_index_N=INDEX, beta=0.0, early_rewards_N=early)
    sums = torch.zeros(5).double().index_add(0, INDEX, rewards)
    torch.testing.assert_close(sums, torch.where(torch.tensor(LENGTHS) > 0, reward, 0.0), rtol=0, atol=1e-14)


def test_early_rewards_of_zero_change_no_bit() -> None:
    kl, reward = normal(14).float(), normal(5, seed=1)
    settings = {"sequence_index_N": INDEX, "beta": 0.3}
    plain = token_rewards(kl, reward, **settings)
    assert torch.equal(token_rewards(kl, reward, **settings, early_rewards_N=torch.zeros(14).double()), plain)
    none, nobody = torch.zeros(0), torch.zeros(0).long()
    assert token_rewards(none, none, sequence_index_N=nobody, beta=0.0, early_rewards_N=none).shape == (0,)


def test_gae_over_two_turns_and_a_tool_between_by_hand() -> None:
    """Tokens a b | tool tool | c d, rewards 1 at b and 2 at d, values 3 1 - - 2 4, gamma 1/2, lambda 1/2.

    The deltas are 0 + 1/2 - 3 = -5/2 at a, 1 + 2/2 - 1 = 1 at b (the state that b leads to is the one before c),
    0 + 4/2 - 2 = 0 at c and 2 - 4 = -2 at d; each advantage is its delta and a quarter of the next advantage.
    """
    mask, values = torch.tensor([True, True, False, False, True, True]), f64(3, 1, 100, -100, 2, 4)
    index = torch.zeros(4).long()
    rewards = token_rewards(
        torch.zeros(4).double(), f64(3), sequence_index_N=index, beta=0.0, early_rewards_N=f64(0, 1, 0, 0)
    )
    advantages, returns = gae(rewards, values[mask], index, 1, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-2.28125, 0.875, -0.5, -2.0]
    assert returns.tolist() == [0.71875, 1.875, 1.5, 2.0]


def test_the_returns_of_token_rewards_are_the_reward_less_the_divergence_to_come() -> None:
    kl, reward = normal(14), normal(5, seed=1)
    rewards = token_rewards(kl, reward, sequence_index_N=INDEX, beta=0.3)
    _, returns = gae(rewards, normal(14, seed=2), INDEX, 5, gamma=1.0, lam=1.0)
    for sequence in (0, 1, 3, 4):
        own = sequence == INDEX
        to_come = kl[own].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns[own], reward[sequence] - 0.3 * to_come, rtol=0, atol=1e-14)


def test_clipped_value_loss_by_hand() -> None:
    """Old value 1, clip 0.5, return 2 or 0. Moving away from the return is never clipped: the error has no bound."""
    values = f64(1.2, 1.8, 2.5, -1.0, 1.8, 0.2)
    returns = f64(2.0, 2.0, 2.0, 2.0, 0.0, 0.0)
    losses, clipped = clipped_value_loss(values, torch.ones(6).double(), returns, clip=0.5)
    expected = [0.5 * e**2 for e in (0.8, 0.5, 0.5, 3.0, 1.8, 0.5)]
    torch.testing.assert_close(losses, f64(*expected), rtol=0, atol=1e-15)
    assert clipped.tolist() == [False, True, False, False, False, True]


def test_the_plain_squared_error_is_the_limit_of_no_clip_and_of_no_update() -> None:
    values, old, returns = normal(3, 20)
    plain = 0.5 * (values - returns) ** 2
    for losses, clipped in (
        clipped_value_loss(values, old, returns, clip=None),
        clipped_value_loss(values, old, returns, clip=100.0),
        clipped_value_loss(values, values, returns, clip=1e-3),
    ):
        torch.testing.assert_close(losses, plain, rtol=0, atol=1e-15)
        assert not clipped.any()
    losses, clipped = clipped_value_loss(values, old, returns, clip=0.3)
    assert 0 < int(clipped.sum()) < 20
    assert bool((losses >= plain).all())


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_gradients_by_finite_differences(clip: float | None) -> None:
    values, old, returns = normal(3, 20)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, clip=clip)[0], (values,))
    losses, clipped = clipped_value_loss(values, old, returns, clip=clip)
    losses.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad == 0, clipped)
    torch.testing.assert_close(values.grad[~clipped], (values - returns).detach()[~clipped], rtol=0, atol=1e-15)


def test_no_gradient_reaches_returns_and_old_values() -> None:
    values, old, returns = (row.clone().requires_grad_() for row in normal(3, 20))
    clipped_value_loss(values, old, returns, clip=0.3)[0].sum().backward()
    assert old.grad is None
    assert returns.grad is None
    assert not gae(values, old, torch.zeros(20).long(), 1, gamma=1.0, lam=1.0)[0].requires_grad


def test_moments_of_parts_add_up() -> None:
    assert moments(f64(1, -2, 4)).tolist() == [3, 3, 21]
    assert moments(torch.zeros(0)).tolist() == [0, 0, 0]
    values = normal(50).float()
    torch.testing.assert_close(moments(values[:20]) + moments(values[20:]), moments(values), rtol=0, atol=1e-12)


def test_whiten_by_hand() -> None:
    """1, 3: mean 2, unbiased variance 2."""
    root = math.sqrt(2 + 1e-8)
    torch.testing.assert_close(whiten(f64(1, 3)), f64(-1 / root, 1 / root), rtol=0, atol=1e-15)
    torch.testing.assert_close(whiten(f64(1, 3), shift_mean=False), f64(2 - 1 / root, 2 + 1 / root), rtol=0, atol=1e-15)


def test_whitened_numbers_have_mean_zero_and_deviation_one_over_all_ranks() -> None:
    values = 5 + 3 * normal(1000)
    parts = values[:300], values[300:]
    total = moments(parts[0]) + moments(parts[1])
    whitened = torch.cat([whiten(part, total) for part in parts])
    torch.testing.assert_close(whitened, whiten(values), rtol=0, atol=1e-12)
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-12)
    assert float(whitened.std()) == pytest.approx(1, abs=1e-8)  # epsilon stands beside a variance of 9
    kept = whiten(values, shift_mean=False)
    assert float(kept.mean()) == pytest.approx(float(values.mean()), abs=1e-12)
    assert float(kept.std()) == pytest.approx(1, abs=1e-8)


def test_equal_numbers_whiten_to_nothing() -> None:
    assert whiten(torch.full((7,), 0.1)).abs().max() < 1e-9, "rounding must not be blown up"
    torch.testing.assert_close(whiten(torch.full((7,), 0.1), shift_mean=False), torch.full((7,), 0.1))
    assert whiten(f64(3)).tolist() == [0.0]
    assert whiten(f64(3), shift_mean=False).tolist() == [3.0]


def explained(values: torch.Tensor, returns: torch.Tensor) -> float:
    return explained_variance(moments(returns - values), moments(returns))


def test_explained_variance_by_hand() -> None:
    """Returns 0, 2 vary by 1; errors 0, 1 by 1/4."""
    assert explained(f64(0, 1), f64(0, 2)) == pytest.approx(0.75, abs=1e-15)
    assert explained(f64(2, 0), f64(0, 2)) == pytest.approx(-3.0, abs=1e-15)


def test_explained_variance_in_the_limits() -> None:
    returns = 4 + normal(40)
    assert explained(returns, returns) == 1.0
    assert explained(torch.full_like(returns, -7.0), returns) == pytest.approx(0.0, abs=1e-12)
    assert explained(returns + 3, returns) == pytest.approx(1.0, abs=1e-12), "a shift is not variance"
    constant = torch.full((1000,), 0.1)
    assert explained(constant, constant) == 0.0
    assert explained(torch.randn(1000), constant) == 0.0
    assert explained(torch.zeros(0), torch.zeros(0)) == 0.0
    split = [(moments(returns[p] - 1.1 * returns[p].floor()), moments(returns[p])) for p in (slice(9), slice(9, None))]
    whole = explained(1.1 * returns.floor(), returns)
    assert explained_variance(split[0][0] + split[1][0], split[0][1] + split[1][1]) == pytest.approx(whole, abs=1e-12)
    noise = torch.var(returns - 1.1 * returns.floor(), correction=0) / torch.var(returns, correction=0)
    assert whole == pytest.approx(1 - float(noise), abs=1e-12)
