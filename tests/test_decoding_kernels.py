"""The compiled kernels of decoding on a CPU, against float64; and what happens without a compiler."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.kernels import decoding, elementwise
from burnish.kernels.decoding import CPUKernels
from burnish.rollout import NativeEngine, packed_linears
from test_compiled import requests, values
from test_native import build, tokenizer

__all__ = ["tokenizer"]

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """Forget what was compiled, since some tests hide the compiler."""
    yield
    decoding.cpu_kernels.cache_clear()


@pytest.fixture
def kernels() -> CPUKernels:
    found = decoding.cpu_kernels()
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture
def product(kernels: CPUKernels) -> CPUKernels:
    if not kernels.packs(torch.empty(32, 32, dtype=BF16)):
        pytest.skip("no AMX")
    return kernels


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("N", "K"), [(32, 32), (64, 96), (960, 576), (96, 1536)])
def test_products_are_sums_in_fp32(N: int, K: int, bias: bool, product: CPUKernels) -> None:
    weight, added = normal(N, K, seed=1), normal(N, seed=2) if bias else None
    packed = product.pack(weight)
    assert packed.flatten().sort().values.equal(weight.flatten().sort().values), "a permutation"
    whole = normal(2, 50, K)
    expected = whole.double() @ weight.double().T + (0 if added is None else added.double())
    size = whole.double().abs() @ weight.double().abs().T
    result = product.product(whole, packed, added)
    assert result.shape == (2, 50, N)
    assert ((result.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()
    # However many rows there are, a row's product is the same, to the bit.
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 48, 49):
        assert product.product(whole[0, :rows], packed, added).equal(result[0, :rows])


def test_products_take_views_and_refuse_other_weights(product: CPUKernels) -> None:
    weight = normal(64, 32)
    packed = product.pack(weight.T.contiguous().T)
    hidden = normal(7, 64)[:, 16:48]
    assert product.product(hidden, packed, None).equal(product.product(hidden.contiguous(), packed, None))
    assert not product.packs(normal(48, 32))
    assert not product.packs(normal(32, 48))
    assert not product.packs(normal(32, 32, dtype=torch.float32))


def attended(query: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Return outputs and log normalisers in float64; token t attends to `lengths[t]` of its row's keys."""
    kv_heads, width = keys.shape[2], query.shape[2] // len(keys)
    outputs: list[Tensor] = []
    norms: list[Tensor] = []
    for token, length in enumerate(lengths):
        of = query[0, :, token].double().view(kv_heads, -1, query.shape[3])
        key, value = (cache[token // width, :length].double() for cache in (keys, values))
        scores = torch.einsum("hrd,lhd->hrl", of, key) * scale
        outputs.append(torch.einsum("hrl,lhd->hrd", scores.softmax(-1), value))
        norms.append(scores.logsumexp(-1))
    return torch.stack(outputs), torch.stack(norms)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    ("kv_heads", "repeats", "size", "value_size"), [(3, 3, 64, 64), (1, 1, 8, 8), (2, 4, 128, 128), (4, 1, 24, 16)]
)
def test_attention_is_softmax_over_a_rows_own_tokens(
    kv_heads: int, repeats: int, size: int, value_size: int, width: int, dtype: torch.dtype, kernels: CPUKernels
) -> None:
    kept, room = [0, 1, 6, 37], 48  # tokens in the cache before
    tokens = len(kept) * width
    # Heads after tokens, as projections give them, and not dense.
    query = 3 * normal(1, tokens, kv_heads * repeats, size + 8, dtype=dtype)[..., :size].transpose(1, 2)
    key = normal(1, tokens, kv_heads, size, seed=1, dtype=dtype).transpose(1, 2)
    value = normal(1, tokens, kv_heads, value_size, seed=2, dtype=dtype).transpose(1, 2)
    slots = len(kept) + 1
    keys = normal(slots, room, kv_heads, size, seed=3, dtype=dtype)
    cached = normal(slots, room, kv_heads, value_size, seed=4, dtype=dtype)
    places = [(row, kept[row] + i) for row in range(len(kept)) for i in range(width)]
    expected_keys, expected_values = keys.clone(), cached.clone()
    for token, (row, place) in enumerate(places):
        expected_keys[row, place], expected_values[row, place] = key[0, :, token], value[0, :, token]
    index = torch.tensor([row * room + place for row, place in places])
    out, norm = kernels.attend(query, key, value, keys, cached, index, width=width, scale=0.3)
    assert keys.equal(expected_keys)
    assert cached.equal(expected_values)
    lengths = [place + 1 for _, place in places]
    expected, expected_norm = attended(query, keys[: len(kept)], cached[: len(kept)], lengths, 0.3)
    precision = 2**-8 if dtype == BF16 else 1e-6
    torch.testing.assert_close(out.double(), expected, rtol=2 * precision, atol=2 * precision)
    torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_attention_of_flat_and_of_steep_scores(scale: float, kernels: CPUKernels) -> None:
    keys, cached = normal(1, 256, 1, 64, dtype=torch.float32), normal(1, 256, 1, 64, seed=1, dtype=torch.float32)
    query = normal(1, 1, 1, 64, seed=2, dtype=torch.float32)
    key, value = keys[:, 255:].transpose(1, 2).clone(), cached[:, 255:].transpose(1, 2).clone()
    out, norm = kernels.attend(query, key, value, keys, cached, torch.tensor([255]), width=1, scale=scale)
    expected, expected_norm = attended(query, keys, cached, [256], scale)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.double(), expected_norm, rtol=1e-5, atol=1e-5)


