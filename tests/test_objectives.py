"""Objectives: hand-computed values, finite differences, mask invariance, the ratio-1 limit, split = whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from burnish.objectives.aggregate import aggregate, sequence_means, sequence_sums
from burnish.objectives.entropy import adapted_entropy_coef
from burnish.objectives.kl import KL_ESTIMATORS, adapted_beta, kl_k1, kl_k2, kl_k3
from burnish.objectives.policy import (
    POLICY_LOSSES,
    Correction,
    PolicyOptions,
    PolicyTerms,
    RatioLevel,
    cispo,
    clipped_surrogate,
    correction_weights,
    log_ratio,
    off_policy_mask,
    sapo,
    sequence_log_weight,
    vespo,
    vespo_weight,
)
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
    assert sequence_means(f64(1, 2, 4), torch.tensor([0, 0, 2]), 4).tolist() == [1.5, 0, 4, 0]


@pytest.mark.parametrize(
    ("reduction", "denominator", "expected"),
    [("token", 6, 21 / 6), ("sequence", 3, (1.5 + 4 + 6) / 3), ("sum", 3, 21 / 3), ("constant", 3 * 10, 21 / 30)],
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


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum", "constant"])
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


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
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


LEVELS: tuple[RatioLevel, ...] = ("token", "sequence", "sequence_token", "product")


def ratios(level: RatioLevel, new: torch.Tensor, old: torch.Tensor, index: torch.Tensor = INDEX) -> torch.Tensor:
    return log_ratio(new, old, level=level, sequence_index_N=index, num_sequences=int(index.max()) + 1)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [0.5, -1.5, 0.25]),
        ("sequence", [-0.5, -0.5, 0.25]),
        ("sequence_token", [-0.5, -0.5, 0.25]),
        ("product", [-1.0, -1.0, 0.25]),
    ],
)
def test_log_ratio_by_hand(level: RatioLevel, expected: list[float]) -> None:
    new, old = f64(-1.0, -2.5, -1.0), f64(-1.5, -1.0, -1.25)
    assert ratios(level, new, old, torch.tensor([0, 0, 1])).tolist() == expected


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        # Of token 1 in a sequence of two: its own, the mean, its own though the value is the mean's, the sum.
        ("token", [0.0, 1.0, 0.0]),
        ("sequence", [0.5, 0.5, 0.0]),
        ("sequence_token", [0.0, 1.0, 0.0]),
        ("product", [1.0, 1.0, 0.0]),
    ],
)
def test_which_tokens_a_ratio_moves(level: RatioLevel, expected: list[float]) -> None:
    new = f64(-1.0, -2.5, -1.0).requires_grad_()
    ratios(level, new, f64(-1.5, -1.0, -1.25), torch.tensor([0, 0, 1]))[1].backward()
    assert new.grad is not None
    assert new.grad.tolist() == expected


def policy_terms(
    level: RatioLevel, new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, index: torch.Tensor = INDEX
) -> PolicyTerms:
    weights = sequence_log_weight(new, old, sequence_index_N=index, num_sequences=int(index.max()) + 1)
    return PolicyTerms(ratios(level, new, old, index), advantages, new, weights)


def random_terms(seed: int = 0, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New and old log-probabilities and advantages of six tokens."""
    generator = torch.Generator().manual_seed(seed)
    old, noise, advantages = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    return old - 2 + spread * noise, old - 2, advantages


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_losses_of_parts_are_those_of_the_whole(name: str, level: RatioLevel) -> None:
    """Sequences apart, in another order: values and gradients of the aggregated loss stay."""
    loss, options = POLICY_LOSSES[name], PolicyOptions(epsilon_high=1.1 if name == "cispo" else None)
    new, old, advantages = random_terms()

    def part(places: list[int], index: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = new[places].clone().requires_grad_()
        where = torch.tensor(index)
        terms = policy_terms(level, leaf, old[places], advantages[places], where)
        value = aggregate(
            loss.compute(terms, options)[0],
            sequence_index_N=where,
            num_sequences=max(index) + 1,
            reduction=loss.reduction,
            denominator=7.0,
        )
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    whole = part(list(range(6)), INDEX.tolist())
    split = (part([2, 3, 4, 0, 1], [0, 0, 0, 1, 1]), part([5], [0]))
    torch.testing.assert_close(whole[0], split[0][0] + split[1][0], rtol=0, atol=1e-15)
    torch.testing.assert_close(whole[1][[2, 3, 4, 0, 1]], split[0][1], rtol=0, atol=1e-15)
    torch.testing.assert_close(whole[1][5:], split[1][1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_at_ratio_one_every_loss_is_the_policy_gradient(name: str, level: RatioLevel) -> None:
    """d loss / d log pi(y_t) = -A_t for the token levels; sequence levels share the sequence's one advantage."""
    options = PolicyOptions(epsilon_high=5.0 if name == "cispo" else None)
    new = random_terms()[0].requires_grad_()
    advantages = f64(1.0, 1.0, -2.0, -2.0, -2.0, 0.0)
    terms = policy_terms(level, new, new.detach(), advantages)
    losses, clipped = POLICY_LOSSES[name].compute(terms, options)
    (gradient,) = torch.autograd.grad(losses.sum(), new)
    assert not clipped.any()
    lengths = f64(2, 2, 3, 3, 3, 1)
    # A product repeats its sum at each of |s| tokens; gradients of cispo and vespo do not pass through the ratio.
    times = lengths if level == "product" and name not in ("cispo", "vespo") else torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close(gradient, -advantages * times, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_token_of_another_sequence_changes_nothing(name: str) -> None:
    options = PolicyOptions(epsilon_high=1.1 if name == "cispo" else None)
    new, old, advantages = random_terms()
    changed = torch.tensor([0, 0, 0, 0, 0, 1.0], dtype=torch.float64)
    for level in LEVELS:
        values = [
            POLICY_LOSSES[name].compute(policy_terms(level, x, old, advantages), options)[0]
            for x in (new, new + changed)
        ]
        assert torch.equal(values[0][:5], values[1][:5])
        assert values[0][5] != values[1][5]


def test_reductions_of_the_table() -> None:
    expected = {
        "grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant", "luspo": "sum", "cispo": "token",
        "sapo": "sequence", "vespo": "token",
    }  # fmt: skip
    # Other tests register losses of their own.
    assert {name: POLICY_LOSSES[name].reduction for name in expected} == expected


def test_cispo_by_hand() -> None:
    ratio, advantages = f64(0.5, 3.0, 3.0, 1.0), f64(1.0, 2.0, -1.0, 0.0)
    logprobs = f64(-1.0, -2.0, -0.5, -1.0).requires_grad_()
    losses, clipped = cispo(ratio.log(), advantages, logprobs, bound=2.0)
    torch.testing.assert_close(losses.detach(), f64(0.5, 8.0, -1.0, 0.0), rtol=0, atol=1e-14)
    assert clipped.tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    # No token loses its gradient: -min(r, 2) A.
    torch.testing.assert_close(gradient, f64(-0.5, -4.0, 2.0, 0.0), rtol=0, atol=1e-14)


def test_cispo_s_weight_has_no_gradient() -> None:
    new, old, advantages = random_terms()
    leaf = new.clone().requires_grad_()
    losses = cispo(ratios("token", leaf, old), advantages, leaf, bound=1.1)[0]
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(gradient, -(new - old).exp().clamp(max=1.1) * advantages, rtol=0, atol=1e-14)


def test_sapo_by_hand_and_by_finite_differences() -> None:
    ratio, advantages = f64(1.0, 2.0, 2.0, 0.5), f64(3.0, 1.0, -1.0, 0.0)
    losses = sapo(ratio.log(), advantages, temperature_pos=2.0, temperature_neg=4.0)
    gates = [2 / (1 + math.exp(0.0)), 2 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-4.0))]
    torch.testing.assert_close(losses, f64(-3 * gates[0], -gates[1], gates[2], 0.0), rtol=0, atol=1e-14)
    new, old, advantages = random_terms()

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return sapo(ratios("token", logprobs, old), advantages, temperature_pos=1.0, temperature_neg=1.05)

    assert torch.autograd.gradcheck(loss, (new.requires_grad_(),))


def test_sapo_damps_ratios_far_from_one_and_negative_advantages_more() -> None:
    log_ratios = f64(0.0, 0.7, 0.7, -3.0).requires_grad_()
    losses = sapo(log_ratios, f64(1.0, 1.0, -1.0, 1.0), temperature_pos=1.0, temperature_neg=2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    slopes = (gradient / log_ratios.detach().exp()).abs()
    assert float(slopes[0]) == pytest.approx(1.0)
    assert slopes[2] < slopes[1] < slopes[0]
    assert slopes[3] < slopes[0]


def test_the_log_weight_of_a_sequence_by_hand() -> None:
    new, old = f64(-1.0, -2.0, -1.5, -1.0, -30.0, -0.5).requires_grad_(), f64(-1.5, -1.0, -1.0, -1.0, -1.0, -60.0)
    place: dict[str, Any] = {"sequence_index_N": INDEX, "num_sequences": 3}
    found = sequence_log_weight(new, old, **place)
    # 0.5 - 1; -0.5 - 29, cut at log 1e-8; 59.5, cut at 20.
    expected = f64(-0.5, -0.5, *[math.log(1e-8)] * 3, 20.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert not found.requires_grad
    weights = f64(2.0, 1.0, 0.5, 1.0, 1.0, 0.0)
    near = sequence_log_weight(old + 0.1, old, weights, **place)
    # A weight of 0 counts as 1e-8.
    expected = f64(*[0.2 + math.log(2)] * 2, *[0.3 - math.log(2)] * 3, 0.1 + math.log(1e-8))
    torch.testing.assert_close(near, expected, rtol=0, atol=1e-14)


VESPO: dict[str, float] = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}


def test_vespo_by_hand() -> None:
    w, advantages = f64(1.0, 1.0, 2.0, 2.0, 0.5, 0.5), f64(1.0, -1.0, 1.0, -1.0, 0.0, -2.0)
    phi = vespo_weight(w.log(), advantages, **VESPO)
    # w^k e^(lambda (1 - w)); an advantage of 0 is not negative.
    expected = f64(1, 1, 4 * math.exp(-3), 8 * math.exp(-2), 0.25 * math.exp(1.5), 0.125 * math.e)
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-14)
    logprobs = f64(-1.0, -2.0, -0.5, -1.0, -3.0, -0.1)
    losses = vespo(phi, advantages, logprobs)
    torch.testing.assert_close(losses, -expected * advantages * logprobs, rtol=0, atol=1e-14)
    # The largest weight is at w = k / lambda, and extremes have none.
    grid = torch.linspace(0.01, 4, 400, dtype=torch.float64)
    for sign, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        values = vespo_weight(grid.log(), torch.full_like(grid, sign), **VESPO)
        assert float(grid[values.argmax()]) == pytest.approx(peak, abs=0.01)
        ends = vespo_weight(f64(math.log(1e-8), 20.0), f64(sign, sign), **VESPO)
        assert float(ends.max()) < 1e-14


def test_vespo_s_gradient_is_that_of_the_likelihood_times_a_constant_weight() -> None:
    """By finite differences, with the weights of sequences held at their values."""
    new, old, advantages = random_terms()
    options, step = PolicyOptions(), 1e-6
    leaf = new.clone().requires_grad_()
    losses, clipped = POLICY_LOSSES["vespo"].compute(policy_terms("token", leaf, old, advantages), options)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    held = policy_terms("token", new, old, advantages).sequence_log_weight
    for token in range(6):
        ends = []
        for move in (step, -step):
            moved = new + move * torch.eye(6, dtype=torch.float64)[token]
            terms = PolicyTerms(ratios("token", moved, old), advantages, moved, held)
            ends.append(float(POLICY_LOSSES["vespo"].compute(terms, options)[0].sum()))
        # step^2 and 1e-16 / step.
        assert float(gradient[token]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-8)
    # One weight for a sequence of one advantage, and no token loses its gradient.
    shared = policy_terms("token", new, old, f64(1.0, 1.0, -2.0, -2.0, -2.0, 1.0))
    (phi_of,) = POLICY_LOSSES["vespo"].metrics.values()
    phi = phi_of(shared, options)
    assert float(phi[0]) == float(phi[1])
    assert float(phi[2]) == float(phi[3]) == float(phi[4])
    assert (gradient != 0).all()
    assert not clipped.any()


def test_adapted_entropy_coef_by_hand() -> None:
    bounds: dict[str, float] = {"target": 0.2, "minimum": 0.01, "maximum": 0.3, "delta": 0.05}
    moves = [(0.1, 0.1), (0.1, 0.2), (0.1, 0.3), (0.28, 0.1), (0.03, 0.3)]
    found = [adapted_entropy_coef(coef, entropy, **bounds) for coef, entropy in moves]
    assert found == pytest.approx([0.15, 0.15, 0.05, 0.3, 0.01])


def test_delta_is_the_dual_clip() -> None:
    """max(min(r A, clip(r) A), delta A) where A < 0, the plain clip where A > 0 (1912.09729)."""
    log_ratios = torch.linspace(-2, 3, 41, dtype=torch.float64)
    r = log_ratios.exp()
    for advantage in (-2.0, 1.5):
        advantages = torch.full_like(r, advantage)
        plain = torch.minimum(r * advantage, r.clamp(0.8, 1.3) * advantage)
        dual = torch.maximum(plain, torch.full_like(r, 3.0 * advantage)) if advantage < 0 else plain
        losses = clipped_surrogate(log_ratios, advantages, epsilon_low=0.2, epsilon_high=0.3, delta=3.0)[0]
        torch.testing.assert_close(losses, -dual, rtol=0, atol=1e-14)
        assert (losses != -plain).any() == (advantage < 0)


@pytest.mark.parametrize(("level", "epsilon"), [("token", 0.2), ("product", 0.5)])
def test_clip_flags_are_where_the_gradient_is_gone(level: RatioLevel, epsilon: float) -> None:
    log_ratios = random_terms(spread=1.0)[0].requires_grad_()
    advantages = f64(1.0, -1.0, 1.0, -1.0, 1.0, 0.0)
    losses, clipped = clipped_surrogate(log_ratios, advantages, epsilon_low=epsilon, epsilon_high=epsilon)
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert clipped.tolist() == [bool(g == 0 and a != 0) for g, a in zip(gradient, advantages, strict=True)]


def test_kl_k1_and_k2_by_hand() -> None:
    policy, reference = f64(-1.0, -2.0), f64(-1.5, -1.75)
    assert kl_k1(policy, reference).tolist() == [0.5, -0.25]
    assert kl_k2(policy, reference).tolist() == [0.125, 0.03125]


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimates_pass_finite_differences_and_leave_the_reference_alone(name: str) -> None:
    policy, reference = f64(-1.0, -2.0).requires_grad_(), f64(-1.5, -1.75).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, reference), (policy,))
    KL_ESTIMATORS[name](policy, reference).sum().backward()
    assert reference.grad is None
    assert (KL_ESTIMATORS[name](reference, reference) == 0).all()


