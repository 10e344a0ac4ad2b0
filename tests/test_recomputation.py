"""Keeping less must not change a bit of the result."""

from __future__ import annotations

import copy
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tiny
from burnish.errors import ConfigError
from burnish.model import recomputation, scoring
from burnish.model.offload import offloading
from burnish.model.packing import pack
from burnish.model.recomputation import recomputing, save_less, tile_mlps
from burnish.model.scoring import prepare_for_scoring, score
from burnish.types import Completion, Group
from live_bytes import LiveBytes


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(1, 96, (length,), generator=generator).tolist()

    return [Group(ids(30), [Completion(ids(n)) for n in (20, 33, 9)]) for _ in range(3)]


def run(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Log-probabilities, gradients, and the bytes that the forward pass kept for the backward pass."""
    model.zero_grad()
    with LiveBytes() as counted:
        logprobs = score(model, pack(groups())).logprobs
        kept = counted.live
        logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, kept


def keeping_all(monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    with monkeypatch.context() as patched:
        patched.setattr(scoring, "recomputing", lambda model: nullcontext())
        return run(model)


def assert_same(one: tuple[Any, dict[str, torch.Tensor], Any], other: tuple[Any, dict[str, torch.Tensor], Any]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "mixtral"])
def test_values_and_gradients_are_bit_for_bit_the_same(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(kind, dtype=dtype).train()
    prepare_for_scoring(model)
    less, all_of_it = run(model), keeping_all(monkeypatch, model)
    assert_same(less, all_of_it)
    assert less[2] < all_of_it[2]


def test_a_llama_in_bf16_keeps_less_than_half_as_much_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", dtype=torch.bfloat16, num_hidden_layers=8).train()
    prepare_for_scoring(model)
    less = run(model)[2]
    monkeypatch.setattr(recomputation, "fuses", lambda *tensors: False)  # kernels keep less by themselves
    assert less < 0.5 * keeping_all(monkeypatch, model)[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # norms and gates by kernels, and by checkpoints
def test_the_backward_pass_frees_a_layer_before_the_next(dtype: torch.dtype) -> None:
    model = tiny.model("llama", dtype=dtype, num_hidden_layers=4).train()
    prepare_for_scoring(model)
    kept: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def keep(module: Any, inputs: Any, out: torch.Tensor) -> None:
        kept.append(weakref.ref(out.untyped_storage()))

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(keep)
        layer.input_layernorm.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(gate() is not None for gate in kept))
        )
    logprobs = score(model, pack(groups())).logprobs
    assert sum(gate() is not None for gate in kept) == 4
    logprobs.sum().backward()
    assert alive == [3, 2, 1, 0]


@pytest.mark.parametrize("tiles", [2, 7, 1000])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_tiled_mlps_compute_the_same_values_and_gradients(
    kind: str, lora: bool, checkpointing: bool, tiles: int
) -> None:
    """Also with more tiles than tokens. Sums over tokens are cut at the tiles, so the last places differ."""
    model: Any = tiny.model(kind, dtype=torch.float64).train()
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
        model.enable_input_require_grads()
    prepare_for_scoring(model)
    whole = run(model)
    tile_mlps(model, tiles)
    with offloading(model, copies_on_cpu=True):
        tiled = run(model)
    torch.testing.assert_close(tiled[0], whole[0], rtol=1e-12, atol=1e-12)
    assert tiled[1].keys() == whole[1].keys()
    for name, grad in tiled[1].items():
        torch.testing.assert_close(grad, whole[1][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiled_mlps_recompute_the_dropout_of_their_forward(checkpointing: bool) -> None:
    """The gradient is the slope of the loss whose noise a seed repeats, by finite differences."""
    model: Any = tiny.model("stablelm", dtype=torch.float64, attention_dropout=0.0).train()
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(model, lora)
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
    prepare_for_scoring(model)
    tile_mlps(model, 3)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return score(model, pack(groups())).logprobs.sum()

    loss().backward()
    for name, weight in model.named_parameters():
        if "layers.0.mlp" in name and weight.grad is not None:
            direction, values = weight.grad / weight.grad.norm(), []
            for size in (1e-5, -2e-5):
                weight.data += size * direction
                values.append(loss().item())
            weight.data += 1e-5 * direction
            # The error of the quotient is of the order of the step's square.
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(weight.grad.norm()), rel=1e-5), name


def test_tiled_mlps_hold_less(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", dtype=torch.float32, intermediate_size=1024).train()
    model.gradient_checkpointing_enable({"use_reentrant": False}) if not hasattr(
        model, "activation_checkpointing_enable"
    ) else model.activation_checkpointing_enable({"use_reentrant": False})
    prepare_for_scoring(model)

    def peak() -> int:
        with LiveBytes() as counted:
            score(model, pack(groups())).logprobs.sum().backward()
        model.zero_grad()
        return counted.peak

    whole = peak()
    tile_mlps(model, 8)
    assert peak() < 0.4 * whole


def test_a_model_without_gated_mlps_cannot_be_tiled(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    prepare_for_scoring(model)
    with pytest.raises(ConfigError, match="mlp_tiles = 2: GPT2LMHeadModel has no MLP of gate_proj"):
        tile_mlps(model, 2)


@pytest.mark.parametrize("modules", [["q_proj", "down_proj"], ["gate_proj", "up_proj"]])
def test_adapters(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model("llama").train(), LoraConfig(target_modules=modules, init_lora_weights=False))
    prepare_for_scoring(model)
    assert_same(run(model), keeping_all(monkeypatch, model))


def test_adapters_on_4bit_weights_keep_less_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model

    from burnish.model.loading import load_model

    tiny.model(hidden_size=64, head_dim=16, intermediate_size=192).save_pretrained(tmp_path)
    base, _ = load_model(tmp_path, bf16=False, init_kwargs={"quantization_config": "nf4"})
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    prepare_for_scoring(model)
    assert "forward" in vars(base.model.layers[0].mlp)
    less, all_of_it = run(model), keeping_all(monkeypatch, model)
    assert_same(less, all_of_it)
    assert less[2] < 0.8 * all_of_it[2]


def test_a_backward_pass_twice_over_one_graph() -> None:
    model = tiny.model("llama").train()
    prepare_for_scoring(model)
    loss = score(model, pack(groups())).logprobs.sum()
    weights = [p for n, p in model.named_parameters() if "proj" in n]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, weights), strict=True))


def test_a_copy_computes_with_its_own_weights() -> None:
    model = tiny.model("llama").train()
    prepare_for_scoring(model)
    before = run(model)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if "forward" in vars(module) and module is not model:
                for parameter in module.parameters():
                    parameter.mul_(2)
    assert torch.equal(run(other)[0], before)
    assert not torch.equal(run(model)[0], before)


def test_a_tensor_changed_in_place_is_kept() -> None:
    norm = torch.nn.RMSNorm(8)
    model = torch.nn.Sequential(norm, torch.nn.Linear(8, 4))
    save_less(model)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with recomputing(model):
        out = model[1](model[0](x).add_(1.0))
    (grad,) = torch.autograd.grad(out.sum(), model[1].weight)
    expected = (torch.nn.functional.rms_norm(x, (8,), norm.weight) + 1.0).sum(0).expand(4, 8)
    assert torch.allclose(grad, expected, atol=1e-6)  # sums of five fp32 numbers


def test_outside_and_without_gradients_nothing_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("recomputed")

    model = tiny.model("llama").train()
    prepare_for_scoring(model)
    monkeypatch.setattr(recomputation, "_recomputed", refuse)
    model(torch.arange(1, 9)[None]).logits.sum().backward()
    with torch.no_grad():
        score(model, pack(groups()))
    with pytest.raises(AssertionError, match="recomputed"):
        score(model, pack(groups()))


def test_a_module_that_only_looks_gated_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama").train()
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
    prepare_for_scoring(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    assert "forward" in vars(model.model.norm)
