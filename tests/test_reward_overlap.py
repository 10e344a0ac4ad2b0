"""Rewards that are graded while other groups are sampled: the same in every figure, only earlier."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish.errors import EngineError, RewardError
from burnish.rewards import Criterion, Rubric, math_answer
from burnish.rewards.verifiers import AnswerVerifier
from burnish.rollout import Request, SamplingParams
from burnish.rollout.lockstep import LockstepEngine
from burnish.rollout.native import NativeEngine
from burnish.types import Completion
from test_rewards_rubric import group
from test_trainers import assert_same, digits, grpo, weights


class Silent:
    """An engine that does not know `on_done`."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        plain = [dataclasses.replace(request, on_done=None) for request in requests]
        return self.engine.generate(plain, seed=seed, step=step)

    def sync(self, version: int) -> None:
        self.engine.sync(version)

    def close(self) -> None:
        self.engine.close()


class Backwards(Silent):
    """An engine whose groups finish in the reverse order."""

    def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
        found = super().generate(requests, seed=seed, step=step)
        for request, completions in reversed(list(zip(requests, found, strict=True))):
            if request.on_done is not None:
                request.on_done(completions)
        return found


async def fails_on_some(completions: list[str], completion_ids: list[list[int]], log_extra: Any, **_: Any) -> Any:
    await asyncio.sleep(0.001 * len(completions[0]))
    if any(sum(ids) % 7 == 3 for ids in completion_ids):
        raise ConnectionError("gone")
    log_extra("seen", len(completions) * ["async"])
    return [len(set(ids)) / 8 for ids in completion_ids]


