"""Requests to vLLM, and its answers: some recorded from a real server (tests/vllm_answers.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish.errors import EngineError
from burnish.rollout import Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.rollout.vllm.dispatch import Job
from burnish.rollout.vllm.wire import (
    assemble_group,
    completion_request,
    parse_pieces,
    parse_prompt_logprobs,
    probe_request,
    samples_policy,
)
from burnish.types import StopReason

TOKENIZER = tiny.tokenizer()


def choice(ids: list[int], finish: str = "length", stop: Any = None, index: int = 0) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5 - i for i in range(len(ids))], "tokens": [], "top_logprobs": []}
    return {
        "index": index, "token_ids": ids, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop,
    }  # fmt: skip


def read(choices: list[dict[str, Any]], params: SamplingParams, number: int | None = None) -> Any:
    request = Request([5, 6], number or len(choices), params)
    job = Job(request, seed=0, step=0)
    assert job.add(enumerate(parse_pieces({"choices": choices}, len(choices), 0)))
    found = job.result(TOKENIZER)
    check_completions([request], [found], vocab_size=96)
    return found


def test_one_request_asks_for_the_whole_group() -> None:
    params = SamplingParams(
        32, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, stop=("#",), eos_token_ids=(0, 3)
    )
    body = completion_request(Request([5, 6], 8, params, index=4), model="m", seed=1, step=2)
    asked = {
        "model": "m", "prompt": [5, 6], "n": 8, "max_tokens": 32, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "repetition_penalty": 1.1, "stop": ["#"], "stop_token_ids": [0, 3], "ignore_eos": True,
        "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False, "stream": False,
    }  # fmt: skip
    assert {name: body[name] for name in asked} == asked


def test_seeds_are_keyed_by_seed_step_prompt_and_sample() -> None:
    params = SamplingParams(4)

    def seed(**changes: int) -> int:
        of = {"index": 0, "first": 0, "seed": 0, "step": 0} | changes
        request = Request([5], 4, params, index=of["index"], first_sample=of["first"])
        return completion_request(request, model="m", seed=of["seed"], step=of["step"])["seed"]

    assert len({seed(), seed(index=1), seed(seed=1), seed(step=1)}) == 4
    # vLLM gives sample k of a request the request's seed + k: a group split over ranks has the same samples.
    assert seed(first=3) == seed() + 3
    assert all(0 <= seed(index=index, first=1000) < 2**63 for index in range(200))


def test_greedy_samples_are_asked_for_once_and_copied() -> None:
    params = SamplingParams(2, temperature=0)
    assert completion_request(Request([5], 3, params), model="m", seed=0, step=0)["n"] == 1
    found = read([choice([4, 7])], params, 3)
    assert [c.token_ids for c in found] == [[4, 7]] * 3
    found[0].token_ids.append(1)
    assert found[1].token_ids == [4, 7]


@pytest.mark.parametrize(
    ("changes", "is_policy"),
    [
        ({}, True), ({"temperature": 0.3}, True), ({"top_p": 0.9}, False), ({"top_k": 4}, False),
        ({"min_p": 0.1}, False), ({"repetition_penalty": 1.1}, False), ({"temperature": 0.0, "top_k": 4}, True),
    ],
)  # fmt: skip
def test_truncated_samples_have_no_log_probabilities_of_the_policy(changes: dict[str, Any], is_policy: bool) -> None:
    params = SamplingParams(2, **changes)
    assert samples_policy(params) is is_policy
    (found,) = read([choice([4, 7])], params)
    assert found.sampler_logprobs == [-0.5, -1.5]
    assert found.policy_logprobs == ([-0.5, -1.5] if is_policy else None)
    pieces = [parse_pieces({"choices": [choice([4, 7])]}, 1, 0)]
    (raw,) = assemble_group(pieces, Request([5], 1, params), TOKENIZER, "raw")
    assert raw.policy_logprobs == [-0.5, -1.5]
    assert raw.sampler_logprobs == ([-0.5, -1.5] if is_policy else None)


def test_ends_are_told_apart() -> None:
    params = SamplingParams(4, stop=("b",), eos_token_ids=(0,))
    ids = TOKENIZER.convert_tokens_to_ids
    a, b = ids("a"), ids("b")
    found = read(
        [
            choice([a, 0], "stop", 0, 0),
            choice([a, b], "stop", "b", 1),
            choice([a, a, a, a], "length", None, 2),
            choice([a, a, a, 0], "length", None, 3),  # at the limit, but it ended by itself
        ],
        params,
    )
    assert [c.stop_reason for c in found] == [StopReason.EOS, StopReason.STOP, StopReason.LENGTH, StopReason.EOS]
    assert [c.text.replace(" ", "") for c in found] == ["a", "a", "aaaa", "aaa"]


def test_choices_are_taken_in_the_order_of_their_samples() -> None:
    found = read([choice([7, 7], index=1), choice([4, 4], index=0)], SamplingParams(2))
    assert [c.token_ids for c in found] == [[4, 4], [7, 7]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([choice([4, 7], "cancelled")], "finish_reason = 'cancelled'"),
        ([choice([], "stop")], "without token_ids"),
        ([choice([4, 7]) | {"logprobs": None}], "2 tokens with 0 log-probabilities"),
        ([choice([4, 7]) | {"logprobs": {"token_logprobs": [-1.0, None]}}], "one finite number each"),
        ([choice([4])], r"cut at 1 of 2 tokens: .*--max-model-len.*--generation-config vllm"),
        ([choice([4, 7]), choice([4, 7], index=2)], "2 choices instead of n = 2"),
        ([choice([4], "stop", "x")], r"without an end-of-sequence token or any of the stop strings \[\]"),
    ],
)
def test_answers_that_break_the_contract_are_errors(broken: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        read(broken, SamplingParams(2))


def test_pieces_of_several_requests_are_one_completion() -> None:
    """Three weights: each sample goes on where it was ended; a stop string over the seam ends it."""
    ids = TOKENIZER.convert_tokens_to_ids
    a, b, c = ids("a"), ids("b"), ids("c")
    params = SamplingParams(6, stop=("a b c",), eos_token_ids=(0,))
    job = Job(Request([5, 6], 3, params, index=4, first_sample=2), seed=1, step=2)
    ((numbers, first),) = job.requests("v0")
    assert (numbers, first["n"], first["max_tokens"]) == ([0, 1, 2], 3, 6)
    answer = {"choices": [choice([a, 0], "stop"), choice([], "abort", index=1), choice([c, a], "abort", index=2)]}
    assert not job.add(zip(numbers, parse_pieces(answer, 3, 10), strict=True))
    second = {numbers[0]: body for numbers, body in job.requests("v1")}
    assert [(number, body["prompt"], body["n"], body["max_tokens"]) for number, body in second.items()] == [
        (1, [5, 6], 1, 6), (2, [5, 6, c, a], 1, 4),
    ]  # fmt: skip
    # A continuation draws other numbers than the tokens before it.
    assert second[1]["seed"] == first["seed"] + 1
    assert second[2]["seed"] != first["seed"] + 2
    for number, found in ((1, [b] * 6), (2, [b])):
        (piece,) = parse_pieces({"choices": [choice(found, "length" if number == 1 else "abort")]}, 1, 11)
        is_done = job.add([(number, piece)])
    assert not is_done
    ((numbers, body),) = job.requests("v2")
    assert (numbers, body["prompt"], body["max_tokens"]) == ([2], [5, 6, c, a, b], 3)
    assert job.add(zip(numbers, parse_pieces({"choices": [choice([c, a, a], "length")]}, 1, 12), strict=True))
    made = job.result(TOKENIZER)
    assert [completion.token_ids for completion in made] == [[a, 0], [b] * 6, [c, a, b, c]]
    assert [completion.stop_reason for completion in made] == [StopReason.EOS, StopReason.LENGTH, StopReason.STOP]
    assert made[2].text.replace(" ", "") == "c"
    assert made[2].token["policy_version"] == [10, 10, 11, 12]
    assert made[2].sampler_logprobs == [-0.5, -1.5, -0.5, -0.5]
    check_completions([job.request], [made], vocab_size=96)


def test_no_choices_at_all() -> None:
    with pytest.raises(EngineError, match="without choices"):
        parse_pieces({"object": "error"}, 1, 0)


def test_log_probabilities_of_a_prompt() -> None:
    rows = [None, {"6": {"logprob": -1.0, "rank": 2}}, {"9": {"logprob": -0.1, "rank": 1}, "7": {"logprob": -2.0}}]
    assert parse_prompt_logprobs({"choices": [{"prompt_logprobs": rows}]}, [5, 6, 7]) == [-1.0, -2.0]
    with pytest.raises(EngineError, match="token 8"):
        parse_prompt_logprobs({"choices": [{"prompt_logprobs": rows}]}, [5, 6, 8])
    with pytest.raises(EngineError, match="no prompt_logprobs"):
        parse_prompt_logprobs({"choices": [{}]}, [5, 6])


# Answers of vLLM 0.32 (CPU build) with the tiny model of tests/tiny.py.

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("vllm_answers.json").read_text())


@pytest.mark.parametrize("name", ["ended", "cut", "greedy"])
def test_recorded_answers_are_read(name: str) -> None:
    asked, answer = RECORDED[name]["request"], RECORDED[name]["answer"]
    params = SamplingParams(
        asked["max_tokens"],
        temperature=asked["temperature"],
        top_k=asked["top_k"],
        stop=tuple(asked["stop"]),
        eos_token_ids=tuple(asked["stop_token_ids"]),
    )
    request = Request(asked["prompt"], 2 if name in ("cut", "greedy") else 3, params)
    # What is asked for today is what was asked for then.
    assert completion_request(request, model="base", seed=1, step=0) == asked
    job = Job(request, seed=1, step=0)
    ((numbers, body),) = job.requests("base")
    assert body == asked
    assert job.add(enumerate(parse_pieces(answer, len(numbers), 0)))
    found = job.result(TOKENIZER)
    check_completions([request], [found], vocab_size=96)
    reasons = {
        "ended": StopReason.EOS,
        "stopped": StopReason.STOP,
        "cut": StopReason.LENGTH,
        "greedy": StopReason.LENGTH,
    }
    assert all(completion.stop_reason is reasons[name] for completion in found)
    for completion, choice in zip(found, answer["choices"], strict=False):
        assert completion.token_ids == choice["token_ids"]
        assert completion.sampler_logprobs == choice["logprobs"]["token_logprobs"]
        assert all(stop not in completion.text for stop in params.stop)


def test_five_stop_strings_are_refused() -> None:
    """Why the configuration takes at most four."""
    assert len(RECORDED["five_stop_strings"]["request"]["stop"]) == 5
    assert RECORDED["five_stop_strings"]["answer"]["status"] == 400


def test_a_recorded_probe_is_read() -> None:
    asked = RECORDED["probe"]["request"]
    assert probe_request(asked["prompt"], model="base") == asked
    found = parse_prompt_logprobs(RECORDED["probe"]["answer"], asked["prompt"])
    assert len(found) == 3
    assert all(value < 0 for value in found)
