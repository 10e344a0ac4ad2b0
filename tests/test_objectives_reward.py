"""Losses of reward models: values by hand, independent float64 oracles, finite differences, limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from burnish.objectives.reward_modelling import (
    bradley_terry,
    calibration_bins,
    calibration_error,
    centering,
    plackett_luce,
    step_cross_entropy,
)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_bradley_terry_by_hand() -> None:
    losses = bradley_terry(f64(1.0, 0.0, -2.0), f64(0.0, 0.0, 1.0), f64(0.5, 0.0, -1.0))
    expected = [math.log1p(math.exp(-x)) for x in (0.5, 0.0, -2.0)]
    torch.testing.assert_close(losses, f64(*expected), rtol=0, atol=1e-15)
    torch.testing.assert_close(bradley_terry(f64(3.0), f64(1.0)), f64(math.log1p(math.exp(-2))), rtol=0, atol=1e-15)


def test_bradley_terry_of_far_apart_scores_is_finite_with_a_gradient() -> None:
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    losses = bradley_terry(chosen, torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == [500.0, 0.0]
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_plackett_luce_by_drawing_without_replacement() -> None:
    """P(ranking) = prod_i w_i / (w_i + ... + w_n), w = e^r; over all rankings it sums to 1."""
    scores = normal(4)
    total = 0.0
    for order in itertools.permutations(range(4)):
        weights = [math.exp(float(scores[i])) for i in order]
        probability = math.prod(w / sum(weights[i:]) for i, w in enumerate(weights))
        loss = float(plackett_luce(scores[list(order)][None])[0])
        assert loss == pytest.approx(-math.log(probability), abs=1e-13)
        total += math.exp(-loss)
    assert total == pytest.approx(1.0, abs=1e-13)


def test_plackett_luce_of_two_is_bradley_terry_and_ignores_a_shift() -> None:
    scores = normal(6, 2)
    torch.testing.assert_close(plackett_luce(scores), bradley_terry(*scores.unbind(-1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(plackett_luce(scores), plackett_luce(scores + 3.0), rtol=0, atol=1e-14)


def test_centering_by_hand() -> None:
    assert centering(torch.stack((f64(1, -2), f64(2, 2)), 1), coefficient=0.5).tolist() == [4.5, 0.0]
    assert centering(f64(1, 2, -4)[None], coefficient=2.0).tolist() == [2.0]


def test_step_cross_entropy_by_hand() -> None:
    losses = step_cross_entropy(f64(0.0, 2.0, 2.0), torch.tensor([True, True, False]))
    expected = [math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(2))]
    torch.testing.assert_close(losses, f64(*expected), rtol=0, atol=1e-14)


def test_gradients_by_finite_differences() -> None:
    chosen, rejected, margin = (row.clone().requires_grad_() for row in normal(3, 5))
    assert torch.autograd.gradcheck(bradley_terry, (chosen, rejected, margin))
    assert torch.autograd.gradcheck(bradley_terry, (chosen, rejected))
    lists = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(plackett_luce, (lists,))
    assert torch.autograd.gradcheck(lambda x: centering(x, coefficient=0.3), (lists,))
    labels = torch.tensor([1.0, 0, 1, 1, 0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: step_cross_entropy(x, labels), (chosen,))


def test_calibration_by_hand() -> None:
    """Two predictions of 0.75 with one hit are off by 0.25, one of 0.05 without a hit by 0.05."""
    bins = calibration_bins(f64(0.75, 0.75, 0.05, 1.0), f64(1, 0, 0, 1))
    assert bins[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 2, 0, 1]
    assert calibration_error(bins) == pytest.approx((2 * 0.25 + 0.05 + 0.0) / 4, abs=1e-15)
    assert calibration_error(calibration_bins(f64(), f64())) == 0.0


def test_calibration_bins_of_parts_add_up() -> None:
    p, y = normal(50).sigmoid(), (normal(50) > 0).double()
    parts = calibration_bins(p[:20], y[:20], num_bins=7) + calibration_bins(p[20:], y[20:], num_bins=7)
    torch.testing.assert_close(parts, calibration_bins(p, y, num_bins=7), rtol=0, atol=1e-13)


def test_a_calibrated_predictor_has_a_small_error() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(100_000, generator=generator, dtype=torch.float64)
    y = (torch.rand(100_000, generator=generator, dtype=torch.float64) < p).double()
    assert calibration_error(calibration_bins(p, y)) < 0.01  # 10 bins of 10000: each mean is known to 0.005
    assert calibration_error(calibration_bins(p**3, y)) > 0.2