def logs(completions: list[str], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    log_extra("seen", completions)
    log_metric("longest", max(map(len, completions)))
    return [len(text) / 8 for text in completions]


def ranks(completions: list[str], **_: Any) -> list[float]:
    return [sorted(completions).index(text) / 4 for text in completions]


async def memoized(completions: list[str], **_: Any) -> list[float]:
    return [float("1" in text) for text in completions]


def hangs(completion_ids: list[list[int]], **_: Any) -> list[float]:
    if any(sum(ids) % 11 == 5 for ids in completion_ids):
        threading.Event().wait(600)
    return [0.0] * len(completion_ids)


def rubric() -> Rubric:
    return Rubric([
        Criterion("digits", digits),
        Criterion("async", fails_on_some, 0.5, requires={"digits": 0.0}),
        Criterion("logs", logs, 0.1, overlap=True),
        Criterion("whole", logs, 0.1),
        Criterion("ranks", ranks, 0.2, per_group=True),
        Criterion("ranks_early", ranks, 0.2, per_group=True, overlap=True, normalize="group"),
        Criterion("memoized", memoized, 0.3, memoize=True),
        Criterion("hangs", hangs, timeout_seconds=0.2, overlap=True),
    ])  # fmt: skip


def run(folder: Path, wrap: Any) -> tuple[Any, list[dict[str, Any]], list[dict[str, float]]]:
    trainer = grpo(folder, rewards=rubric(), max_steps=2, logprob_check_bound=1.0, log_completions=True)
    if wrap is not None:
        trainer.stage.sampler.engine = wrap(trainer.stage.sampler.engine)
    trainer.train()
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    kept = ("reward", "rewards/", "logged/", "longest", "loss", "completions/")
    measured = [{k: v for k, v in log.items() if k.startswith(kept)} for log in trainer.state.log_history]
    return weights(trainer), [{k: v for k, v in row.items() if k != "time"} for row in rows], measured


def test_graded_early_is_graded_the_same(tmp_path: Path) -> None:
    """Several kinds of criterion with failures and hangs, on engines that report groups early, late and reversed."""
    silent, early, reverse = (
        run(tmp_path / name, wrap) for name, wrap in [("silent", Silent), ("early", None), ("reverse", Backwards)]
    )
    for other in (early, reverse):
        assert_same(silent[0], other[0], 0.0)
        assert silent[1:] == other[1:]
    assert {name for row in silent[1] for name in row["errors"]} == {"async", "hangs"}
    assert any("seen" in row["extra"] and "logs/seen" in row["extra"] for row in silent[1])
    assert all(log["longest"] > 0 for log in silent[2] if "reward" in log)


def test_grading_of_the_first_group_begins_before_the_last_is_sampled(tmp_path: Path) -> None:
    """The engine does not return its last group before the first one is being graded."""
    begun = {"async": threading.Event(), "verifier": threading.Event(), "plain": threading.Event()}
    graded: list[int] = []

    async def judged(completions: list[str], **_: Any) -> list[float]:
        begun["async"].set()
        await asyncio.sleep(0.05)
        graded.append(len(completions))
        return [1.0] * len(completions)

    def grade(pairs: Sequence[Any]) -> list[Any]:
        begun["verifier"].set()
        return [1.0] * len(pairs)

    def plain(completions: list[str], **_: Any) -> list[float]:
        begun["plain"].set()
        return [float(len(text)) for text in completions]

    class Waiting(Silent):
        def generate(self, requests: Sequence[Request], *, seed: int, step: int) -> list[list[Completion]]:
            first = self.engine.generate(requests[:1], seed=seed, step=step)
            assert begun["async"].wait(60)
            assert begun["verifier"].wait(60)
            assert not begun["plain"].is_set(), "a plain function is called once, at the end"
            return first + self.engine.generate(requests[1:], seed=seed, step=step)

    verifier = AnswerVerifier("made", grade, lambda row: [], "answer", ("last_number",), overlaps=True)
    criteria = [Criterion("judged", judged), Criterion("verifier", verifier), Criterion("plain", plain)]
    trainer = grpo(tmp_path, rewards=Rubric(criteria), max_steps=1, logprob_check_bound=1.0)
    trainer.stage.sampler.engine = Waiting(trainer.stage.sampler.engine)
    trainer.train()
    assert graded == [4, 4, 4]


@pytest.mark.parametrize("make", [NativeEngine, LockstepEngine])
def test_engines_report_a_group_once_while_others_are_sampled(make: Any) -> None:
    engine = make(tiny.model(), tiny.tokenizer(), max_running=2)
    told: list[tuple[int, list[Completion], int]] = []
    progress = [0]

    def asked(index: int, tokens: int) -> Request:
        prompt = [5 + index] * (3 + index)
        return Request(
            prompt, 2, SamplingParams(tokens), index, on_done=lambda done: told.append((index, done, progress[0]))
        )

    requests = [asked(0, 4), asked(1, 30), asked(2, 5), Request([9], 2, SamplingParams(3), 3)]
    found = engine.generate(requests, seed=1, step=2, on_progress=lambda done, *_: progress.__setitem__(0, done))
    assert sorted(index for index, _, _ in told) == [0, 1, 2]
    assert all(done == found[index] and all(c.text is not None for c in done) for index, done, _ in told)
    assert min(seen for _, _, seen in told) < 6, "others were not done"


@pytest.mark.parametrize("make", [NativeEngine, LockstepEngine])
def test_an_error_of_a_callback_is_one_of_generate(make: Any) -> None:
    def fails(completions: list[Completion]) -> None:
        raise RewardError("no prompt")

    engine = make(tiny.model(), tiny.tokenizer())
    with pytest.raises(RewardError, match="no prompt"):
        engine.generate([Request([5, 6], 2, SamplingParams(4), on_done=fails)], seed=0, step=0)


def test_an_engine_that_reports_other_completions_is_refused() -> None:
    one = group("a", "b")
    scoring = Rubric([Criterion("c", memoized)]).begin([one])
    scoring.start(0, [Completion([1, 2, 3], text="a"), Completion([4], text="b")])
    with pytest.raises(EngineError, match="called on_done with other completions than it returned"):
        scoring.scores()


async def compares(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


async def measures(completions: list[str], log_metric: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("criterion", "overlaps"),
    [
        (Criterion("c", memoized), True),
        (Criterion("c", memoized, overlap=False), False),
        (Criterion("c", compares, isolate=False), False),
        (Criterion("c", compares, isolate=False, per_group=True), True),
        (Criterion("c", measures), False),
        (Criterion("c", measures, overlap=True), True),
        (Criterion("c", digits), False),
        (Criterion("c", ranks, per_group=True), False),
        (Criterion("c", digits, overlap=True), True),
        (Criterion("c", math_answer()), True),
        (Criterion("c", math_answer(), isolate=False), False),
    ],
)
def test_which_criteria_overlap(criterion: Criterion, overlaps: bool) -> None:
    assert criterion.overlaps is overlaps


def test_keyboard_interrupts_of_a_thread_are_the_users() -> None:
    def stop(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rubric([Criterion("stop", stop, overlap=True)]).score([group("a", "b")])
    assert torch.is_grad_enabled()
