"""Completions whose reward is settled are stopped: their tokens begin those of a whole one, and earn what it earns."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import test_native
import tiny
from burnish import ConfigError, Criterion, GRPOConfig, GRPOTrainer, PPOConfig, RewardError, Rubric
from burnish.data.tokens import decode_text
from burnish.model.scoring import Scores
from burnish.rewards import exact_answer, format_tags, math_answer, numeric_answer, think_format_reward
from burnish.rewards.settled import SettledRule
from burnish.rollout import Request, SamplingParams
from burnish.rollout.decoding import Track
from burnish.rollout.lockstep import LockstepEngine
from burnish.rollout.native import NativeEngine
from burnish.types import Completion, Group, Score, StopReason
from test_native import build, prompts
from test_trainers import PROMPTS, Elsewhere, grpo, recorded, settings, weights

tokenizer = test_native.tokenizer


def fixed(settled: Any = None, value: float = 1.0) -> Any:
    """A reward function that is the same for all, with an `is_settled`."""

    def function(completions: list[str], **columns: Any) -> list[float]:
        return [value] * len(completions)

    function.is_settled = settled  # type: ignore[attr-defined]
    return function


def rule_of(**functions: Any) -> SettledRule:
    return SettledRule(Rubric([Criterion(name, function) for name, function in functions.items()]))


# What the built-in verifiers say


PIECES = ("<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "{", "}", "4", "5", " ", "so ", "<th", "ink>")
VERIFIERS: dict[str, Any] = {
    "exact": exact_answer(until_closed=True),
    "boxed": numeric_answer(sources=["boxed"], until_closed=True),
    "both": exact_answer(sources=["tag", "boxed"], until_closed=True),
    "format": format_tags(until_closed=True),
    "outside": format_tags(until_closed=True, allow_outside=True, prefix="<think>"),
    "think": think_format_reward,
}


@pytest.mark.parametrize("name", VERIFIERS)
def test_no_continuation_changes_the_value_of_a_settled_text(name: str) -> None:
    verifier, draw = VERIFIERS[name], random.Random(0)

    def value(text: str) -> float:
        return verifier(prompts=["p"], completions=[text], answer=["4"])[0]

    found: dict[float, int] = {}
    for _ in range(4000):
        whole = "".join(draw.choices(PIECES, k=24))
        cut = draw.randrange(len(whole))
        if verifier.is_settled(whole[:cut], answer="4", prompt="p"):
            assert value(whole) == value(whole[:cut]), (whole, cut)
            found[value(whole)] = found.get(value(whole), 0) + 1
    assert sum(found.values()) > 300
    assert len(found) > 1 or name == "think", "one that is settled at 1 is not known to be: the tag may be repeated"


def test_the_first_answer_to_be_closed_counts() -> None:
    verifier = exact_answer(sources=["tag", "boxed"], until_closed=True)
    for text, answer in (
        ("<answer>4</answer><answer>5</answer>", "4"),
        (r"<answer> </answer>\boxed{5}<answer>4</answer>", "5"),
        (r"<answer>\boxed{4} cm</answer>", "4"),
        (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"<answer>4 \boxed{5", None),
    ):
        assert verifier.extract(text) == answer
    graded = format_tags(until_closed=True)(["<think>a</think><answer>b</answer> and <answer>c</answer>", "</answer>"])
    assert graded == [1.0, 0.0]
    assert [v.is_settled for v in (exact_answer(), format_tags(), math_answer())] == [None] * 3
    with pytest.raises(ConfigError, match="until_closed = True of numeric_answer with the source 'last_number'"):
        numeric_answer(sources=["tag", "last_number"], until_closed=True)


def test_a_row_without_a_gold_answer_is_settled_at_once() -> None:
    rule = rule_of(exact=exact_answer(until_closed=True))
    assert rule("", {"answer": None})
    assert not rule("", {"answer": "4"})


# The rule of a rubric


def test_every_criterion_with_a_weight_must_be_settled() -> None:
    unsettled = Criterion("length", lambda completions, **columns: [0.0], weight=0.0)
    has = {letter: fixed(lambda text, letter=letter, **columns: letter in text) for letter in "ab"}
    rule = SettledRule(Rubric([unsettled, *(Criterion(name, function) for name, function in has.items())]))
    assert [rule(text, {}) for text in ("", "a", "b", "ba")] == [False, False, False, True]


def test_a_predicate_gets_the_columns_that_it_names_and_bound_options() -> None:
    seen: list[Any] = []

    def limited(completions: list[str], limit: int, **columns: Any) -> list[float]:
        return [float(len(text) > limit) for text in completions]

    def is_settled(text: str, limit: int, answer: str) -> bool:
        seen.append((text, limit, answer))
        return len(text) > limit

    limited.is_settled = is_settled  # type: ignore[attr-defined]
    named = functools.partial(limited, limit=9)
    named.__name__ = "named"  # type: ignore[attr-defined]  # with an attribute it stays a call of its own below
    rule = rule_of(limited=functools.partial(named, limit=2))
    assert [rule(text, {"answer": "4", "text": "a column", "more": 1}) for text in ("ab", "abc")] == [False, True]
    assert seen == [("ab", 2, "4"), ("abc", 2, "4")]
    everything: list[Any] = []
    assert rule_of(all=fixed(lambda text, **columns: everything.append(columns) or True))("", {"text": 1, "a": 2})
    assert everything == [{"a": 2}]


def fails(text: str, **columns: Any) -> bool:
    raise ValueError("no such thing")


def ends(text: str, **columns: Any) -> bool:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        (fails, "is_settled of criterion 'bad' failed on 'abc': ValueError: no such thing"),
        (ends, "is_settled of criterion 'bad' failed on 'abc': SystemExit: 3"),
        (lambda text: 1, "is_settled of criterion 'bad' returned 1 for 'abc': return True or False"),
        (lambda text, missing: True, "is_settled of criterion 'bad' failed on 'abc': TypeError.*'missing'"),
    ],
)
def test_a_predicate_that_fails_is_named(predicate: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=message):
        rule_of(fine=fixed(lambda text: True), bad=fixed(predicate))("abc", {})
    trainer = grpo(tmp_path, rewards=fixed(predicate), stop_settled=True, max_completion_length=16)
    with pytest.raises(RewardError, match=message.split(" failed")[0].split(" returned")[0].replace("bad", "function")):
        trainer.train()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: GRPOConfig(stop_settled=True, use_vllm=True, vllm_mode="server"), "stop_settled = True with use_vllm"),
        (lambda: GRPOConfig(stop_settled=True, overlong_buffer=0.2), "overlong_buffer = 0.2.*set overlong_penalty = 0"),
        (lambda: GRPOConfig(stop_settled=True, algorithm="dapo"), "overlong_buffer = 0.2"),
        (lambda: PPOConfig(stop_settled=True, missing_eos_penalty=1.0), "missing_eos_penalty = 1.0"),
        (lambda: rule_of(good=fixed(str.isdigit), math=exact_answer()), "criterion 'math' has no is_settled.*until"),
        (lambda: rule_of(good=fixed(True)), "criterion 'good' has no is_settled"),
        (lambda: SettledRule(Rubric([Criterion("a", fixed(), weight=0.0)])), "every criterion has weight 0"),
    ],
)  # fmt: skip
def test_what_could_stop_nothing_is_an_error(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made()


def test_a_penalty_of_nothing_can_be_settled() -> None:
    GRPOConfig(stop_settled=True, algorithm="dapo", overlong_penalty=0.0)
    PPOConfig(stop_settled=True, missing_eos_penalty=0.0)


def test_another_engine_must_heed_the_predicate(tmp_path: Path) -> None:
    args = GRPOConfig(**settings(tmp_path), num_generations=4, stop_settled=True)
    given: dict[str, Any] = {"processing_class": tiny.tokenizer(), "engine": Elsewhere(None)}
    # The model does not exist: the error comes before it is looked for.
    with pytest.raises(ConfigError, match="stop_settled = True with Elsewhere"):
        GRPOTrainer("no/such/model", fixed(lambda text: True), args, PROMPTS, **given)


# What the engines do


def has_two(text: str) -> bool:
    """True of every text that begins with one of which it is true."""
    return sum(character in "eat" for character in text) >= 2


Made = Callable[[Any, Any], Any]
ENGINES: dict[str, Made] = {
    "native": lambda model, tokenizer: NativeEngine(model, tokenizer),
    "few rows": lambda model, tokenizer: NativeEngine(model, tokenizer, max_running=3),
    "without guesses": lambda model, tokenizer: NativeEngine(model, tokenizer, speculate=False),
    "lockstep": lambda model, tokenizer: LockstepEngine(model, tokenizer, max_running=5),
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_stopped_completion_begins_the_whole_one(name: str, tokenizer: Any) -> None:
    model, seen = build("llama"), list[str]()

    def is_settled(text: str) -> bool:
        seen.append(text)
        return has_two(text)

    params = SamplingParams(44, eos_token_ids=(7, 77, 177))
    requests = [Request(p, 6, params, i) for i, p in enumerate(prompts(5, 9, 6))]
    free = ENGINES[name](model, tokenizer).generate(requests, seed=1, step=0)
    assert ENGINES[name](model, tokenizer).stops_settled
    engine = ENGINES[name](model, tokenizer)
    cut = engine.generate([replace(r, is_settled=is_settled) for r in requests], seed=1, step=0)
    reasons: list[Any] = []
    for whole, stopped in ((a, b) for x, y in zip(free, cut, strict=True) for a, b in zip(x, y, strict=True)):
        size = len(whole.token_ids)
        checks = [n for n in range(8, size, 8) if has_two(decode_text(tokenizer, whole.token_ids[:n]).rstrip("\ufffd"))]
        length = checks[0] if checks else size
        assert stopped.token_ids == whole.token_ids[:length]
        assert stopped.stop_reason is (StopReason.SETTLED if checks else whole.stop_reason)
        # Rows that leave early change the batches of the others, whose fp32 sums then round otherwise.
        assert stopped.policy_logprobs == pytest.approx((whole.policy_logprobs or [])[:length], abs=2e-5)
        assert stopped.sampler_logprobs == pytest.approx((whole.sampler_logprobs or [])[:length], abs=2e-5)
        assert stopped.text == decode_text(tokenizer, stopped.token_ids, params.eos_token_ids)
        reasons.append(stopped.stop_reason)
    assert {StopReason.SETTLED, StopReason.EOS, StopReason.LENGTH} == set(reasons)
    texts = [completion.text for group in free for completion in group]
    assert all(any(text.startswith(part) for text in texts) for part in seen), "no half character at the end"
    assert len(seen) <= sum(len(c.token_ids) // 8 for group in cut for c in group)


def test_without_a_predicate_nothing_is_decoded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.rollout.decoding.GrowingText", None)
    engine = NativeEngine(build("llama"), tokenizer)
    assert len(engine.generate([Request(prompts(5)[0], 2, SamplingParams(20))], seed=0, step=0)[0]) == 2
    with pytest.raises(TypeError):
        engine.generate([Request(prompts(5)[0], 2, SamplingParams(20), is_settled=has_two)], seed=0, step=0)


def asked(tokenizer: Any, text: str, **params: Any) -> tuple[list[str], Any]:
    """The texts that a predicate is asked about as a completion grows, and how the completion ends."""
    seen: list[str] = []
    params = {"max_new_tokens": 99, **params}
    request = Request([1], 1, SamplingParams(**params), is_settled=lambda part: bool(seen.append(part)))
    track = Track(request, 0, tokenizer, seed=0, step=0)
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if track.push(token, 0.0, 0.0):
            break
    return seen, track.completion.stop_reason


def test_the_text_that_a_predicate_gets(tokenizer: Any) -> None:
    # "é" is the 8th and 9th byte.
    assert asked(tokenizer, "abcdefgéhijklmn") == (["abcdefg", "abcdefgéhijklmn"], None)
    # "EN" may become "END", which would be cut from the text; at the limit nothing is asked.
    assert asked(tokenizer, "abcdefENopEND", stop=("END", "xyz")) == (["abcdef"], StopReason.STOP)
    assert asked(tokenizer, "abcdefgh", max_new_tokens=8) == ([], StopReason.LENGTH)


def test_padding_at_the_end_is_not_asked_about() -> None:
    padded = tiny.tokenizer()
    padded.pad_token = "<unk>"
    seen, _ = asked(padded, "abcdefg<unk>hijklmno")
    assert seen == ["a b c d e f g <unk> h i j k l m n o"]


# What training does with them


def has_seven(completions: list[str], **columns: Any) -> list[float]:
    return [float("7" in text or "8" in text) for text in completions]


has_seven.is_settled = lambda text, **columns: "7" in text or "8" in text  # type: ignore[attr-defined]


def test_a_run_stops_what_is_settled_and_earns_the_same(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "max_completion_length": 32, "learning_rate": 0.0, "temperature": 1.5, "log_completions": True, "max_steps": 2,
        "eval_dataset": PROMPTS[:4],
    }  # fmt: skip
    whole, early = (
        grpo(tmp_path / str(stops), rewards=has_seven, stop_settled=stops, **changes) for stops in (False, True)
    )
    found = [recorded(trainer) for trainer in (whole, early)]
    for trainer in (whole, early):
        trainer.train()
    pairs = [
        (a, b)
        for step, cut in zip(*found, strict=True)
        for g, h in zip(step, cut, strict=True)
        for a, b in zip(g.completions, h.completions, strict=True)
    ]
    stopped = [(a, b) for a, b in pairs if b.stop_reason is StopReason.SETTLED]
    assert 0 < len(stopped) < len(pairs) == 24
    for a, b in pairs:
        assert b.token_ids == a.token_ids[: len(b.token_ids)]
        assert (a.reward, a.sequence["advantages"]) == (b.reward, b.sequence["advantages"])
    assert all(len(b.token_ids) % 8 == 0 and len(b.token_ids) < len(a.token_ids) for a, b in stopped)
    logs = [log for log in early.state.log_history if "completions/settled_ratio" in log]
    assert sum(log["completions/settled_ratio"] for log in logs) == pytest.approx(2 * len(stopped) / len(pairs))
    cut = [sum(c.stop_reason is StopReason.LENGTH for c in pair) for pair in zip(*pairs, strict=True)]
    clipped = [sum(log.get("completions/clipped_ratio", 0) for log in t.state.log_history) for t in (whole, early)]
    assert clipped == pytest.approx([n / 12 for n in cut])
    assert not any("completions/settled_ratio" in log for log in whole.state.log_history)
    lines = [json.loads(line) for line in (tmp_path / "True/transcripts.jsonl").read_text().splitlines()]
    assert sum(line["stop_reason"] == "settled" for line in lines) == len(stopped)
    # An evaluation samples whole completions.
    lengths = [trainer.evaluate()["eval_completions/mean_length"] for trainer in (whole, early)]
    assert lengths[0] == lengths[1]


FIRST, SECOND = [1.0, -0.25]
"""Advantages of the two completions of the group below."""


def gradients(folder: Path, lengths: Sequence[int], reason: StopReason, **changes: Any) -> list[float]:
    """The gradient of the loss by each token's log-probability, on policy: minus the advantage times its weight."""
    trainer = grpo(folder, **changes)
    ids = [[5] * lengths[0], [6] * (lengths[1] - 1) + [0]]
    reasons = [reason, StopReason.EOS]
    group = Group([3, 4], [Completion(i, stop_reason=r) for i, r in zip(ids, reasons, strict=True)], {"prompt": ""})
    for completion, advantage in zip(group.completions, (FIRST, SECOND), strict=True):
        completion.score = Score(advantage, {"digits": advantage})
        completion.sequence["advantages"] = advantage
    stage = trainer.stage
    step = stage.algorithm.step([group])
    batch = stage.pack(step.groups)
    logprobs_N = torch.full((batch.num_scored_tokens,), -2.0, requires_grad=True)
    scores = Scores(logprobs_N, torch.ones_like(logprobs_N), torch.ones_like(logprobs_N, dtype=torch.bool))
    stage.algorithm.loss(scores, batch, step).value.backward()
    assert logprobs_N.grad is not None
    return logprobs_N.grad.tolist()


