"""Decoder layers as calls of C++: the model's own values to the bit, and only where the kernels compute the layer."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tiny
from burnish.kernels.decoding import CPUKernels, cpu_kernels
from burnish.rollout import NativeEngine, Request, SamplingParams
from burnish.rollout.compiled import CompiledForward
from test_compiled import requests, values

BF16 = torch.bfloat16
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
"""Multiples of 32, which the packed products need."""
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {"residual_multiplier": 0.22, "attention_multiplier": 0.2}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "olmo2": ("olmo2", {}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {}),
    "gpt2": ("gpt2", {}),
    "a size that is not packed": ("llama", {"intermediate_size": 80}),
}


@pytest.fixture(autouse=True)
def _needs_amx() -> None:
    kernels = cpu_kernels()
    if kernels is None or not kernels.packs(torch.empty(32, 32, dtype=BF16)):
        pytest.skip("no C++ compiler, or no AMX")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens of the calls of `project`."""
    seen, plain = list[int](), CPUKernels.project

    def project(self: CPUKernels, layer: Any, hidden: torch.Tensor, *rotary: torch.Tensor) -> Any:
        seen.append(hidden.shape[1])
        return plain(self, layer, hidden, *rotary)

    monkeypatch.setattr(CPUKernels, "project", project)
    return seen


def build(form: tuple[str, dict[str, Any]], **changes: Any) -> Any:
    kind, own = form
    sizes = {} if kind == "gpt2" else SIZES
    return tiny.model(kind, dtype=BF16, **{**sizes, **own, **changes})


def engine(model: Any, *, fuses: bool = True) -> NativeEngine:
    made = NativeEngine(model, tiny.tokenizer())
    if not fuses:
        made._fused_layers._agree = {type(module): False for module in model.modules()}
    return made


@pytest.mark.parametrize("form", FORMS)
def test_a_fused_layer_is_the_layer_to_the_bit(form: str, calls: list[int]) -> None:
    model = build(FORMS[form])
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    # Copied prompts, and one that is read once for its group; few rows, which guess, and many.
    for asked in (
        requests(24, samples=1),
        requests(6, samples=12),
        [Request([7, 8] * 70, 2, SamplingParams(4), index=0)],
    ):
        calls.clear()
        found = values(engine(model).generate(asked, seed=1, step=0))
        assert len(calls) > 2 * len(model.model.layers)
        calls.clear()
        assert values(engine(model, fuses=False).generate(asked, seed=1, step=0)) == found
        assert not calls


@pytest.mark.parametrize("form", OTHERS)
def test_other_layers_run_as_they_are(form: str, calls: list[int]) -> None:
    model = build(OTHERS[form])
    made = engine(model)
    found = values(made.generate(requests(), seed=1, step=0))
    assert not any(made._fused_layers._agree.values())
    calls.clear()
    made.generate(requests(), seed=1, step=0)
    assert not calls, "compared once"
    assert values(engine(model, fuses=False).generate(requests(), seed=1, step=0)) == found


def test_adapters_and_fp32_run_as_they_are(calls: list[int]) -> None:
    adapted = peft.get_peft_model(build(FORMS["llama"]), peft.LoraConfig(r=32, target_modules=["q_proj", "down_proj"]))
    engine(adapted).generate(requests(), seed=1, step=0)
    engine(tiny.model("llama", **SIZES)).generate(requests(), seed=1, step=0)
    assert not calls


def test_long_rows_run_as_they_are(calls: list[int]) -> None:
    engine(build(FORMS["llama"])).generate([Request([5] * 129, 1, SamplingParams(3))], seed=1, step=0)
    assert max(calls) < 129


def test_layers_are_compared_once_and_restored(calls: list[int]) -> None:
    model = build(FORMS["llama"])
    made = engine(model)
    asked = [Request([5, 6], 1, SamplingParams(2))]
    made.generate(asked, seed=1, step=0)
    first = len(calls)
    assert not any("forward" in module.__dict__ for module in model.model.layers)
    calls.clear()
    tiny.move(model, 0.05)
    found = values(made.generate(asked, seed=1, step=0))
    assert len(calls) == first - 1, "the layer that was compared"
    assert values(engine(model, fuses=False).generate(asked, seed=1, step=0)) == found, "the weights of now"


@pytest.mark.parametrize(
    ("wanted", "fused", "compiles"), [("unfused", True, False), ("unfused", False, True), (True, True, True)]
)
def test_a_forward_of_fused_layers_is_compiled_only_where_that_is_asked_for(
    wanted: Any, fused: bool, compiles: bool, calls: list[int]
) -> None:
    model = build(FORMS["llama"])
    if not fused:
        model = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules=["q_proj", "down_proj"]))
    made = NativeEngine(model, tiny.tokenizer(), compile_forward=wanted)
    made._compiled = CompiledForward(made._lm, lambda graph, inputs: graph)
    found = values(made.generate(requests(), seed=1, step=0))
    assert bool(made._compiled._graphs) == compiles
    assert bool(calls) == fused
    assert values(engine(model, fuses=False).generate(requests(), seed=1, step=0)) == found


def test_norms_over_all_heads_are_not_taken_for_those_of_a_head(calls: list[int]) -> None:
    model = build(FORMS["llama"])
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            setattr(layer.self_attn, name, LlamaRMSNorm(128).to(BF16))
    engine(model).generate(requests(), seed=1, step=0)
    assert not calls


def test_layers_that_do_not_share_their_input_run_as_they_are(calls: list[int]) -> None:
    model = build(FORMS["llama"])
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    engine(model).generate(requests(), seed=1, step=0)
    assert not calls