LOGITS, REFERENCE = f64(0.3, -0.5, 1.1, 0.0), f64(0.5, 0.1, 0.0, -0.7).log_softmax(-1)


def exact_kl() -> tuple[torch.Tensor, torch.Tensor]:
    """KL(pi || ref) of a distribution over four tokens, and its gradient by the logits."""
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    value = (policy.exp() * (policy - REFERENCE)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def mean_gradient(estimate: str, *, times_ratio: bool) -> torch.Tensor:
    """The expectation over the policy's own samples of the estimate's gradient by the logits: an exact sum."""
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    values = KL_ESTIMATORS[estimate](policy, REFERENCE)
    if times_ratio:
        values = values * (policy - policy.detach()).exp()
    (gradient,) = torch.autograd.grad((policy.detach().exp() * values).sum(), logits)
    return gradient


def test_kl_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    policy = LOGITS.log_softmax(-1)
    means = {name: float((policy.exp() * f(policy, REFERENCE)).sum()) for name, f in KL_ESTIMATORS.items()}
    exact = float(exact_kl()[0])
    assert means["k1"] == pytest.approx(exact, abs=1e-15)
    assert means["k3"] == pytest.approx(exact, abs=1e-15)
    assert abs(means["k2"] - exact) > 1e-3
    assert (kl_k3(policy, REFERENCE) >= 0).all()


def test_which_kl_gradients_are_those_of_the_divergence() -> None:
    exact = exact_kl()[1]
    assert float(exact.abs().max()) > 0.05
    torch.testing.assert_close(mean_gradient("k2", times_ratio=False), exact, rtol=0, atol=1e-15)
    for name in ("k1", "k3"):
        torch.testing.assert_close(mean_gradient(name, times_ratio=True), exact, rtol=0, atol=1e-15)
    nothing = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(mean_gradient("k1", times_ratio=False), nothing, rtol=0, atol=1e-15)
    for name, times in (("k3", False), ("k2", True)):
        assert float((mean_gradient(name, times_ratio=times) - exact).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 0.25)),
        (5.4, 0.1 * (1 - 0.1 * 0.25)),
        (60.0, 0.1 * (1 + 0.2 * 0.25)),
        (0.0, 0.1 * (1 - 0.2 * 0.25)),
    ],
)
def test_adapted_beta_by_hand(kl: float, expected: float) -> None:
    assert adapted_beta(0.1, kl, target=6.0, num_completions=25, horizon=100) == pytest.approx(expected, rel=1e-12)