def test_attention_to_a_number_that_is_none_is_none(kernels: CPUKernels) -> None:
    keys, cached = torch.zeros(1, 16, 1, 64), torch.zeros(1, 16, 1, 64)
    query = torch.full((1, 1, 1, 64), torch.nan)
    new = torch.ones(1, 1, 1, 64)
    out, norm = kernels.attend(query, new, new, keys, cached, torch.tensor([3]), width=1, scale=1.0)
    assert out.isnan().all()
    assert norm.isnan().all()


def test_other_types_are_left_to_torch(kernels: CPUKernels) -> None:
    """The library reads bytes: fp32 taken for bf16 would be noise, without an error."""
    half, full = normal(1, 1, 1, 64), normal(1, 1, 1, 64, dtype=torch.float32)
    assert kernels.attends(half, half, half)
    assert kernels.attends(full, full, full)
    assert not kernels.attends(half, full, full)
    assert not kernels.attends(full.double(), full.double(), full.double())


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "mistral"])
def test_the_engine_samples_alike_with_torchs_kernels(
    name: str, dtype: torch.dtype, tokenizer: Any, kernels: CPUKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    del kernels
    model = build(name).to(dtype)
    engine = NativeEngine(model, tokenizer)
    found = values(engine.generate(requests(), seed=1, step=0))
    for module in (packed_linears, sys.modules["burnish.rollout.cache"]):
        monkeypatch.setattr(module, "cpu_kernels", lambda: None)
    monkeypatch.setattr(elementwise, "_library", lambda: None)
    plain = values(engine.generate(requests(), seed=1, step=0))
    # In bf16 a rounding may lead to another token; what stands before it is judged.
    for (tokens, logprobs), (plain_tokens, plain_logprobs) in zip(found, plain, strict=True):
        assert logprobs is not None
        assert plain_logprobs is not None
        same = next((i for i, (a, b) in enumerate(zip(tokens, plain_tokens, strict=False)) if a != b), len(tokens))
        assert dtype == BF16 or same == len(tokens) == len(plain_tokens)
        tolerance = 0.15 if dtype == BF16 else 1e-4
        assert logprobs[:same] == pytest.approx(plain_logprobs[:same], abs=tolerance)


def spied(calls: list[str], name: str) -> Any:
    plain = getattr(CPUKernels, name)

    def spy(*args: Any, **more: Any) -> Any:
        calls.append(name)
        return plain(*args, **more)

    return spy


def test_an_engine_uses_them(tokenizer: Any, kernels: CPUKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("attend", "product"):
        monkeypatch.setattr(CPUKernels, name, spied(calls, name))
    called = elementwise._call
    monkeypatch.setattr(
        elementwise, "_call", lambda name, *args, **own: (calls.append(name), called(name, *args, **own))
    )
    NativeEngine(build("llama").to(BF16), tokenizer).generate(requests(), seed=1, step=0)
    assert {"attend", "rms_norm"} <= set(calls)
    assert ("product" in calls) == kernels.packs(torch.empty(32, 32, dtype=BF16))


@pytest.mark.parametrize("compiler", ["/no/compiler", "/bin/false", "/bin/true"])
def test_without_a_compiler_torchs_kernels_run_and_it_is_said(
    compiler: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoding.cpu_kernels.cache_clear()
    with caplog.at_level(logging.WARNING, logger="burnish"):
        assert decoding.cpu_kernels() is None
        assert decoding.cpu_kernels() is None
    (record,) = caplog.records
    assert "g++" in record.getMessage()
    groups = NativeEngine(build("llama").to(BF16), tokenizer).generate(requests(), seed=1, step=0)
    assert len(groups) == 3
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    decoding.cpu_kernels.cache_clear()
    assert decoding.cpu_kernels() is None


def test_processes_that_start_together_share_one_library(tmp_path: Path, kernels: CPUKernels) -> None:
    del kernels
    code = "from burnish.kernels.decoding import cpu_kernels; assert cpu_kernels() is not None"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    (library,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = library.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert library.stat().st_mtime_ns == before
