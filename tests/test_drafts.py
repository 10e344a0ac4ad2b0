"""Guesses change how many tokens a forward computes, and never which tokens are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import test_native
from burnish.rollout.cache import CacheLayout
from burnish.rollout.drafts import MOST_GUESSES, DraftSource, DraftWidth
from burnish.rollout.engine import Request, SamplingParams
from burnish.rollout.native import NativeEngine
from burnish.types import StopReason
from test_native import build, prompts

tokenizer = test_native.tokenizer


def test_a_guess_follows_the_last_occurrence_of_the_longest_ending() -> None:
    source = DraftSource([1, 2, 3, 4, 5])
    first, second = source.add_text(), source.add_text()
    assert source.guess(first, 3) == []
    for token in (9, 1, 2):
        source.push(first, token)
    # The pair (1, 2) stands in the prompt, where 3 4 5 follow, and then 9.
    assert source.guess(first, 2) == [3, 4]
    for token in (7, 8):
        source.push(first, token)
    for token in (1, 2):
        source.push(second, token)
    assert source.guess(second, 4) == [7, 8], "the sibling's text is later than the prompt's"
    # Four tokens decide before two: 4 5 1 2 stands nowhere else, 5 9 1 2 only in the first text.
    third = source.add_text()
    for token in (9, 1, 2):
        source.push(third, token)
    assert source.guess(third, 1) == [7]


def test_a_text_is_no_guess_for_itself_beyond_its_end() -> None:
    source = DraftSource([1])
    text = source.add_text()
    for token in (5, 6, 5, 6):
        source.push(text, token)
    assert source.guess(text, 8) == [5, 6]


def test_the_width_by_hand() -> None:
    width = DraftWidth(fixed=40.0)
    # One row at rate 1/2: 1/41, 1.5/42, 1.75/43, 1.875/44, 1.97/46, 1.99/48 tokens per cost.
    assert width.choose(1, 1) == 6
    # 64 rows: 64/104, 96/168, ... tokens per cost.
    assert width.choose(64, 64) == 1
    assert width.choose(4, 0) == 1
    for _ in range(50):
        width.add(accepted=0, guessed=1)
    assert width.choose(1, 1) == 2, "at rate 4/58 a second token of one row costs 1/42 and gives 0.07"
    for _ in range(1000):
        width.add(accepted=7, guessed=7)
    assert width.choose(1, 1) == MOST_GUESSES + 1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("length", [11, 140])
def test_guesses_draw_the_same_tokens(
    name: str,
    length: int,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short prompts are copied into the rows and long ones are not; both with every kind of mask."""
    # Forwards that cost nothing by the token: every guess is computed, the wrong ones too.
    monkeypatch.setattr("burnish.rollout.native._fixed_tokens", lambda model: 1e4)
    model = build(name)
    requests = [
        Request(prompts(length)[0], 3, SamplingParams(60, temperature=0.05), 0),
        Request(prompts(6)[0], 2, SamplingParams(25, temperature=0.0), 1),
    ]
    found: list[Any] = []
    for speculate in (True, False):
        engine = NativeEngine(model, tokenizer, speculate=speculate)
        found.append(engine.generate(requests, seed=0, step=0))
        stats = engine.last_stats
        assert stats.decoded_tokens == sum(len(c.token_ids) for group in found[-1] for c in group)
        assert (stats.accepted_tokens > 0) == speculate
        assert speculate == (stats.accepted_tokens < stats.guessed_tokens)
    for guessed, plain in zip(*found, strict=True):
        for a, b in zip(guessed, plain, strict=True):
            assert a.token_ids == b.token_ids
            # fp32 sums in another order.
            assert a.policy_logprobs == pytest.approx(b.policy_logprobs, abs=2e-5)
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=2e-5)


def test_guesses_stay_in_a_bounded_cache_and_end_with_the_completion(tokenizer: Any) -> None:
    model = build("llama")
    prompt = prompts(9)[0]
    greedy = SamplingParams(60, temperature=0.0)
    (plain,) = NativeEngine(model, tokenizer, speculate=False).generate([Request(prompt, 1, greedy)], seed=0, step=0)
    tokens = plain[0].token_ids
    bounded = NativeEngine(model, tokenizer, max_cache_tokens=160)
    (group,) = bounded.generate([Request(prompt, 3, greedy)], seed=0, step=0)
    assert [c.token_ids for c in group] == [tokens] * 3
    assert bounded.last_stats.accepted_tokens > 0
    # Greedy text repeats itself, so a token late in it is guessed: it must end the completion all the same.
    end = tokens[40]
    params = SamplingParams(60, temperature=0.0, eos_token_ids=(end,))
    (ended,) = NativeEngine(model, tokenizer).generate([Request(prompt, 1, params)], seed=0, step=0)
    assert ended[0].token_ids == tokens[: tokens.index(end) + 1]
    assert ended[0].stop_reason is StopReason.EOS


@pytest.mark.parametrize("copies", [False, True])
def test_guesses_beyond_the_limit_stay_in_their_row(copies: bool) -> None:
    """At the limit of 64 tokens a row's cache is full: one place more would be the next row's first."""
    cache = CacheLayout(None, copies_prompts=copies)
    cache.reserve(rows=2, own_tokens=64 + 5 * copies, prompts=1, prompt_tokens=5)
    positions = cache.begin_decode(
        prompt_slots=[0, 0],
        prompt_lengths=[5, 5],
        own_lengths=[63, 10],
        max_own=[64, 64],
        device=torch.device("cpu"),
        width=4,
    )
    assert positions.tolist() == [67, 68, 68, 68, 14, 15, 16, 17]


def test_a_penalty_is_served_without_guesses(tokenizer: Any) -> None:
    params = SamplingParams(30, temperature=0.0, repetition_penalty=1.2)
    engine = NativeEngine(build("llama"), tokenizer)
    engine.generate([Request(prompts(9)[0], 1, params)], seed=0, step=0)
    assert engine.last_stats.guessed_tokens == 0
