"""The compiled attention of a prefill row, against float64: what is attended to, and what is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.model.attention import AttentionCall, SlidingWindow
from burnish.model.traced import standing_for
from burnish.rollout import cache
from burnish.rollout.cache import CacheLayout, PromptSpan
from test_attention_kernels import kernel, make_call

__all__ = ["kernel"]

ALONE = [PromptSpan(n, start, length, slice(0, 0)) for n, (start, length) in enumerate([(0, 70), (70, 1), (71, 33)])]
SHARED = [
    PromptSpan(None, 0, 40, slice(0, 0)),
    PromptSpan(0, 40, 7, slice(0, 40)),
    PromptSpan(1, 47, 50, slice(0, 40)),
    PromptSpan(2, 97, 7, slice(0, 0)),
]
NESTED = [
    PromptSpan(None, 0, 40, slice(0, 0)),
    PromptSpan(0, 40, 7, slice(0, 40)),
    PromptSpan(1, 47, 57, slice(0, 47)),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the kernel."""
    made: list[int] = []
    attend_rows = cache.attend_rows

    def counted(*given: Any, **options: Any) -> Tensor:
        made.append(1)
        return attend_rows(*given, **options)

    monkeypatch.setattr(cache, "attend_rows", counted)
    return made


def prefill(call: AttentionCall, spans: list[PromptSpan]) -> tuple[Tensor, CacheLayout]:
    layout = CacheLayout()
    slots = sum(span.slot is not None for span in spans)
    layout.reserve(rows=1, own_tokens=1, prompts=slots, prompt_tokens=104)
    layout.begin_prefill(spans)
    with torch.no_grad():
        return layout.attend(call), layout


def exact(call: AttentionCall, spans: list[PromptSpan], window: int) -> Tensor:
    """[1, T, heads, Dv] by the definition, a prompt with its beginning at a time."""
    outputs: list[Tensor] = []
    repeats = call.query.shape[1] // call.key.shape[1]
    for span in spans:
        part = slice(span.start, span.start + span.length)
        key, value = (
            torch.cat((x[0, :, span.prefix], x[0, :, part]), dim=1).double().repeat_interleave(repeats, 0)
            for x in (call.key, call.value)
        )
        scores = call.scaling * call.query[0, :, part].double() @ key.transpose(1, 2)
        place, own = torch.arange(key.shape[1]), torch.arange(key.shape[1])[-span.length :]
        distance = own[:, None] - place
        scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("spans", "by_kernel"), [(ALONE, True), (SHARED, True), (NESTED, False)])
def test_a_prefill_equals_the_definition(
    spans: list[PromptSpan], by_kernel: bool, window: int | None, calls: list[int]
) -> None:
    call = make_call(104, rule=None if window is None else SlidingWindow(window))
    found, layout = prefill(call, spans)
    assert len(calls) == by_kernel, "a beginning of a beginning is no group, and is attended to without the kernel"
    expected = exact(call, spans, window or 1000)
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() < 4e-3 * expected.norm()
    (stored,) = layout._layers.values()
    for kept, own in ((stored.prompt_key, call.key), (stored.prompt_value, call.value)):
        for span in spans:
            if span.slot is not None:
                whole = torch.cat((own[0, :, span.prefix], own[0, :, span.start : span.start + span.length]), dim=1)
                assert torch.equal(kept.data[span.slot, : whole.shape[1]], whole.transpose(0, 1))


@pytest.mark.parametrize(
    "fields", [{"softcap": 20.0}, {"sinks": torch.zeros(6)}, {"query": "fp32"}], ids=["softcap", "sinks", "fp32"]
)
def test_what_the_kernel_cannot_do_is_left_to_torch(fields: dict[str, Any], calls: list[int]) -> None:
    call = make_call(104)
    if fields.pop("query", None):
        call = replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float())
    call = replace(call, **fields)
    found, _ = prefill(call, SHARED)
    assert not calls
    assert found.isfinite().all()


@pytest.mark.parametrize(("device", "by_kernel"), [("cpu", True), ("cuda", False)])
def test_a_traced_prefill_runs_what_its_device_would(device: str, by_kernel: bool, calls: list[int]) -> None:
    with FakeTensorMode(), standing_for(device):
        found, _ = prefill(make_call(104), SHARED)
    assert len(calls) == by_kernel
    assert found.shape == (1, 104, 6, 64)
