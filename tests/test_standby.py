"""Outside a rollout the native engine holds nothing: no copy of the weights, no keys and values."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import tiny
from burnish.rollout import NativeEngine
from burnish.rollout.fused_layers import FusedLayers
from burnish.rollout.packed_linears import PackedProduct, packed_linears
from burnish.rollout.stored import Stored
from test_trainers import grpo

BF16 = torch.bfloat16


class Held:
    """What is alive of the engine's copies and caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refs: dict[type, list[weakref.ref[Any]]] = {PackedProduct: [], Stored: []}
        self.sampling = False
        for kind, refs in self.refs.items():
            monkeypatch.setattr(kind, "__init__", self.noting(kind.__init__, refs))
        generate = NativeEngine.generate

        def sampled(engine: NativeEngine, *args: Any, **given: Any) -> Any:
            self.sampling = True
            found = generate(engine, *args, **given)
            self.sampling = False
            return found

        monkeypatch.setattr(NativeEngine, "generate", sampled)

    @staticmethod
    def noting(init: Any, refs: list[weakref.ref[Any]]) -> Any:
        def wrapped(made: Any, *args: Any, **given: Any) -> None:
            init(made, *args, **given)
            refs.append(weakref.ref(made))

        return wrapped

    def alive(self, kind: type) -> int:
        return sum(ref() is not None for ref in self.refs[kind])


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="nothing is packed without bf16 products")
@pytest.mark.parametrize("compiles", [False, True])
def test_copies_and_caches_are_gone_before_scoring_and_the_update(
    compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    seen: dict[tuple[bool, bool], set[tuple[bool, bool]]] = {}
    if compiles:  # the graph itself: inductor takes long
        monkeypatch.setattr("burnish.rollout.compiled._by_inductor", lambda graph, inputs: graph)
    made = grpo(
        tmp_path, tiny.model(dtype=BF16), bf16=True, max_steps=2, num_iterations=2, beta=0.1,
        compile_rollouts=compiles, rollout_cache_dtype="int8",
    )  # fmt: skip

    def look(*_: Any) -> None:
        alive = (held.alive(PackedProduct) > 0, held.alive(Stored) > 0)
        seen.setdefault((held.sampling, torch.is_grad_enabled()), set()).add(alive)

    made.model.model.layers[1].mlp.register_forward_pre_hook(look)
    made.train()
    assert all(held.refs.values())
    # A rollout's first forward, which finds what to pack, is before both; a prefill is with the copies.
    assert (True, True) in seen[True, False]
    # Scoring of the reference and of old log-probabilities; the update. Without waiting for the garbage collector.
    assert seen[False, False] == seen[False, True] == {(False, False)}
    assert not held.alive(PackedProduct)
    assert not held.alive(Stored)
    assert not any("forward" in module.__dict__ for module in made.model.modules() if type(module) is nn.Linear)


class _Pair(nn.Module):
    """A quantised layer, or one on a device, and a plain one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def test_no_copies_on_a_gpu() -> None:
    layer = nn.Linear(64, 64, dtype=BF16)
    weight = FakeTensor(FakeTensorMode(), torch.empty(64, 64, dtype=BF16, device="meta"), torch.device("cuda:0"))
    del layer.weight
    layer.weight = weight  # pyright: ignore[reportAttributeAccessIssue]
    model = _Pair(layer)
    with packed_linears(model, 8, lambda: None) as products:
        assert not products
        with FusedLayers(model).running(products, lambda: None):
            assert "forward" not in layer.__dict__


def test_no_copies_of_quantised_weights() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=BF16, quant_type="nf4")
    weight = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")
    layer.weight = weight.to("cpu")
    model = _Pair(layer)
    with packed_linears(model, 8, lambda: None) as products:
        assert not products
        assert "forward" not in layer.__dict__