def weights_of(kind: Correction, *, maximum: float | None = None, minimum: float | None = None) -> list[float]:
    """Sequences of two, one and two tokens with weights 3 and 0.5, 2, 0.1 and 0.2."""
    old, index = f64(3.0, 0.5, 2.0, 0.1, 0.2).log(), torch.tensor([0, 0, 1, 2, 2])
    weights = correction_weights(
        old, torch.zeros_like(old), kind=kind, maximum=maximum, minimum=minimum, sequence_index_N=index, num_sequences=3
    )
    return [round(w, 12) for w in weights.tolist()]


def test_correction_weights_by_hand() -> None:
    assert weights_of("token_truncate", maximum=1.8) == [1.8, 0.5, 1.8, 0.1, 0.2]
    assert weights_of("token_mask", maximum=2.5, minimum=0.15) == [0.0, 0.5, 2.0, 0.0, 0.2]
    assert weights_of("sequence_truncate", maximum=1.8) == [1.5, 1.5, 1.8, 0.02, 0.02]
    assert weights_of("sequence_mask", maximum=1.8, minimum=0.1) == [1.5, 1.5, 0.0, 0.0, 0.0]
    assert weights_of("sequence_mask", maximum=1.8) == [1.5, 1.5, 0.0, 0.02, 0.02]
    for kind in ("token_truncate", "token_mask"):
        assert weights_of(kind) == [3.0, 0.5, 2.0, 0.1, 0.2]
    for kind in ("sequence_truncate", "sequence_mask"):
        assert weights_of(kind) == [1.5, 1.5, 2.0, 0.02, 0.02]


