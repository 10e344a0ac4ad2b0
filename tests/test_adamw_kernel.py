"""AdamW of fp32 masters in one pass, against float64 and torch's own; and where it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.kernels import adamw
from burnish.model import masters
from burnish.model.masters import MasterWeights

SHAPES = [(300, 257), (5,), (1, 1)]
OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect whether each step of a parameter was the kernel's."""
    if adamw._library() is None:
        pytest.skip("no C++ compiler")
    steps: list[bool] = []

    def spied(*tensors: torch.Tensor, **options: Any) -> bool:
        steps.append(adamw.step_adamw(*tensors, **options))
        return steps[-1]

    monkeypatch.setattr(masters, "step_adamw", spied)
    return steps


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def owned(lows: list[torch.nn.Parameter], make: Callable[..., Any] = torch.optim.AdamW, **options: Any) -> Any:
    return MasterWeights([{"params": lows}], lambda own: make(own, **{"fused": True} | OPTIONS | options))


def step(own: MasterWeights, lows: list[torch.nn.Parameter], number: int, passes: int = 1) -> None:
    draw = torch.Generator().manual_seed(number)
    for low in lows:
        for _ in range(passes):
            low.backward(torch.randn(low.shape, generator=draw).to(low.dtype))
    own.clip_gradients(1.0)
    own.step()


@pytest.mark.parametrize("passes", [1, 2])  # gradients in bf16, or accumulated in fp32
def test_steps_are_those_of_float64(passes: int, taken: list[bool]) -> None:
    lows = parameters()
    own = owned(lows)
    exact = [torch.nn.Parameter(value.double()) for value in own.masters]
    reference = torch.optim.AdamW(exact, **OPTIONS)
    for number in range(8):
        draw = torch.Generator().manual_seed(number)
        for parameter in exact:
            parts = [torch.randn(parameter.shape, generator=draw).bfloat16() for _ in range(passes)]
            parameter.grad = torch.stack([part.double() for part in parts]).sum(0)
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        step(own, lows, number, passes)
        reference.step()
    assert taken == [False] * 3 + [True] * 21, "torch makes the moments in the first step"
    for low, value, parameter in zip(lows, own.masters, exact, strict=True):
        torch.testing.assert_close(value.double(), parameter.detach(), rtol=2e-6, atol=2e-7)
        assert torch.equal(value.bfloat16(), low.detach()), "weights are their masters, rounded"
    for handle, parameter in zip(own.param_groups[0]["params"], exact, strict=True):
        mine, theirs = own.inner.state[handle], reference.state[parameter]
        assert float(mine["step"]) == float(theirs["step"]) == 8
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine[name].double(), theirs[name], rtol=1e-5, atol=1e-7)


def test_a_step_does_not_depend_on_the_number_of_threads() -> None:
    ends: list[list[torch.Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            lows = parameters()
            own = owned(lows)
            for number in range(4):
                step(own, lows, number)
            ends.append(own.masters)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in ends[1:] for a, b in zip(ends[0], other, strict=True))


def test_a_resumed_run_takes_the_same_steps(taken: list[bool]) -> None:
    lows = parameters()
    own = owned(lows)
    for number in range(3):
        step(own, lows, number)
    again = [torch.nn.Parameter(low.detach().clone()) for low in lows]
    other = owned(again)
    other.load_state_dict(copy.deepcopy(own.state_dict()))
    taken.clear()
    step(own, lows, 3)
    step(other, again, 3)
    assert taken == [True] * 6
    assert all(torch.equal(a, b) for a, b in zip(own.masters, other.masters, strict=True))


def test_what_is_not_finite_stays_so() -> None:
    lows = parameters()
    own = owned(lows)
    step(own, lows, 0)
    broken = torch.zeros(SHAPES[1])
    broken[0], broken[1] = torch.nan, torch.inf
    lows[1].backward(broken.bfloat16())
    own.step()
    assert own.masters[1].isnan().tolist() == [True, True, False, False, False]
    assert lows[1].isnan().tolist() == [True, True, False, False, False]


def test_no_nan_turns_into_a_number() -> None:
    """Rounding its bits up would make a zero of this one."""
    weight, rest = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int16)
    gradient = torch.tensor([0x7FFFFFFF, -1, 0], dtype=torch.int32).view(torch.float32)
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    group = OPTIONS | {"fused": True}
    assert adamw.step_adamw(weight, rest, gradient, state=state, group=group, scale=torch.ones(()))
    assert weight.isnan().tolist() == [True, True, False]


class Foreign(torch.optim.AdamW):
    """A rule of its own, for all that is known."""


@pytest.mark.parametrize(
    ("make", "options", "dtype"),
    [
        (torch.optim.AdamW, {"fused": False}, torch.bfloat16),
        (torch.optim.AdamW, {"amsgrad": True}, torch.bfloat16),
        (torch.optim.AdamW, {"maximize": True}, torch.bfloat16),
        (torch.optim.Adam, {}, torch.bfloat16),
        (Foreign, {}, torch.bfloat16),
        (torch.optim.AdamW, {}, torch.float16),
        (torch.optim.AdamW, {}, torch.float32),
    ],
)
def test_other_optimizers_and_dtypes_are_left_to_torch(
    make: Any, options: dict[str, Any], dtype: torch.dtype, taken: list[bool]
) -> None:
    lows = parameters(dtype)
    own = owned(lows, make, **options)
    exact = [torch.nn.Parameter(value.clone()) for value in own.masters]
    reference = make(exact, **{"fused": True} | OPTIONS | options)
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        for parameter in exact:
            parameter.grad = torch.randn(parameter.shape, generator=draw).to(dtype).float()
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        step(own, lows, number)
        reference.step()
    assert not any(taken)
    for value, parameter in zip(own.masters, exact, strict=True):
        torch.testing.assert_close(value, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_memory_that_is_not_dense_is_left_to_torch(taken: list[bool]) -> None:
    low = torch.nn.Parameter(torch.randn(6, 8).bfloat16().t())
    own = owned([low])
    for number in range(3):
        step(own, [low], number)
    assert not any(taken)
