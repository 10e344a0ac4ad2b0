"""Preference losses: hand-computed values, finite differences, limits."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch

from burnish.config import PREFERENCE_LOSS_NAMES
from burnish.objectives.preference import PREFERENCE_LOSSES, Pairs, PreferenceOptions, divergence_score, kto_losses

OPTIONS = PreferenceOptions(beta=0.5, label_smoothing=0.1, simpo_gamma=0.3, alpha=0.4, discopop_tau=0.7)

# One pair: log pi(y_w) = -6, log pi(y_l) = -9, reference -7 and -8, 3 and 4 tokens: rho_w = 1, rho_l = -1, Delta = 2.
PAIR = (-6.0, -9.0, -7.0, -8.0, 3.0, 4.0)


def pairs(*rows: tuple[float, ...]) -> Pairs:
    return Pairs(*(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)))


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


def smoothed(m: float, eps: float = 0.1) -> float:
    return -(1 - eps) * log(s(m)) - eps * log(s(-m))


def odds(mean: float) -> float:
    return exp(mean) / (1 - exp(mean))


MEAN_W, MEAN_L = -6 / 3, -9 / 4
BY_HAND = {
    "sigmoid": smoothed(1.0),
    "sigmoid_norm": smoothed(0.5 * (1 / 3 + 1 / 4)),
    "robust": (-0.9 * log(s(1.0)) + 0.1 * log(s(-1.0))) / 0.8,
    "hinge": 0.0,
    "ipo": (1 / 3 + 1 / 4 - 1.0) ** 2,
    "exo_pair": s(1) * (log(s(1)) - log(0.9)) + s(-1) * (log(s(-1)) - log(0.1)),
    "nca_pair": -log(s(0.5)) - 0.5 * log(s(-0.5)) - 0.5 * log(s(0.5)),
    "bco_pair": -log(s(0.5)) - log(s(0.5)),
    "sppo_hard": (1 - 1) ** 2 + (-1 + 1) ** 2,
    "aot": smoothed(0.5 * (3 - 1)),
    "aot_unpaired": smoothed(0.5 * 2),
    "apo_zero": s(-0.5) + s(-0.5),
    "apo_down": s(0.5) + s(-1.0),
    "discopop": -log(s(1)) * (1 - s(1 / 0.7)) + exp(-1) * s(1 / 0.7),
    "sft": 6.0,
    "cpo": smoothed(0.5 * 3),
    "simpo": smoothed(0.5 * (MEAN_W - MEAN_L) - 0.3),
    "alphapo": smoothed(0.5 * ((1 - exp(-0.4 * MEAN_W)) / 0.4 - (1 - exp(-0.4 * MEAN_L)) / 0.4) - 0.3),
    "orpo": -log(s(log(odds(MEAN_W)) - log(odds(MEAN_L)))),
}


def test_the_schema_names_every_row() -> None:
    assert tuple(PREFERENCE_LOSSES) == tuple(PREFERENCE_LOSS_NAMES)
    assert set(BY_HAND) == set(PREFERENCE_LOSSES)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_value_by_hand(name: str) -> None:
    value = PREFERENCE_LOSSES[name].compute(pairs(PAIR), OPTIONS)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(BY_HAND[name], abs=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradient_by_finite_differences(name: str, divergence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (
        (-6 + torch.randn(5, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)
    )
    refs = [-6 + torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    tokens = [
        torch.tensor([3.0, 4, 5, 2, 6], dtype=torch.float64),
        torch.tensor([4.0, 2, 3, 3, 5], dtype=torch.float64),
    ]
    options = replace(OPTIONS, f_divergence_type=divergence)  # type: ignore[arg-type]

    def total(w: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
        return PREFERENCE_LOSSES[name].compute(Pairs(w, l, *refs, *tokens), options)

    assert torch.autograd.gradcheck(total, (chosen, rejected))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_only_losses_marked_coupled_depend_on_other_pairs(name: str) -> None:
    rows = [PAIR, (-3.0, -2.0, -4.0, -5.0, 2.0, 2.0), (-8.0, -1.0, -1.0, -9.0, 5.0, 3.0)]
    together = PREFERENCE_LOSSES[name].compute(pairs(*rows), OPTIONS)
    alone = torch.cat([PREFERENCE_LOSSES[name].compute(pairs(row), OPTIONS) for row in rows])
    assert torch.allclose(together, alone, rtol=0, atol=1e-12) != PREFERENCE_LOSSES[name].coupled


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if not loss.needs_reference])
def test_reference_free_losses_read_no_reference(name: str) -> None:
    other = (*PAIR[:2], 5.0, 7.0, *PAIR[4:])
    compute = PREFERENCE_LOSSES[name].compute
    assert torch.equal(compute(pairs(PAIR), OPTIONS), compute(pairs(other), OPTIONS))


@pytest.mark.parametrize("name", [name for name, loss in PREFERENCE_LOSSES.items() if loss.needs_reference])
def test_losses_with_a_reference_start_from_log_ratios_of_zero(name: str) -> None:
    """At the reference, moving the policy's log-probabilities along with the reference's changes nothing."""
    compute = PREFERENCE_LOSSES[name].compute
    values = [compute(pairs((x, y, x, y, 3.0, 4.0)), OPTIONS).item() for x, y in ((-6.0, -9.0), (-2.0, -30.0))]
    assert values[0] == pytest.approx(values[1], abs=1e-12)


def test_divergences() -> None:
    rho = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.equal(divergence_score(rho, "reverse_kl", 0.5), rho)
    torch.testing.assert_close(divergence_score(rho, "forward_kl", 0.5), 1 - torch.exp(-rho))
    t = rho.exp()
    torch.testing.assert_close(divergence_score(rho, "js_divergence", 0.5), torch.log(2 * t / (1 + t)))
    torch.testing.assert_close(divergence_score(rho, "alpha_divergence", 0.5), (t**-0.5 - 1) / -0.5)
    assert torch.equal(divergence_score(rho, "alpha_divergence", 1.0), rho)
    near = divergence_score(rho, "alpha_divergence", 1 + 1e-5)
    torch.testing.assert_close(near, rho, rtol=0, atol=1e-4)
    far = torch.tensor([-1e4, 1e4])
    for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        for coef in (0.5, 2.0):
            assert divergence_score(far, kind, coef).isfinite().all()  # type: ignore[arg-type]


def test_alphapo_becomes_simpo() -> None:
    options = replace(OPTIONS, alpha=1e-7)
    losses = [PREFERENCE_LOSSES[name].compute(pairs(PAIR), options).item() for name in ("alphapo", "simpo")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_orpo_is_finite_for_certain_and_impossible_completions() -> None:
    certain = Pairs(*(torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((0.0, -800.0, 0.0, 0.0, 3.0, 4.0))))
    loss = PREFERENCE_LOSSES["orpo"].compute(certain, OPTIONS)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert certain.chosen.grad is not None
    assert certain.chosen.grad.isfinite().all()


def test_kto_by_hand() -> None:
    ratio = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, False])
    losses = kto_losses(ratio, labels, torch.tensor(0.3), beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert losses.tolist() == pytest.approx([2 * (1 - s(0.5 * 0.7)), 3 * (1 - s(0.5 * 2.3))])
    assert torch.autograd.gradcheck(lambda r: kto_losses(r, labels, torch.tensor(0.3), beta=0.5), (ratio,))
