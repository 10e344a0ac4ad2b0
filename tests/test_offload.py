"""Offloaded activations: the same values and gradients to the bit, with little left on the device."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from burnish import GRPOConfig
from burnish.model import offload
from burnish.model.checkpointing import checkpointing_field, enable_checkpointing
from burnish.model.offload import offloading
from burnish.model.packing import pack
from burnish.model.scoring import causal_lm, prepare_for_scoring, score
from live_bytes import LiveBytes
from test_ppo import critic_weights, ppo
from test_recomputation import assert_same, groups
from test_trainers import assert_same as assert_same_weights
from test_trainers import grpo, weights


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_MIN_BYTES", 1)


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was copied to the host, in order."""
    found: list[Any] = []
    copy_out = offload._Mover.copy_out

    def recorded(self: Any, tensor: torch.Tensor, before: Any) -> Any:
        found.append(copy_out(self, tensor, before))
        return found[-1]

    monkeypatch.setattr(offload._Mover, "copy_out", recorded)
    return found


def prepared(kind: str, dtype: torch.dtype, *, lora: bool = False, checkpointing: bool = False) -> Any:
    model = tiny.model(kind, dtype=dtype).train()
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    prepare_for_scoring(model)
    return model


def run(model: Any, *, copies: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], None]:
    model.zero_grad()
    with offloading(model, copies_on_cpu=copies):
        logprobs = score(model, pack(groups())).logprobs
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_values_and_gradients_are_bit_for_bit_the_same(
    kind: str, dtype: torch.dtype, lora: bool, checkpointing: bool, parked: list[Any]
) -> None:
    model = prepared(kind, dtype, lora=lora, checkpointing=checkpointing)
    moved, kept = run(model, copies=True), run(model, copies=False)
    assert parked
    assert_same(moved, kept)


def test_a_checkpointed_layer_leaves_nothing_on_the_device(parked: list[Any]) -> None:
    model = prepared("llama", torch.float32, checkpointing=True)
    inputs: list[weakref.ref[torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    batch = pack(groups())
    with offloading(model, copies_on_cpu=True):
        logprobs = score(model, batch).logprobs
    assert len(inputs) == model.config.num_hidden_layers <= len(parked)
    assert all(place() is None for place in inputs)
    logprobs.sum().backward()


def test_a_backward_pass_fetches_each_once_and_one_ahead(parked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("llama", torch.float32, checkpointing=True)
    arrivals: list[tuple[int, int]] = []
    begin_back = offload._Mover.begin_back

    def recorded(self: Any, which: Any) -> None:
        begin_back(self, which)
        arrivals.append((parked.index(which), sum(p.coming is not None for p in parked)))

    monkeypatch.setattr(offload._Mover, "begin_back", recorded)
    run(model, copies=True)
    assert sorted(number for number, _ in arrivals) == list(range(len(parked)))
    assert arrivals[0][0] == len(parked) - 1, "the last first"
    assert max(alive for _, alive in arrivals) <= 2


def test_a_retained_graph_is_read_twice(parked: list[Any]) -> None:
    model = prepared("llama", torch.float64, checkpointing=True)
    with offloading(model, copies_on_cpu=True):
        logprobs = score(model, pack(groups())).logprobs
    weight = model.model.layers[0].mlp.down_proj.weight
    first, second = (torch.autograd.grad(logprobs.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_parameters_integers_and_small_tensors_stay(parked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("llama", torch.float32)
    run(model, copies=True)
    places = {p.untyped_storage()._cdata for p in model.parameters()}
    assert parked
    assert not any(p.host.untyped_storage()._cdata in places for p in parked)
    assert all(p.host.is_floating_point() for p in parked)
    sizes = {tuple(p.host.shape) for p in parked}
    assert not sizes & {tuple(p.shape) for p in model.parameters() if p.ndim > 1}
    parked.clear()
    monkeypatch.setattr(offload, "_MIN_BYTES", 2**30)
    run(model, copies=True)
    assert not parked


def test_on_a_cpu_nothing_is_copied_by_itself(parked: list[Any]) -> None:
    run(prepared("llama", torch.float32, checkpointing=True), copies=False)
    assert not parked


def test_a_run_with_offloading_takes_the_same_steps(
    tmp_path: Path, parked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.training import learner

    monkeypatch.setattr(learner, "offloading", lambda model: offloading(model, copies_on_cpu=True))
    trained = []
    for name, wanted in (("kept", False), ("moved", True)):
        made = grpo(
            tmp_path / name, activation_offloading=wanted, max_steps=2, gradient_accumulation_steps=2,
            per_device_train_batch_size=8, token_budget=40, **{checkpointing_field(GRPOConfig): True},
        )  # fmt: skip
        made.train()
        assert bool(parked) is wanted
        trained.append(weights(made))
    assert_same_weights(*trained, tolerance=0.0)


def test_a_critic_offloads_and_tiles_too(tmp_path: Path, parked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.training import critic

    monkeypatch.setattr(critic, "offloading", lambda model: offloading(model, copies_on_cpu=True))
    trained = []
    for name, fields in (("plain", {}), ("saving", {"activation_offloading": True, "mlp_tiles": 3})):
        made = ppo(tmp_path / name, max_steps=2, **fields)
        made.train()
        assert bool(parked) is bool(fields)
        trained.append(critic_weights(made))
    assert_same_weights(*trained, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_streams_copy_without_races(checkpointing: bool) -> None:
    """Many layers and passes, so that copies and kernels overlap."""
    model = tiny.model("llama", dtype=torch.float32, num_hidden_layers=12, hidden_size=512).train().cuda()
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    prepare_for_scoring(model)
    batch = pack(groups() * 8).to("cuda")
    found = []
    for moves in (False, True, True, True):
        model.zero_grad()
        with offloading(model) if moves else torch.enable_grad():
            logprobs = score(model, batch).logprobs
        logprobs.sum().backward()
        found.append((logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, None))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=0, atol=0)
        for name, grad in other[1].items():
            torch.testing.assert_close(grad, found[0][1][name], msg=name)


@pytest.mark.parametrize("dropped", ["before a backward pass", "after one of a part", "after one of all"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("least", [None, 1, 2**40])
def test_a_graph_is_freed_with_its_result(
    least: int | None, checkpointing: bool, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a hook saves for tensors that stay: no garbage collector sees a node that holds itself."""
    monkeypatch.setattr(offload, "_MIN_BYTES", least)
    model = prepared("llama", torch.float32, lora=True, checkpointing=checkpointing)
    batch, inner = pack(groups()), list[torch.Tensor]()
    layer = causal_lm(model).model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: inner.append(output) if not inner else None)

    def step() -> None:
        with nullcontext() if least is None else offloading(model, copies_on_cpu=True):
            result = score(model, batch).logprobs
        if dropped == "after one of a part":
            inner[0].sum().backward()
        elif dropped == "after one of all":
            result.sum().backward()
        inner.clear()

    step()
    model.zero_grad()
    with LiveBytes() as meter:
        step()
        model.zero_grad()
    assert meter.live == 0