def test_off_policy_mask_by_hand() -> None:
    """Means of log(sampled / present): 0.5 for two sequences, 0.1 for the last; only bad ones above 0.4 are masked."""
    new = f64(-1.5, -2.5, -1.0, -3.0, -1.0, -0.6).requires_grad_()
    sampled = f64(-1.0, -2.0, -0.5, -2.0, -1.0, -0.5)
    place: dict[str, Any] = {"sequence_index_N": INDEX, "num_sequences": 3}
    bad, good = f64(-1.0, -1.0, -2.0, -2.0, -2.0, -1.0), f64(-1.0, -1.0, 2.0, 2.0, 2.0, -1.0)
    masked = off_policy_mask(new, sampled, bad, threshold=0.4, **place)
    assert masked.tolist() == [0, 0, 0, 0, 0, 1]
    assert not masked.requires_grad
    assert off_policy_mask(new, sampled, good, threshold=0.4, **place).tolist() == [0, 0, 1, 1, 1, 1]
    assert off_policy_mask(new, sampled, bad, threshold=0.5, **place).tolist() == [1] * 6
    assert off_policy_mask(new, new.detach(), bad, threshold=1e-9, **place).tolist() == [1] * 6
    # A zero advantage is not a bad one.
    assert off_policy_mask(new, sampled, 0 * bad, threshold=0.1, **place).tolist() == [1] * 6


