"""The contract of an engine that samples by vLLM, from a server and in this process: the same tests for both.

`make servers` runs them, with the Python of .venv-vllm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tiny
from burnish.errors import CheckFailed, ConfigError
from burnish.model.packing import pack
from burnish.model.scoring import score
from burnish.rollout import Engine, NativeEngine, Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.types import Completion, Group, StopReason
from vllm_sources import VOCAB, ColocatedSource, ServerSource, fresh, lora

pytestmark = pytest.mark.vllm

PARAMS = SamplingParams(12, eos_token_ids=(0,))
REQUESTS = [Request([5 + i, 6, 7], 4, PARAMS, index=i) for i in range(6)]


@pytest.fixture(scope="module", params=[ServerSource, ColocatedSource])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    made = request.param(tmp_path_factory.mktemp("model"))
    yield made
    made.stop()


@pytest.fixture
def engine(source: Any) -> Iterator[Any]:
    opened: list[Engine] = []

    def start(model: Any, faults: set[str] | None = None) -> Engine:
        opened.append(source.engine(model, faults))
        return opened[-1]

    yield start
    for made in opened:
        source.release(made)


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [completion.token_ids for group in groups for completion in group]


def test_greedy_tokens_are_those_of_the_trainer(engine: Any) -> None:
    model = fresh(seed=11)
    made = engine(model)
    made.sync(0)
    params = SamplingParams(40, temperature=0.0, eos_token_ids=(0,))
    requests = [Request([5 + i, 6, 7 + i], 2, params, index=i) for i in range(8)]
    native = NativeEngine(model, tiny.tokenizer()).generate(requests, seed=0, step=0)
    found = made.generate(requests, seed=0, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    for ours, theirs in zip(native, found, strict=True):
        assert theirs[0].token_ids == theirs[1].token_ids
        assert ours[0].stop_reason == theirs[0].stop_reason
        assert ours[0].text == theirs[0].text
        assert ours[0].token_ids == theirs[0].token_ids
        assert theirs[0].policy_logprobs == pytest.approx(ours[0].policy_logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_the_trainers(engine: Any, temperature: float) -> None:
    model = fresh(seed=11)
    made = engine(model)
    made.sync(0)
    params = SamplingParams(30, temperature=temperature, eos_token_ids=(0,))
    requests = [Request(request.prompt_ids, 4, params, index=request.index) for request in REQUESTS]
    found = made.generate(requests, seed=3, step=1)
    check_completions(requests, found, vocab_size=VOCAB)
    groups = [Group(list(r.prompt_ids), completions) for r, completions in zip(requests, found, strict=True)]
    batch = pack(groups)
    with torch.no_grad():
        ours = score(model, batch, temperature=temperature).logprobs
    difference = (batch.token["policy_logprobs"] - ours).abs()
    assert float(difference.max()) < 2e-4
    assert torch.equal(batch.token["policy_logprobs"], batch.token["sampler_logprobs"])


def test_samples_follow_the_distribution_and_their_seeds(engine: Any) -> None:
    """Chi-square of the first token, 1,600 draws in groups of 8; the same seeds give the same samples."""
    model = fresh(seed=11)
    made = engine(model)
    made.sync(0)
    params = SamplingParams(1, temperature=0.7)
    requests = [Request([9, 8, 7], 8, params, index=index) for index in range(200)]
    found = made.generate(requests, seed=5, step=0)
    counts = Counter(ids[0] for ids in tokens(found))
    with torch.no_grad():
        probabilities = (model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1] / 0.7).softmax(-1).double()
    likely = [token for token in range(VOCAB) if 1600 * float(probabilities[token]) >= 5]
    rest = 1600 - sum(counts[token] for token in likely)
    expected = [1600 * float(probabilities[token]) for token in likely]
    statistic = sum((counts[t] - e) ** 2 / e for t, e in zip(likely, expected, strict=True))
    left = 1600 - sum(expected)
    statistic += (rest - left) ** 2 / max(left, 1e-9) if left > 5 else 0.0
    # Mean k, variance 2k: five standard deviations.
    assert statistic < len(likely) + 5 * (2 * len(likely)) ** 0.5
    assert tokens(made.generate(requests[:20], seed=5, step=0)) == tokens(found[:20])
    assert tokens(made.generate(requests[:20], seed=6, step=0)) != tokens(found[:20])


def test_a_group_split_over_ranks_has_the_same_samples(engine: Any) -> None:
    made = engine(fresh(seed=11))
    made.sync(0)
    whole = tokens(made.generate([Request([5, 6, 7], 4, PARAMS, index=3)], seed=1, step=2))
    parts = [Request([5, 6, 7], 2, PARAMS, index=3, first_sample=first) for first in (0, 2)]
    assert [ids for part in parts for ids in tokens(made.generate([part], seed=1, step=2))] == whole


def test_truncated_samples_stay_inside_their_set(engine: Any) -> None:
    model = fresh(seed=11)
    made = engine(model)
    made.sync(0)
    for changes, keeps in (({"top_k": 3}, 3), ({"top_p": 0.4}, None), ({"min_p": 0.5}, None)):
        params = SamplingParams(1, **changes)
        found = made.generate([Request([9, 8, 7], 64, params)], seed=1, step=0)
        check_completions([Request([9, 8, 7], 64, params)], found, vocab_size=VOCAB)
        with torch.no_grad():
            row = model(input_ids=torch.tensor([[9, 8, 7]])).logits[0, -1].softmax(-1)
        order = row.argsort(descending=True).tolist()
        if keeps is None and "top_p" in changes:
            keeps = int((row.sort(descending=True).values.cumsum(0) < 0.4).sum()) + 1
        elif keeps is None:
            keeps = int((row >= 0.5 * row.max()).sum())
        seen = {ids[0] for ids in tokens(found)}
        assert seen <= set(order[:keeps])
        total = float(row[order[:keeps]].sum())
        for completion in found[0]:
            assert completion.policy_logprobs is None
            wanted = float((row[completion.token_ids[0]] / total).log())
            assert completion.sampler_logprobs == [pytest.approx(wanted, abs=1e-4)]


def test_stop_strings_end_a_completion(engine: Any) -> None:
    tokenizer = tiny.tokenizer()
    made = engine(fresh(seed=11))
    made.sync(0)
    params = SamplingParams(60, stop=("a", "7"), eos_token_ids=(0,))
    requests = [Request([5, 6, 7], 16, params)]
    found = made.generate(requests, seed=1, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    reasons = Counter(completion.stop_reason for completion in found[0])
    assert reasons[StopReason.STOP] > 0
    for completion in found[0]:
        assert not any(stop in completion.text for stop in params.stop)
        if completion.stop_reason is StopReason.STOP:
            assert tokenizer.decode(completion.token_ids)[-1] in params.stop


def test_many_tiny_requests_and_long_prompts(source: Any, engine: Any) -> None:
    made = engine(fresh(seed=11))
    made.sync(0)
    params = SamplingParams(2)
    requests = [Request([5 + i % 50], 1, params, index=i) for i in range(300)]
    requests.append(Request([9] * 254, 2, params, index=300))
    check_completions(requests, made.generate(requests, seed=0, step=0), vocab_size=VOCAB)
    with pytest.raises(ConfigError, match=source.exceeds):
        made.generate([Request([9] * 255, 1, params)], seed=0, step=0)


# Syncs.


def test_more_prompt_tokens_than_a_forward_takes(engine: Any) -> None:
    """A prompt that the rest of a forward has no room for waits for the next; its samples have seeds."""
    model = fresh(seed=11)
    made = engine(model)
    made.sync(0)
    prompts = [[i * j % (VOCAB - 3) + 3 for j in range(1, 181)] for i in range(60)]
    requests = [Request(prompt, 2, SamplingParams(4), index=i) for i, prompt in enumerate(prompts)]
    found = made.generate(requests, seed=1, step=0)
    check_completions(requests, found, vocab_size=VOCAB)
    assert tokens(found) == tokens(made.generate(requests, seed=1, step=0))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
def test_all_weights_arrive_the_tied_head_too(engine: Any, size: float) -> None:
    model = fresh(seed=12, tie_word_embeddings=True)
    made = engine(model)
    for version in range(3):
        metrics = made.sync(version)
        assert metrics["sampling/probe/difference"] < 2e-5
        tiny.move(model, size, seed=version)
    made.sync(3)
    groups = [
        Group(list(r.prompt_ids), c) for r, c in zip(REQUESTS, made.generate(REQUESTS, seed=1, step=0), strict=True)
    ]
    batch = pack(groups)
    with torch.no_grad():
        assert float((batch.token["policy_logprobs"] - score(model, batch).logprobs).abs().max()) < 2e-4


@pytest.mark.parametrize("with_adapters", [False, True])
def test_prompts_are_read_again_after_a_change_of_weights(engine: Any, with_adapters: bool) -> None:
    """Keys and values of a long prompt are cached in blocks of 128 tokens; the probe does not read them."""
    model = lora(fresh(tie_word_embeddings=True)) if with_adapters else fresh(seed=11)
    made = engine(model)
    request = Request([5 + i % 60 for i in range(200)], 4, PARAMS)
    for version in range(3):
        made.sync(version)
        groups = [Group(list(request.prompt_ids), made.generate([request], seed=1, step=0)[0])]
        batch = pack(groups)
        with torch.no_grad():
            difference = batch.token["policy_logprobs"] - score(model, batch).logprobs
        assert float(difference.abs().max()) < 2e-4
        tiny.move(model, 0.1, seed=version)


def test_adapters_arrive(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    adapted = lora(fresh(tie_word_embeddings=True))
    made = engine(adapted)
    made.sync(0)
    before = tokens(made.generate(REQUESTS, seed=1, step=0))
    for version in (1, 2, 3):
        tiny.move(adapted, 0.1, seed=version)
        assert made.sync(version)["sampling/probe/difference"] < 5e-5
    assert tokens(made.generate(REQUESTS, seed=1, step=0)) != before
    assert "lost" not in caplog.text, "each at the first attempt"


# What must not pass as a sync.


@pytest.mark.parametrize(
    ("fault", "size", "cause"),
    [
        ("ignore_reload", 1e-4, "bit for bit as at"),
        ("ignore_reload", 1e-2, "bit for bit as at"),
        # From changes of about 6e-4 nats on: 4 sqrt(2) times the least noise that fp32 is taken to have.
        ("keep_head", 1e-3, "part of the weights was left behind|another model"),
        ("keep_head", 1e-2, "part of the weights was left behind|another model"),
    ],
)
def test_weights_left_behind_stop_the_run(source: Any, engine: Any, fault: str, cause: str, size: float) -> None:
    model, faults = fresh(seed=13), set[str]()
    made = engine(model, faults)
    made.sync(0)
    faults.add(fault)
    tiny.move(model, size)
    with pytest.raises(CheckFailed, match=cause):
        made.sync(1)
    faults.clear()
    made.sync(1)
    assert source.proof(made).agreement.difference < 2e-5


def test_an_adapter_that_never_arrives_stops_the_run(engine: Any) -> None:
    adapted, faults = lora(fresh(tie_word_embeddings=True)), set[str]()
    made = engine(adapted, faults)
    made.sync(0)
    faults.add("drop_adapter")
    tiny.move(adapted, 1e-2)
    with pytest.raises(CheckFailed, match="the adapter never arrived"):
        made.sync(1)
