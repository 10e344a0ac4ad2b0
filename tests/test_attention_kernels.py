"""The compiled attention of packed rows, against float64; and that nothing leaks, and nothing depends on threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from burnish.kernels import attention
from burnish.kernels.attention import attends_rows
from burnish.model import prefix
from burnish.model.attention import AttentionCall, SlidingWindow
from burnish.model.prefix import PrefixLayout
from burnish.types import GroupSpan

BF16 = torch.bfloat16
ROWS = {
    "group": [(70, [33, 5, 0, 129, 1])],
    "plain": [(0, [300, 17])],
    "groups": [(200, [40] * 4), (1, [2, 31, 32, 33]), (32, [64])],
    "prompt": [(513, [])],
}


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    if not attends_rows(*[torch.empty(1, 1, 1, 32, dtype=BF16)] * 3):
        pytest.skip("no AMX, or no C++ compiler")
    yield
    attention._library.cache_clear()


def spans_of(row: Sequence[tuple[int, Sequence[int]]]) -> tuple[GroupSpan, ...]:
    """Place prompts and completions of these lengths one after the other."""
    spans: list[GroupSpan] = []
    place = 0
    for prompt, completions in row:
        start, place = place, place + prompt
        placed: list[tuple[int, int]] = []
        for length in completions:
            placed.append((place, length))
            place += length
        spans.append(GroupSpan((start, prompt), tuple(placed)))
    return tuple(spans)


def make_call(
    tokens: int, heads: tuple[int, int] = (6, 2), sizes: tuple[int, int] = (64, 64), **fields: Any
) -> AttentionCall:
    """Queries, keys and values with the strides of a projection's output."""
    draw = torch.Generator().manual_seed(1)
    widths = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    query, key, value = (torch.randn(1, tokens, *width, generator=draw).to(BF16).transpose(1, 2) for width in widths)
    return AttentionCall(nn.Module(), 0, query, key, value, sizes[0] ** -0.5, **fields)