KINDS: tuple[Correction, ...] = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("kind", KINDS)
def test_correction_weights_have_no_gradient(kind: Correction) -> None:
    old, sampler = f64(-1.0, -2.0).requires_grad_(), f64(-1.5, -1.0).requires_grad_()
    place = {"sequence_index_N": torch.tensor([0, 0]), "num_sequences": 1}
    weights = correction_weights(old, sampler, kind=kind, maximum=3.0, minimum=None, **place)  # type: ignore[arg-type]
    assert not weights.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_without_bounds_weighted_samples_have_the_other_s_expectation(kind: Correction) -> None:
    """All sequences of two tokens, the second one's distribution given the first: E_mu[w f] = E_pi[f]."""
    generator = torch.Generator().manual_seed(0)
    pi, mu = (
        [torch.randn(n, 3, dtype=torch.float64, generator=generator).log_softmax(-1) for n in (1, 3)] for _ in range(2)
    )
    sequences = [(a, b) for a in range(3) for b in range(3)]
    old, sampler = (torch.stack([p for a, b in sequences for p in (m[0][0, a], m[1][a, b])]) for m in (pi, mu))
    index = torch.arange(9).repeat_interleave(2)
    weights = correction_weights(
        old, sampler, kind=kind, maximum=None, minimum=None, sequence_index_N=index, num_sequences=9
    ).view(9, 2)
    chances_pi, chances_mu = (x.view(9, 2).sum(-1).exp() for x in (old, sampler))
    if kind.startswith("sequence"):
        values = torch.randn(9, dtype=torch.float64, generator=generator)
        torch.testing.assert_close((chances_mu * weights[:, 1] * values).sum(), (chances_pi * values).sum())
    else:
        # A token's weight is exact for what depends on it alone: here the first token, the second being summed out.
        values = torch.randn(3, dtype=torch.float64, generator=generator)[torch.tensor([a for a, _ in sequences])]
        torch.testing.assert_close((chances_mu * weights[:, 0] * values).sum(), (chances_pi * values).sum())
