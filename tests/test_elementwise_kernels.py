"""Norms and gates by kernels, against transformers' own modules and float64; and where a model uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import tiny
from burnish.kernels import elementwise
from burnish.kernels.elementwise import fuses, gated_silu, rms_norm
from burnish.model import recomputation
from burnish.model.checkpointing import enable_checkpointing
from burnish.model.fused import is_silu, norm_epsilon
from burnish.model.recomputation import recomputing, save_less
from burnish.rollout.fused_norms import fused_norms

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernel() -> None:
    if not fuses(torch.empty(1, dtype=BF16)):
        pytest.skip("no C++ compiler")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def gradients(function: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [64, 77])
@pytest.mark.parametrize("rows", [1, 5, 600])
def test_a_norm_and_its_gradients(rows: int, size: int) -> None:
    hidden, weight, grad = normal(1, rows, size), normal(size, seed=1), normal(1, rows, size, seed=2)
    hidden[0, 0] *= 1e-3  # where the epsilon matters
    found = gradients(lambda x, w: rms_norm(x, w, 1e-5), [hidden, weight], grad)

    def exact(x: Tensor, w: Tensor) -> Tensor:
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    for mine, whole in zip(found, gradients(exact, [hidden.double(), weight.double()], grad), strict=True):
        assert mine.dtype == BF16
        assert distance(mine, whole) < 4e-3
    module = LlamaRMSNorm(size, 1e-5).to(BF16)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(found[0], module(hidden), rtol=2**-7, atol=0)


def test_a_gate_and_its_gradients() -> None:
    gate, up, grad = 4 * normal(7, 33), normal(7, 33, seed=1), normal(7, 33, seed=2)
    found = gradients(gated_silu, [gate, up], grad)
    plain = [gate.double(), up.double()]
    for mine, whole in zip(found, gradients(lambda g, u: nn.functional.silu(g) * u, plain, grad), strict=True):
        assert distance(mine, whole) < 4e-3
    assert found[0].equal(nn.functional.silu(gate) * up)


def test_no_bit_depends_on_threads() -> None:
    inputs, grad, threads = (
        [normal(1, 700, 96), normal(96, seed=1)],
        normal(1, 700, 96, seed=2),
        torch.get_num_threads(),
    )
    found: list[list[Tensor]] = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(gradients(lambda x, w: rms_norm(x, w, 1e-5), inputs, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_frozen_weight_gets_no_gradient() -> None:
    hidden, weight = normal(3, 64).requires_grad_(), normal(64, seed=1)
    rms_norm(hidden, weight, 1e-5).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_strided_and_nan_inputs() -> None:
    hidden, weight = normal(64, 5).t(), normal(64, seed=1)
    assert rms_norm(hidden, weight, 1e-5).equal(rms_norm(hidden.contiguous(), weight, 1e-5))
    hidden = hidden.contiguous()
    hidden[2, 3] = torch.nan
    spoilt = rms_norm(hidden, weight, 1e-5).isnan().any(-1)
    assert spoilt.tolist() == [False, False, True, False, False]
    assert gated_silu(hidden, hidden).isnan().sum() == 1


def test_modules_are_told_by_what_they_compute() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 1

    class NeedsMoreRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * self.missing  # pyright: ignore

    assert norm_epsilon(LlamaRMSNorm(64, 1e-4)) == 1e-4
    assert norm_epsilon(Olmo2RMSNorm(64, 1e-4)) == 1e-4
    for other in (Gemma2RMSNorm(64), OddRMSNorm(64), NeedsMoreRMSNorm(64), nn.LayerNorm(64), nn.Linear(64, 64)):
        assert norm_epsilon(other) is None
    assert is_silu(nn.SiLU())
    assert not is_silu(nn.GELU())
    assert not is_silu(nn.Softplus())


@pytest.mark.parametrize(("norm", "fused"), [(LlamaRMSNorm, True), (Olmo2RMSNorm, True), (Gemma2RMSNorm, False)])
def test_norms_are_fused_where_they_agree(norm: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: Any = norm(96, eps=1e-3).to(BF16)
    assert (norm_epsilon(inner) is not None) == fused
    calls: list[str] = []
    original = elementwise._call
    monkeypatch.setattr(
        elementwise, "_call", lambda name, *args, **own: (calls.append(name), original(name, *args, **own))
    )
    with torch.no_grad():
        inner.weight.copy_(normal(96, seed=3))
        hidden = normal(2, 50, 96)
        hidden[0, 0] *= 1e-3
        plain = inner(hidden)
        with fused_norms(nn.Sequential(inner)):
            assert inner(hidden[1, 3]).equal(inner(hidden)[1, 3]), "a row alone"
        assert "forward" not in inner.__dict__
        assert calls == ["rms_norm"] * 2 * fused
        calls.clear()
        save_less(nn.Sequential(inner))
        found = inner(hidden)
        assert calls == ["rms_norm"] * fused
    torch.testing.assert_close(found, plain, rtol=2**-7, atol=0)
    # A product of two numbers of bf16 is half-way between two others once in a hundred times.
    assert norm is Olmo2RMSNorm or (found != plain).float().mean() < 1e-3


def test_other_types_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads bytes: fp32 taken for bf16 would be noise, without an error."""
    inner: Any = LlamaRMSNorm(96).to(BF16)
    hidden = torch.randn(3, 96)
    plain = inner(hidden)
    save_less(nn.Sequential(inner))
    assert inner(hidden).equal(plain)

    def compiled() -> None:
        raise AssertionError("compiled")

    # Nothing is compiled for a model that has no use for it.
    monkeypatch.setattr(elementwise, "_library", compiled)
    full: Any = LlamaRMSNorm(96)
    save_less(nn.Sequential(full))
    full(hidden)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_model_computes_the_same_with_them(name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, exact = tiny.model(name, dtype=BF16).train(), tiny.model(name, dtype=torch.float64).train()
    exact.load_state_dict(model.state_dict())
    save_less(model)
    calls: list[str] = []

    def spied(kernel: str, *args: Any, **fields: Any) -> None:
        calls.append(kernel)
        original(kernel, *args, **fields)

    original = elementwise._call
    monkeypatch.setattr(elementwise, "_call", spied)
    if checkpointed:
        enable_checkpointing(model)

    def gradients_of(one: Any, tokens: Tensor) -> dict[str, Tensor]:
        one.zero_grad()
        with recomputing(one):
            loss = one(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return {path: p.grad.double() for path, p in one.named_parameters()}

    errors = dict.fromkeys((True, False), 0.0)
    for seed in range(4):  # the error of one row is chance
        tokens = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(seed))
        whole = gradients_of(exact, tokens)
        for kernels in errors:
            with monkeypatch.context() as patched:
                if not kernels:
                    patched.setattr(recomputation, "fuses", lambda *tensors: False)
                found = gradients_of(model, tokens)
            errors[kernels] += sum(float((found[path] - grad).square().sum()) for path, grad in whole.items())
    assert ("rms_norm_backward" in calls) == (name != "gemma2")
    assert ("gated_silu_backward" in calls) == (name != "gemma2")
    assert errors[True] < 1.1 * errors[False]