def attend(spans: tuple[GroupSpan, ...], call: AttentionCall, dtype: torch.dtype = BF16) -> list[Tensor]:
    """Return the output, and the gradients of query, key and value for a fixed gradient of the output."""
    leaves = [x.to(dtype).requires_grad_() for x in (call.query.detach(), call.key.detach(), call.value.detach())]
    query, key, value = leaves
    out = PrefixLayout(spans).attend(replace(call, query=query, key=key, value=value))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(BF16).to(dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def length_of(spans: Sequence[GroupSpan]) -> int:
    return sum(span.prompt[1] + sum(length for _, length in span.completions) for span in spans)


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize(("heads", "sizes"), [((6, 2), (64, 64)), ((4, 4), (32, 96)), ((8, 1), (128, 64))])
@pytest.mark.parametrize("row", ROWS)
def test_outputs_and_gradients_are_those_of_float64(
    row: str, heads: tuple[int, int], sizes: tuple[int, int], window: int | None
) -> None:
    spans = spans_of(ROWS[row])
    call = make_call(length_of(spans), heads, sizes, rule=None if window is None else SlidingWindow(window))
    found, exact = attend(spans, call), attend(spans, call, torch.float64)
    assert [x.dtype for x in found] == [BF16] * 4
    for mine, whole in zip(found, exact, strict=True):
        # One rounding of a result and of each weight; at a window of one token, gradients of scores are all rounding.
        scale = whole.norm() if whole.norm() > 1e-3 else exact[0].norm()
        assert (mine.double() - whole).norm() < 4e-3 * scale


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kept", [1, 37, 64])
def test_a_prompt_may_have_keys_before_the_row(kept: int, window: int | None) -> None:
    spans = (GroupSpan((-kept, kept + 1), ((1, 33), (34, 129))),)
    call = make_call(kept + 163, rule=None if window is None else SlidingWindow(window))
    call = replace(call, query=call.query[:, :, kept:])
    found, exact = attend(spans, call), attend(spans, call, torch.float64)
    assert [x.shape[2] for x in found[1:]] == [163, 163 + kept, 163 + kept]
    for mine, whole in zip(found, exact, strict=True):
        assert (mine.double() - whole).norm() < 4e-3 * whole.norm()


def test_it_is_what_packed_rows_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def spied(query: Tensor, *args: Any, **fields: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return attention.attend_rows(query, *args, **fields)

    monkeypatch.setattr(prefix, "attend_rows", spied)
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    PrefixLayout(spans).attend(call)
    assert calls == [(1, 6, 238, 64)]
    # What it does not compute is left to torch's operators.
    for other in (
        replace(call, softcap=5.0),
        replace(call, sinks=torch.zeros(6)),
        replace(call, query=call.query.float(), key=call.key.float(), value=call.value.float()),
        make_call(length_of(spans), sizes=(48, 48)),
    ):
        PrefixLayout(spans).attend(other)
    assert len(calls) == 1


def test_no_bit_depends_on_threads() -> None:
    spans, threads = spans_of(ROWS["groups"]), torch.get_num_threads()
    call = make_call(length_of(spans))
    found: list[list[Tensor]] = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(attend(spans, call))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


def test_no_bit_depends_on_other_groups_of_the_row() -> None:
    alone, beside = spans_of(ROWS["group"]), spans_of([*ROWS["group"], (200, [40, 41]), (5, [7])])
    call = make_call(length_of(beside))
    length = length_of(alone)
    first = replace(call, query=call.query[:, :, :length], key=call.key[:, :, :length], value=call.value[:, :, :length])
    out = PrefixLayout(alone).attend(first)
    assert out.equal(PrefixLayout(beside).attend(call)[:, :length])


def test_a_token_sees_its_prompt_and_its_own_past_alone() -> None:
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    before = PrefixLayout(spans).attend(call)
    # The prompt is 0 to 69; completions begin at 70, 103, 108 and 237.
    for changed, seen_by in ((3, range(3, 238)), (75, range(75, 103)), (110, range(110, 237)), (237, range(237, 238))):
        key, value = call.key.clone(), call.value.clone()
        key[:, :, changed] += 3
        value[:, :, changed] += 3
        after = PrefixLayout(spans).attend(replace(call, key=key, value=value))
        assert (after != before).flatten(2).any(-1)[0].nonzero()[:, 0].tolist() == list(seen_by)


def test_large_scores_do_not_overflow() -> None:
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    steep = replace(call, query=call.query * 1000)
    found, exact = attend(spans, steep), attend(spans, steep, torch.float64)
    for mine, whole in zip(found, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - whole).norm() < 0.02 * whole.norm()


def test_fake_tensors_take_its_memory_and_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(x).requires_grad_() for x in (call.query, call.key, call.value)]
        query, key, value = leaves
        out = PrefixLayout(spans).attend(replace(call, query=query, key=key, value=value))
        assert out.shape == (1, 238, 6, 64)
        out.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


def test_tensors_of_any_layout() -> None:
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    odd = replace(
        call,
        query=call.query.contiguous(),
        key=call.key.mT.contiguous().mT,
        value=torch.cat((call.value, call.value), dim=1)[:, 1:3],
    )
    same = replace(odd, value=odd.value.contiguous())
    plain = replace(call, value=odd.value.contiguous())
    assert all(a.equal(b) for a, b in zip(attend(spans, odd), attend(spans, same), strict=True))
    assert all(a.equal(b) for a, b in zip(attend(spans, odd), attend(spans, plain), strict=True))


def test_without_a_compiler_torchs_operators_run(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spans = spans_of(ROWS["group"])
    call = make_call(length_of(spans))
    with_kernel = PrefixLayout(spans).attend(call)
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention._library.cache_clear()
    out = PrefixLayout(spans).attend(call)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["Attention layers use torch's kernels"]
    torch.testing.assert_close(out, with_kernel, atol=0.02, rtol=0.02)
