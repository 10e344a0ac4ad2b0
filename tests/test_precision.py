"""Master weights: bf16 parameters, fp32 truth."""

from __future__ import annotations

import pytest
import torch

from burnish.errors import CheckFailed
from burnish.model.precision import MasterWeights


def optimizer(parameters: list[torch.nn.Parameter], lr: float = 1e-3, **kwargs: object) -> MasterWeights:
    groups = [{"params": parameters, "weight_decay": 0.1}]
    return MasterWeights(groups, lambda own: torch.optim.AdamW(own, lr=lr), **kwargs)  # type: ignore[arg-type]


def test_steps_smaller_than_a_bf16_gap_are_kept() -> None:
    low = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    own = MasterWeights([{"params": [low]}], lambda p: torch.optim.SGD(p, lr=1e-3))
    start = own.masters[0].detach().clone()
    for _ in range(8):
        low.sum().backward()
        own.step()
    torch.testing.assert_close(own.masters[0].detach(), start - 8e-3, rtol=0, atol=1e-6)
    assert torch.equal(low.detach(), own.masters[0].detach().bfloat16())


def test_weights_saved_in_bf16_move_from_the_first_step() -> None:
    """Masters in the middle of their rounding cells would leave every weight where it is."""
    start = (0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-7, -(2.0**-126), 3e38], dtype=torch.bfloat16)
    low = torch.nn.Parameter(torch.cat([start, special]))
    own = MasterWeights([{"params": [low]}], lambda p: torch.optim.SGD(p, lr=1e-6))
    masters = own.masters[0].detach()
    assert torch.equal(masters.bfloat16(), low.detach()), "the model starts as it was saved"
    assert torch.equal(masters[-7:-5], torch.zeros(2))
    assert (masters[:-7] != low.detach()[:-7].float()).float().mean() > 0.99

    low.sum().backward()
    own.step()
    change = (low.detach()[:-7] - start).double()
    assert (change != 0).float().mean() < 0.1
    assert change.mean().item() == pytest.approx(-1e-6, rel=0.1)


def test_masters_known_exactly_are_kept() -> None:
    exact = torch.linspace(-1, 1, 7)
    low = torch.nn.Parameter(exact.bfloat16())
    assert torch.equal(optimizer([low], masters={low: exact.clone()}).masters[0].detach(), exact)


def test_equals_a_plain_fp32_optimizer_on_the_same_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    low = torch.nn.Parameter(start.bfloat16())
    reference = torch.nn.Parameter(start.clone())
    own = optimizer([low], masters={low: start.clone()})
    plain = torch.optim.AdamW([{"params": [reference], "weight_decay": 0.1}], lr=1e-3)
    for _ in range(5):
        parts = [torch.randn(5, 3, generator=generator).bfloat16() for _ in range(3)]
        for part in parts:
            (low * part).sum().backward()
        assert low.grad is None, "gradients leave the parameter for the fp32 accumulator"
        reference.grad = sum((part.float() for part in parts), torch.zeros(5, 3))
        norm = own.clip_gradients(0.5)
        torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_([reference], 0.5))
        own.step()
        plain.step()
        plain.zero_grad()
    assert torch.equal(own.masters[0].detach(), reference.detach())


def test_resume_continues_from_the_masters() -> None:
    def run(parameter: torch.nn.Parameter, own: MasterWeights, steps: int) -> None:
        for _ in range(steps):
            (parameter * parameter).sum().backward()
            own.step()

    start = torch.linspace(-1, 1, 7)
    whole = torch.nn.Parameter(start.bfloat16())
    uninterrupted = optimizer([whole], masters={whole: start.clone()})
    run(whole, uninterrupted, 6)

    first = torch.nn.Parameter(start.bfloat16())
    before = optimizer([first], masters={first: start.clone()})
    run(first, before, 3)
    second = torch.nn.Parameter(first.detach().clone())
    after = optimizer([second])
    after.load_state_dict(before.state_dict())
    run(second, after, 3)
    assert torch.equal(after.masters[0], uninterrupted.masters[0])
    assert torch.equal(second, whole)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    own = optimizer([parameter])
    state = own.state_dict()
    state["masters"] = []
    with pytest.raises(CheckFailed, match="0 master weights and the model trains 1"):
        own.load_state_dict(state)


def test_learning_rate_schedulers_reach_the_inner_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    own = optimizer([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5**step)
    (parameter * 1.0).sum().backward()
    own.step()
    scheduler.step()
    assert own.inner.param_groups[0]["lr"] == 0.5
