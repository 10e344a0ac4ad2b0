"""A head of which only the hidden states have a gradient: its forward pass computes that gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.model import tiled_head
from burnish.model.tiled_head import HeadSpec, tiled_logprobs
from plain_head import NUM_TOKENS, TINY_TILE, operands, plain, targets


def frozen_gradients(extra: dict[str, Any], tile_bytes: int | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Outputs of a head of which only the hidden states have a gradient, and that gradient."""
    ops, target = {name: value.to(dtype) for name, value in operands(8, requires_grad=False).items()}, targets()
    hidden = ops["hidden"].requires_grad_()
    named = {"bias_V": ops["bias"], "low_rank": (ops["u"], ops["b"])}
    flags = {"with_entropy": True, "entropy_gradient": False, "with_collision": True}
    got = tiled_logprobs(hidden, ops["weight"], target, tile_bytes=tile_bytes, **named, **flags, **extra)
    weights = torch.randn(NUM_TOKENS, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return [*(output for output in got if output is not None), *torch.autograd.grad((weights * got[0]).sum(), hidden)]


@pytest.mark.parametrize("tile_bytes", [1, 200, TINY_TILE, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spec", [HeadSpec(), HeadSpec(1.7, 3.0), HeadSpec(-0.4)])
def test_a_frozen_head_computes_its_gradient_in_the_forward_pass(
    spec: HeadSpec, temperature: float, tile_bytes: int | None
) -> None:
    ops, target = operands(8), targets()
    extra: dict[str, Any] = {"temperature": temperature, "spec": spec}
    low_rank = (ops["u"].detach(), ops["b"].detach())
    logprob, entropy = plain(ops["hidden"], ops["weight"], target, bias=ops["bias"], low_rank=low_rank, **extra)
    weights = torch.randn(NUM_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad((weights * logprob).sum(), ops["hidden"])
    mine, entropy_too, correct, collision, gradient = frozen_gradients(extra, tile_bytes)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(mine, logprob, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy_too, entropy, rtol=0, atol=1e-10)
    flags = {"with_entropy": True, "with_collision": True}
    same = tiled_logprobs(ops["hidden"], ops["weight"], target, bias_V=ops["bias"], low_rank=low_rank, **flags, **extra)
    assert torch.equal(correct, same.correct)
    torch.testing.assert_close(collision, same.log_collision, rtol=0, atol=1e-10)


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[slice, slice]]:
    """Return a list that grows by every tile of logits."""
    tiles: list[tuple[slice, slice]] = []
    original = tiled_head._Tiles.logits

    def logits(self: Any, rows: slice, columns: slice) -> Tensor:
        tiles.append((rows, columns))
        return original(self, rows, columns)

    monkeypatch.setattr(tiled_head._Tiles, "logits", logits)
    return tiles


@pytest.mark.parametrize(
    ("trained", "flags", "repeats"),
    [
        ((), {}, False),
        ((), {"with_entropy": True, "entropy_gradient": False}, False),
        ((), {"with_entropy": True}, True),
        (("weight",), {"with_entropy": True, "entropy_gradient": False}, True),
        (("bias",), {}, True),
        (("u",), {}, True),
    ],
)
def test_tiles_are_computed_once_where_only_the_hidden_states_have_a_gradient(
    trained: tuple[str, ...], flags: dict[str, Any], repeats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = operands(9, requires_grad=False)
    for name in ("hidden", *trained):
        ops[name].requires_grad_()
    low_rank = (ops["u"], ops["b"])
    tiles = count_tiles(monkeypatch)
    got = tiled_logprobs(
        ops["hidden"], ops["weight"], targets(), bias_V=ops["bias"], low_rank=low_rank, tile_bytes=TINY_TILE, **flags
    )
    computed = len(tiles)
    assert computed == len(set(map(str, tiles))) > 4
    got.logprobs.sum().backward()
    assert (len(tiles) > computed) == repeats
    assert got.entropy is None or got.entropy.requires_grad == flags.get("entropy_gradient", True)


def test_a_frozen_head_computes_no_gradient_without_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = operands(9, requires_grad=False)
    hidden = ops["hidden"].requires_grad_()
    monkeypatch.setattr(tiled_head, "_FrozenHeadLogprobs", None)
    with torch.no_grad():
        got = tiled_logprobs(hidden, ops["weight"], targets()).logprobs
    assert not got.requires_grad


@pytest.mark.parametrize("invalid", [-1, 23, 10**6])
def test_an_invalid_target_gives_nan_where_values_are_not_read(invalid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator; the other rows are what they would be without it."""
    monkeypatch.setattr(tiled_head, "has_values", lambda _: False)
    ops, target = operands(9, requires_grad=False), targets()
    target[2] = invalid
    hidden = ops["hidden"].requires_grad_()
    logprobs = tiled_logprobs(hidden, ops["weight"], target, tile_bytes=TINY_TILE).logprobs
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert logprobs.isnan().tolist() == gradient.isnan().all(1).tolist() == [row == 2 for row in range(NUM_TOKENS)]


def test_a_frozen_heads_gradient_of_a_certain_target_is_exact() -> None:
    """1 - p is 3e-5 here, far below a rounding of p to bf16."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    start, target = torch.tensor([[24.0, 3.0]]), torch.tensor([0])
    hidden, exact = start.clone().requires_grad_(), start.double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(exact, weight.double(), target)[0], exact)
    for dtype, bound in ((torch.float32, 5e-3), (torch.bfloat16, 0.01)):
        logprobs = tiled_logprobs(hidden.to(dtype), weight.to(dtype), target).logprobs
        (got,) = torch.autograd.grad(logprobs.sum(), hidden)
        assert (got.double() - expected).norm() < bound * expected.norm()


def test_a_frozen_heads_bfloat16_gradient_is_as_exact_as_the_recomputed_one() -> None:
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(64, 32, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 32, generator=generator).bfloat16()
    target = torch.randint(500, (64,), generator=generator)
    scales = torch.randn(64, generator=generator)
    exact = plain(hidden.double(), weight.double(), target)[0]
    (expected,) = torch.autograd.grad((scales * exact).sum(), hidden)
    errors: list[float] = []
    for trains in (False, True):
        logprobs = tiled_logprobs(hidden, weight.clone().requires_grad_(trains), target, tile_bytes=20_000).logprobs
        (got,) = torch.autograd.grad((scales * logprobs).sum(), hidden)
        errors.append(float((got.double() - expected.double()).norm() / expected.double().norm()))
    assert errors[0] < 0.01
    assert errors[0] < 1.5 * errors[1]
