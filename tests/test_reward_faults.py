"""Faults of rewards in real runs: what a fault hits is excluded, nothing else changes, and nothing stalls."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish.cli.main import main
from burnish.errors import RewardError
from burnish.rewards import Criterion, Rubric, WorkerPool, batch, math_answer
from burnish.rewards import calls as calls_module
from burnish.rewards import pool as pool_module
from burnish.types import Completion
from test_rewards_rubric import group
from test_trainers import PROMPTS, digits, grpo, recorded, weights

STEPS = 3
DOOMED = "9^{9^{9^9}}"
"""An answer whose worker is killed."""


def is_bad(ids: list[int]) -> bool:
    """True for the completions that a fault hits: about one of seven, and at least one of a run."""
    return sum(ids) % 7 == 3


def value(ids: list[int]) -> float:
    return len(set(ids)) % 3 / 2


def excluding(completion_ids: list[list[int]], **_: Any) -> list[Any]:
    """Fail as the contract has it: the reference for every fault."""
    return [RewardError("excluded") if is_bad(ids) else value(ids) for ids in completion_ids]


def sound(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [value(ids) for ids in completion_ids]


class Ran:
    """What a run of a few steps has done."""

    def __init__(self, folder: Path, criterion: Criterion, **changes: Any) -> None:
        rubric = Rubric([Criterion("digits", digits), criterion])
        trainer = grpo(
            folder, rewards=rubric, max_steps=STEPS, logprob_check_bound=1.0, log_completions=True, beta=0.05, **changes
        )
        steps = recorded(trainer)
        trainer.train()
        self.groups = [group for step in steps for group in step]
        self.per_step = [[c for group in step for c in group.completions] for step in steps]
        self.weights = weights(trainer)
        self.failed = [log["rewards/failed"] for log in trainer.state.log_history if "rewards/failed" in log]
        self.transcripts = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]

    def same_as(self, other: Ran) -> None:
        """Check that rewards, advantages and the trained weights are those of another run."""
        for own, theirs in zip(self.per_step, other.per_step, strict=True):
            assert [c.token_ids for c in own] == [c.token_ids for c in theirs]
            assert [c.reward for c in own] == [c.reward for c in theirs]
            assert [c.sequence["advantages"] for c in own] == [c.sequence["advantages"] for c in theirs]
        assert all(bool((own == other.weights[name]).all()) for name, own in self.weights.items())


@pytest.fixture(scope="module")
def excluded(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("excluded"), Criterion("faulty", excluding))


@pytest.fixture(scope="module")
def faultless(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(tmp_path_factory.mktemp("faultless"), Criterion("faulty", sound))


def is_one(completion: Completion) -> bool:
    return is_bad(completion.token_ids)


def test_the_reference_is_right(excluded: Ran, faultless: Ran) -> None:
    """Rewards and advantages by hand; a fault has an effect at all, so that equality with this run says something."""
    assert any(map(is_one, (c for step in excluded.per_step for c in step)))
    for one in excluded.groups:
        known = [c.reward for c in one.completions if c.reward is not None]
        spread = statistics.stdev(known) + 1e-4
        for c in one.completions:
            expected = None if is_one(c) else digits([c.text])[0] + value(c.token_ids)
            assert c.reward == (None if expected is None else pytest.approx(expected))
            advantage = 0.0 if expected is None else (expected - statistics.mean(known)) / spread
            assert c.sequence["advantages"] == pytest.approx(advantage, abs=1e-6)
    assert any(bool((w != faultless.weights[name]).any()) for name, w in excluded.weights.items())


def bad_of(completion_ids: list[list[int]]) -> bool:
    return any(map(is_bad, completion_ids))


def raises(ids: list[list[int]], values: list[float]) -> Any:
    if bad_of(ids):
        raise ValueError("the service is gone")
    return values


def exits(ids: list[list[int]], values: list[float]) -> Any:
    if bad_of(ids):
        sys.exit(0)
    return values


def exhausts(ids: list[list[int]], values: list[float]) -> Any:
    if bad_of(ids):
        raise MemoryError
    return values


def of_bad(wrong: Any) -> Callable[..., Any]:
    return lambda ids, values: [wrong if is_bad(one) else v for one, v in zip(ids, values, strict=True)]


def drops(ids: list[list[int]], values: list[float]) -> Any:
    return [v for one, v in zip(ids, values, strict=True) if not is_bad(one)]


def doubles(ids: list[list[int]], values: list[float]) -> Any:
    return [v for one, v in zip(ids, values, strict=True) for _ in range(2 if is_bad(one) else 1)]


def forgets(ids: list[list[int]], values: list[float]) -> Any:
    return None if bad_of(ids) else values


def hangs(ids: list[list[int]], values: list[float]) -> Any:
    if bad_of(ids):
        time.sleep(600)
    return values


FAULTS: dict[str, Callable[[list[list[int]], list[float]], Any]] = {
    "exception": raises,
    "exit": exits,
    "memory": exhausts,
    "nan": of_bad(float("nan")),
    "infinity": of_bad(-float("inf")),
    "text": of_bad("1.0"),
    "list": of_bad([1.0]),
    "exception returned": of_bad(KeyError("k")),
    "too short": drops,
    "too long": doubles,
    "no list": forgets,
    "hang": hangs,
}
KINDS = ["plain", "async", "in threads"]
CASES = [(name, "plain") for name in FAULTS]
CASES += [(name, kind) for name in ("exception", "nan", "too short", "hang") for kind in KINDS[1:]]


def criterion_of(fault: Callable[..., Any], kind: str, **changes: Any) -> Criterion:
    def plain(completion_ids: list[list[int]], **_: Any) -> Any:
        return fault(completion_ids, sound(completion_ids))

    async def waiting(completion_ids: list[list[int]], **_: Any) -> Any:
        if fault is hangs and bad_of(completion_ids):
            await asyncio.sleep(600)
        await asyncio.sleep(0.001)
        return plain(completion_ids)

    options = {"timeout_seconds": 0.2 if fault is hangs else 30, **changes}
    return Criterion("faulty", waiting if kind == "async" else plain, overlap=kind != "plain", **options)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_fault_excludes_what_it_hits_and_nothing_else(
    name: str, kind: str, excluded: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_MOST_TIMEOUTS", 100)  # of a rollout, after which the rest is not tried
    started = time.monotonic()
    ran = Ran(tmp_path, criterion_of(FAULTS[name], kind))
    assert time.monotonic() - started < 120, "no stall"
    ran.same_as(excluded)
    assert ran.failed == [float(sum(map(is_one, step))) for step in ran.per_step]
    for completion in (c for step in ran.per_step for c in step if is_one(c)):
        assert completion.score is not None
        assert completion.score.criteria == {"digits": digits([completion.text])[0], "faulty": None}
    told = [row["errors"] for row in ran.transcripts if row["reward"] is None]
    assert len(told) == sum(ran.failed)
    assert all(list(errors) == ["faulty"] and "'faulty' failed on prompt" in errors["faulty"] for errors in told)


def test_a_coroutine_that_blocks_the_event_loop_harms_itself_alone(
    excluded: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third criterion waits on the same loop, without a limit of its own; before, it waited for good."""
    monkeypatch.setattr(calls_module, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(calls_module, "_TICK_SECONDS", 0.02)
    release = threading.Event()

    async def blocks(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if bad_of(completion_ids):
            release.wait(5)
        await asyncio.sleep(0.05)  # while another call blocks the loop
        return sound(completion_ids)

    async def nothing(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0.05)
        return [0.0] * len(completions)

    try:
        ran = Ran(tmp_path, Criterion("faulty", blocks, timeout_seconds=0.2))
        ran.same_as(excluded)
        assert ran.failed == [float(sum(map(is_one, step))) for step in ran.per_step]
        limited, unlimited = Criterion("blocks", blocks, timeout_seconds=0.2), Criterion("waits", nothing)
        bad = next(c.token_ids for c in ran.per_step[0] if is_one(c))
        for order in ([limited, unlimited], [unlimited, limited]):
            one = group("a", "b")
            one.completions[0].token_ids = bad
            [[first, second]] = Rubric(order).score([one])
            assert first.criteria == {"blocks": None, "waits": 0.0}
            assert "blocks the event loop" in first.errors["blocks"]
            assert second.total is not None
    finally:
        release.set()


def test_a_coroutine_that_ignores_its_cancellation_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(calls_module, "_TICK_SECONDS", 0.05)
    begun: list[str] = []

    async def ignores(completions: list[str], **_: Any) -> list[float]:
        for _ in range(100):
            try:
                await asyncio.sleep(0.5)
            except asyncio.CancelledError:
                continue
        return [1.0] * len(completions)

    async def waits(completions: list[str], **_: Any) -> list[float]:
        begun.extend(completions)
        await asyncio.sleep(0.7)
        return [2.0] * len(completions)

    rubric = Rubric([Criterion("ignores", ignores, timeout_seconds=0.2), Criterion("waits", waits)])
    [[score]] = rubric.score([group("a")])
    assert "ignores that it is cancelled" in score.errors["ignores"]
    assert score.criteria["waits"] == 2.0
    assert begun == ["a"], "the loop goes on, so nothing is repeated"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_slow_but_in_time_is_kept(kind: str, faultless: Ran, tmp_path: Path) -> None:
    def slow(ids: list[list[int]], values: list[float]) -> Any:
        time.sleep(0.3 if bad_of(ids) else 0)
        return values

    ran = Ran(tmp_path, criterion_of(slow, kind, timeout_seconds=60))
    ran.same_as(faultless)
    assert ran.failed == [0.0] * STEPS


def test_a_time_limit_counts_from_the_start_of_a_call_not_from_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty calls of 0.5 s share eight threads: the last ones end after 1.5 s, which is more than the limit."""

    def slow(completions: list[str], **_: Any) -> list[float]:
        time.sleep(0.5)
        return [1.0] * len(completions)

    rubric = Rubric([Criterion("slow", slow, timeout_seconds=1.2, overlap=True)])
    scores = rubric.score([group("a", index=i) for i in range(20)])
    assert [score.total for [score] in scores] == [1.0] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_once_is_asked_again_and_kept(kind: str, faultless: Ran, tmp_path: Path) -> None:
    seen: Counter[tuple[int, ...]] = Counter()

    def flaky(ids: list[list[int]], values: list[float]) -> Any:
        new = [one for one in map(tuple, ids) if is_bad(list(one)) and not seen[one]]
        seen.update(new)
        if new:
            raise ConnectionError("try again")
        return values

    ran = Ran(tmp_path, criterion_of(flaky, kind))
    ran.same_as(faultless)
    assert ran.failed == [0.0] * STEPS
    assert seen


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pytest.importorskip("math_verify")
    made = WorkerPool(num_workers=1)
    yield made
    made.close()


def killed(monkeypatch: pytest.MonkeyPatch, doomed: Callable[[str], bool]) -> list[str]:
    """Kill a worker as soon as it has started on an answer; return the answers that it was killed on."""
    found: list[str] = []
    dead: set[int] = set()
    call, receive = pool_module._Worker.call, pool_module._Worker._receive

    def recording(self: Any, kind: str, arguments: Any, timeout_seconds: float) -> float:
        self.answer = arguments["answer"]
        return call(self, kind, arguments, timeout_seconds)

    def killing(self: Any, nonce: str, deadline: float) -> Any:
        reply = receive(self, nonce, deadline)
        while reply is not None and self.process.pid in dead:  # a result that was quicker than the signal
            reply = receive(self, nonce, deadline)
        if reply is not None and "started" in reply and doomed(self.answer):
            found.append(self.answer)
            dead.add(self.process.pid)
            os.kill(self.process.pid, signal.SIGKILL)
        return reply

    monkeypatch.setattr(pool_module._Worker, "call", recording)
    monkeypatch.setattr(pool_module._Worker, "_receive", killing)
    return found


def test_a_killed_worker_is_no_judgement(
    faultless: Ran, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right answers whose worker is killed in the middle of a run: asked again, and never 0."""
    left = Counter({"x + x": 1})

    def once(answer: str) -> bool:
        left[answer] -= 1
        return left[answer] >= 0

    found = killed(monkeypatch, once)
    verifier = math_answer(pool=pool, timeout_seconds=60)

    def graded(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> Any:
        texts = [f"<answer>{'x + x' if is_bad(ids) else '2x'}</answer>" for ids in completion_ids]
        values = verifier(prompts=prompts, completions=texts, answer=["2x"] * len(texts))
        return [v if v != 1.0 else value(ids) for v, ids in zip(values, completion_ids, strict=True)]

    ran = Ran(tmp_path, Criterion("faulty", graded, overlap=True))
    ran.same_as(faultless)
    assert ran.failed == [0.0] * STEPS
    assert found


def test_an_answer_whose_worker_is_killed_again_is_excluded(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = killed(monkeypatch, lambda answer: answer == DOOMED)
    rubric = Rubric([Criterion("math", math_answer(pool=pool, timeout_seconds=60))])
    for completion in (one := group(f"<answer>{DOOMED}</answer>", "<answer>2x</answer>")).completions:
        completion.token_ids = [1]
    one.row["answer"] = "2x"
    [scores] = rubric.score([one])
    assert [score.total for score in scores] == [None, 1.0]
    assert "the verifier process died (exit -9)" in scores[0].errors["math"]
    assert found == [DOOMED] * 2


REWARDS = """
def gone(completions, **columns):
    return [ConnectionError("the service is gone") if i else 1.0 for i in range(len(completions))]
"""


def test_the_command_line_stops_a_run_that_cannot_grade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (tmp_path / "run.toml").write_text(f"""
model = "{tmp_path / "model"}"
[data]
train = {{ path = "{tmp_path / "train.jsonl"}" }}
[[rubric]]
kind = "python"
function = "rewards.py:gone"
[training]
output_dir = "{tmp_path / "run"}"
max_steps = 9
per_device_train_batch_size = 8
num_generations = 4
max_completion_length = 8
bf16 = false
use_cpu = true
save_strategy = "no"
report_to = []
logprob_check_bound = 1.0
""")
    assert main(["grpo", str(tmp_path / "run.toml")]) == 2
    told = capsys.readouterr().err
    assert "error: rewards failed on 14 of 16 completions of the last 2 rollouts" in told
    assert "max_failed_rewards = 0.5 allows: gone 14 times, last:" in told
    assert "the service is gone" in told