@pytest.mark.parametrize(
    ("loss_type", "whole", "stopped"),
    [
        # The weight of a token of the first completion and of the second, which have 6 and 4 tokens, then 2 and 4.
        ("dapo", (1 / 10, 1 / 10), (1 / 6, 1 / 6)),
        ("bnpo", (1 / 10, 1 / 10), (1 / 6, 1 / 6)),
        ("grpo", (1 / 12, 1 / 8), (1 / 4, 1 / 8)),
        ("dr_grpo", (1 / 16, 1 / 16), (1 / 16, 1 / 16)),
    ],
)
def test_weights_of_tokens_by_hand(
    tmp_path: Path, loss_type: str, whole: tuple[float, float], stopped: tuple[float, float]
) -> None:
    for lengths, reason, (first, second) in (
        ((6, 4), StopReason.LENGTH, whole),
        ((2, 4), StopReason.SETTLED, stopped),
    ):
        found = gradients(tmp_path, lengths, reason, loss_type=loss_type)
        expected = [-FIRST * first] * lengths[0] + [-SECOND * second] * lengths[1]
        assert found == pytest.approx(expected, abs=1e-7)  # fp32


def test_a_stopped_completion_is_not_a_truncated_one(tmp_path: Path) -> None:
    masks: dict[str, Any] = {"loss_type": "dapo", "mask_truncated_completions": True}
    assert gradients(tmp_path, (2, 4), StopReason.SETTLED, **masks) == pytest.approx([-1 / 6] * 2 + [0.25 / 6] * 4)
    assert gradients(tmp_path, (2, 4), StopReason.LENGTH, **masks) == pytest.approx([0.25 / 4] * 4)


def test_a_run_that_stops_completions_resumes(tmp_path: Path) -> None:
    def made() -> GRPOTrainer:
        saved = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
        return grpo(
            tmp_path, rewards=has_seven, stop_settled=True, steps_per_generation=2, max_completion_length=24,
            temperature=1.5, replay_size=2, **saved,
        )  # fmt: skip

    whole = made()
    whole.train()
    state = json.loads((tmp_path / "checkpoint-1/rollout_0.json").read_text())
    waiting = [c["stop_reason"] for groups in state["buffer"] for group in groups for c in group["completions"]]
    assert "settled" in waiting
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())
