"""Objectives: hand-computed values, finite differences, mask invariance, the ratio-1 limit, split = whole."""

from __future__ import annotations

import math

import pytest
import torch

from burnish.objectives.aggregate import aggregate, sequence_sums
from burnish.objectives.kl import kl_k3
from burnish.objectives.policy import clipped_surrogate, log_ratio
from burnish.objectives.supervised import SUPERVISED_LOSSES, dft, nll

INDEX = torch.tensor([0, 0, 1, 1, 1, 2])


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_nll() -> None:
    assert torch.equal(nll(f64(-1.0, -0.5)), f64(1.0, 0.5))


def test_dft_by_hand_and_by_differences_of_the_likelihood() -> None:
    logprobs = f64(0.8, 0.25, 1.0).log().requires_grad_()
    losses = dft(logprobs)
    torch.testing.assert_close(losses.detach(), f64(0.8 * -math.log(0.8), 0.25 * math.log(4), 0.0), rtol=0, atol=1e-15)
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    # The weight is a constant: the gradient is that of -p, not that of -p log p.
    step = 1e-6
    differences = ((logprobs - step).exp() - (logprobs + step).exp()) / (2 * step)
    torch.testing.assert_close(gradient, differences.detach(), rtol=0, atol=1e-9)  # step^2 and 1e-16 / step


def test_every_supervised_loss_vanishes_for_a_certain_token() -> None:
    assert set(SUPERVISED_LOSSES) == {"dft", "nll"}
    for loss in SUPERVISED_LOSSES.values():
        assert loss(f64(0.0, -1.0)).tolist()[0] == 0.0
        assert loss(f64(0.0, -1.0)).tolist()[1] > 0


def test_sequence_sums_with_an_empty_sequence() -> None:
    assert sequence_sums(f64(1, 2, 4), torch.tensor([0, 0, 2]), 4).tolist() == [3, 0, 4, 0]


@pytest.mark.parametrize(
    ("reduction", "denominator", "expected"),
    [("token", 6, 21 / 6), ("sequence", 3, (1.5 + 4 + 6) / 3), ("constant", 3 * 10, 21 / 30)],
)
def test_aggregate_by_hand(reduction: str, denominator: float, expected: float) -> None:
    value = aggregate(
        f64(1, 2, 3, 4, 5, 6),
        sequence_index_N=INDEX,
        num_sequences=3,
        reduction=reduction,  # type: ignore[arg-type]
        denominator=denominator,
    )
    assert float(value) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_aggregate_of_parts_adds_up_to_the_whole(reduction: str) -> None:
    values = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def part(places: list[int], index: list[int], number: int) -> torch.Tensor:
        return aggregate(
            values[places],
            sequence_index_N=torch.tensor(index),
            num_sequences=number,
            reduction=reduction,  # type: ignore[arg-type]
            denominator=7.0,
        )

    whole = part(list(range(6)), INDEX.tolist(), 3)
    split = part([0, 1, 5], [0, 0, 1], 2) + part([2, 3, 4], [0, 0, 0], 1)
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-15)


def test_clipped_surrogate_by_hand() -> None:
    ratios = f64(0.5, 0.5, 1.0, 1.5, 1.5, 5.0)
    advantages = f64(1.0, -1.0, 2.0, 1.0, -1.0, -1.0)
    losses, clipped = clipped_surrogate(ratios.log(), advantages, epsilon_low=0.2, epsilon_high=0.3, delta=4.0)
    torch.testing.assert_close(losses, f64(-0.5, 0.8, -2.0, -1.3, 1.5, 4.0), rtol=0, atol=1e-12)
    assert clipped.tolist() == [False, True, False, True, False, False]


def test_ratio_one_gives_the_policy_gradient() -> None:
    logprobs = f64(-1.0, -2.0, -0.1).requires_grad_()
    advantages = f64(1.0, -2.0, 0.0)
    ratio = log_ratio(
        logprobs, logprobs.detach(), level="token", sequence_index_N=torch.tensor([0, 0, 0]), num_sequences=1
    )
    losses, clipped = clipped_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.2)
    losses.sum().backward()
    assert torch.equal(losses.detach(), -advantages)
    assert not clipped.any()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_sequence_ratio_is_the_geometric_mean_and_its_gradient_reaches_every_token() -> None:
    logprobs = f64(-1.0, -2.0, -3.0).requires_grad_()
    old = f64(-1.5, -1.0, -3.0)
    ratio = log_ratio(logprobs, old, level="sequence", sequence_index_N=torch.tensor([0, 0, 1]), num_sequences=2)
    torch.testing.assert_close(ratio.detach(), f64(-0.25, -0.25, 0.0))
    ratio[0].backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, f64(0.5, 0.5, 0.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 3.0])
def test_surrogate_gradient_by_finite_differences(level: str, delta: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(6, dtype=torch.float64, generator=generator)
    new = (old + 0.3 * torch.randn(6, dtype=torch.float64, generator=generator)).requires_grad_()
    advantages = torch.randn(6, dtype=torch.float64, generator=generator)

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        ratio = log_ratio(logprobs, old, level=level, sequence_index_N=INDEX, num_sequences=3)  # type: ignore[arg-type]
        return clipped_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.28, delta=delta)[0]

    assert torch.autograd.gradcheck(loss, (new,))


def test_old_logprobs_and_advantages_get_no_gradient() -> None:
    new, old, advantages = (f64(-1.0).requires_grad_() for _ in range(3))
    ratio = log_ratio(new, old, level="token", sequence_index_N=torch.tensor([0]), num_sequences=1)
    clipped_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.2)[0].sum().backward()
    assert old.grad is None
    assert advantages.grad is None


def test_kl_k3_by_hand_and_by_finite_differences() -> None:
    policy, reference = f64(-1.0, -2.0), f64(-1.5, -2.0)
    torch.testing.assert_close(kl_k3(policy, reference), f64(math.exp(-0.5) + 0.5 - 1, 0.0))
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, reference), (policy.requires_grad_(),))


def test_kl_k3_is_unbiased() -> None:
    p, q = f64(0.7, 0.2, 0.1), f64(0.5, 0.25, 0.25)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_k3(p.log(), q.log())).sum(), expected)
