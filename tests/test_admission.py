"""Prompts with long completions are admitted first, by the lengths of earlier passes; waves keep a bound."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import test_native
import tiny
from burnish import GRPOConfig, GRPOTrainer
from burnish.errors import ConfigError
from burnish.rollout import Request, SamplingParams
from burnish.rollout.native import NativeEngine
from burnish.types import Completion
from test_native import build, prompts
from test_trainers import PROMPTS, digits, grpo, settings, weights

tokenizer = test_native.tokenizer


def run(tokenizer: Any, lengths: Sequence[int], expected: Sequence[float | None]) -> tuple[int, list[list[int]]]:
    """Sample one completion a prompt, of a given length each, in two rows; return the forwards and the tokens."""
    engine = NativeEngine(build("llama"), tokenizer, max_running=2, speculate=False)
    requests = [
        Request(prompt, 1, SamplingParams(length), i, expected_tokens=tokens)
        for i, (prompt, length, tokens) in enumerate(
            zip(prompts(*range(3, 3 + len(lengths))), lengths, expected, strict=True)
        )
    ]
    found = engine.generate(requests, seed=3, step=0)
    return engine.last_stats.forwards, [group[0].token_ids for group in found]


# The first token of a completion comes from its prompt's forward, every other one from a decode forward.
@pytest.mark.parametrize(
    ("lengths", "expected", "forwards", "ordered"),
    [
        # Rows of 4 + 4 + 12 and 4 + 4; then 12 beside 4 + 4 + 4, and the last 4.
        ((5, 5, 5, 5, 13), (5, 5, 5, 5, 13), 20, 16),
        ((5, 5, 5, 13), (5, 5, 5, 13), 16, 12),
        # A guess is enough; without one the order is that of the requests.
        ((5, 5, 5, 5, 13), (None, 3, 3, None, 9), 20, 16),
        ((13, 5, 5, 5, 5), (13, 5, 5, 5, 5), 16, 16),
        ((5, 5, 5, 5, 13), (None,) * 5, 20, 20),
    ],
)
def test_long_completions_start_early(
    tokenizer: Any, lengths: Sequence[int], expected: Sequence[float | None], forwards: int, ordered: int
) -> None:
    given, plain = run(tokenizer, lengths, (None,) * len(lengths))
    sorted_, found = run(tokenizer, lengths, expected)
    assert (given, sorted_) == (forwards, ordered)
    assert [len(tokens) for tokens in found] == list(lengths)
    assert found == plain, "keyed draws, in the order of the requests"


@pytest.mark.parametrize(
    ("expected", "order"),
    [
        # The mean of the known ones, 17 / 3, is what is expected of the others.
        ((None, 3.0, 9.0, None, 5.0), [2, 0, 3, 4, 1]),
        ((4.0, 8.0, 4.0, 8.0, 0.0), [1, 3, 0, 2, 4]),
        ((None,) * 5, [0, 1, 2, 3, 4]),
    ],
)
def test_the_order_of_prompts(tokenizer: Any, expected: Sequence[float | None], order: list[int]) -> None:
    seen: list[int] = []
    requests = [
        Request(
            prompt, 1, SamplingParams(9), is_settled=lambda text, i=i: bool(seen.append(i)), expected_tokens=expected[i]
        )
        for i, prompt in enumerate(prompts(3, 4, 5, 6, 7))
    ]
    NativeEngine(build("llama"), tokenizer, max_running=1).generate(requests, seed=0, step=0)
    assert seen == order


class Listening(NativeEngine):
    """An engine of few rows that remembers what it was asked for and what it made of it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, tiny.tokenizer(), max_running=5)
        self.calls: list[tuple[Sequence[Request], list[list[Completion]]]] = []

    def generate(self, requests: Sequence[Request], **keywords: Any) -> list[list[Completion]]:
        found = super().generate(requests, **keywords)
        self.calls.append((requests, found))
        return found


def made(folder: Path) -> tuple[GRPOTrainer, Listening]:
    model = tiny.model()
    engine = Listening(model)
    args = GRPOConfig(
        **settings(folder, max_steps=5, save_strategy="steps", save_steps=3, learning_rate=1e-3),
        per_device_train_batch_size=12, num_generations=4, max_completion_length=24, temperature=1.5,
    )  # fmt: skip
    rows = PROMPTS[:6]
    return GRPOTrainer(model, digits, args, rows, rows[:2], processing_class=tiny.tokenizer(), engine=engine), engine


def test_a_sampler_tells_the_lengths_of_the_last_pass(tmp_path: Path) -> None:
    trainer, engine = made(tmp_path)
    trainer.train()
    assert len(engine.calls) == 5
    known: dict[tuple[int, ...], int] = {}
    for number, (requests, found) in enumerate(engine.calls):
        assert [request.expected_tokens for request in requests] == [known.get(tuple(r.prompt_ids)) for r in requests]
        assert (number < 2) == (requests[0].expected_tokens is None), "six prompts, three a step"
        for request, group in zip(requests, found, strict=True):
            known[tuple(request.prompt_ids)] = round(fmean(len(completion.token_ids) for completion in group))
    assert len(set(known.values())) > 1
    trainer.evaluate()
    assert {request.expected_tokens for request in engine.calls[-1][0]} == {None}, "other prompts have those numbers"


def test_a_resumed_run_knows_the_lengths(tmp_path: Path) -> None:
    whole, engine = made(tmp_path)
    whole.train()
    state = json.loads((tmp_path / "checkpoint-3/rollout_0.json").read_text())
    assert len(state["lengths"]) == 6
    resumed, again = made(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    asked = [
        [[r.expected_tokens for r in requests] for requests, _ in calls] for calls in (engine.calls[3:], again.calls)
    ]
    assert asked[0] == asked[1]
    assert resumed.stage.sampler.lengths == whole.stage.sampler.lengths
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())


def test_a_run_samples_within_its_memory(tmp_path: Path) -> None:
    bound = 4e-5
    made = grpo(tmp_path, rollout_cache_gib=bound, max_steps=2)
    made.train()
    stats = made.stage.sampler.engine.last_stats
    assert 0 < stats.peak_cache_bytes <= bound * 2**30
    assert stats.peak_rows < 12
    with pytest.raises(ConfigError, match=r"rollout_cache_gib = 1e-06: one completion .* raise it to that at least"):
        grpo(tmp_path, rollout_cache_gib=1e-6)
