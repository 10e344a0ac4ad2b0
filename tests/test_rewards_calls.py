"""Reward functions that end the process, hang, or take too long: each is one failed judgement with a reason."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import math_verify
import pytest

import burnish.rewards.calls as calls
from burnish import BurnishError, ConfigError, SFTConfig, SFTTrainer
from burnish.cli.main import main
from burnish.errors import RewardError
from burnish.rewards import Criterion, Rubric
from burnish.rewards.registry import rubric_from_config
from test_rewards_rubric import group
from test_trainers import PROMPTS, grpo, settings

STOPS = [SystemExit(0), SystemExit(3), GeneratorExit("g"), asyncio.CancelledError("c"), BaseException("b")]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_ends_a_process_fails_one_completion(stop: BaseException, is_async: bool) -> None:
    def plain(completions: list[str], **_: Any) -> list[float]:
        if "bad" in completions:
            raise stop
        return [1.0] * len(completions)

    async def waiting(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return plain(completions)

    rubric = Rubric([Criterion("ends", waiting if is_async else plain)])
    (scores,) = rubric.score([group("good", "bad", "fine")])
    assert [score.total for score in scores] == [1.0, None, 1.0]
    assert f"it raised {type(stop).__name__}({stop})" in scores[1].errors["ends"]
    # The loop that coroutines share has survived.
    assert rubric.score([group("good")])[0][0].total == 1.0


@pytest.mark.parametrize("is_async", [False, True])
def test_keyboard_interrupts_are_the_users(is_async: bool) -> None:
    async def waiting(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    def plain(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    rubric = Rubric([Criterion("stop", waiting if is_async else plain)])
    with pytest.raises(KeyboardInterrupt):
        rubric.score([group("a", "b")])


def sleeps(completions: list[str]) -> None:
    for text in completions:
        time.sleep(30 if text == "bad" else 0)


def loops(completions: list[str]) -> None:
    while "bad" in completions:
        pass


def backtracks(completions: list[str]) -> None:
    for text in completions:
        re.match(r"(a|a)*$", "a" * 60 + "b" if text == "bad" else "a")


def swallows(completions: list[str]) -> None:
    try:
        sleeps(completions)
    except Exception:
        return


@pytest.mark.parametrize("hang", [sleeps, loops, backtracks, swallows])
def test_a_function_over_its_time_is_interrupted_and_pinned_on_its_completion(hang: Any) -> None:
    def judged(completions: list[str], **_: Any) -> list[float]:
        hang(completions)
        return [1.0] * len(completions)

    started = time.monotonic()
    (scores,) = Rubric([Criterion("slow", judged, timeout_seconds=0.3)]).score([group("good", "bad", "fine")])
    assert time.monotonic() - started < 10
    assert [score.total for score in scores] == [1.0, None, 1.0]
    assert "it took longer than timeout_seconds = 0.3" in scores[1].errors["slow"]
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_coroutine_over_its_time_is_cancelled() -> None:
    cancelled: list[str] = []

    async def judged(completions: list[str], **_: Any) -> list[float]:
        try:
            await asyncio.sleep(30 if "bad" in completions else 0)
        except asyncio.CancelledError:
            cancelled.extend(completions)
            raise
        return [1.0] * len(completions)

    (scores,) = Rubric([Criterion("slow", judged, timeout_seconds=0.3)]).score([group("good", "bad", "fine")])
    assert [score.total for score in scores] == [1.0, None, 1.0]
    assert cancelled == ["good", "bad", "fine", "bad"]


def test_a_coroutine_that_blocks_the_loop_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_GRACE_SECONDS", 0.2)
    release = threading.Event()

    async def blocks(completions: list[str], **_: Any) -> list[float]:
        release.wait(30)
        return [1.0] * len(completions)

    async def quick(completions: list[str], **_: Any) -> list[float]:
        return [2.0] * len(completions)

    (scores,) = Rubric([Criterion("blocks", blocks, timeout_seconds=0.2)]).score([group("a")])
    assert "blocks the event loop" in scores[0].errors["blocks"]
    assert Rubric([Criterion("quick", quick)]).score([group("a")])[0][0].total == 2.0
    release.set()


def test_outside_the_main_thread_a_function_is_left_behind() -> None:
    release = threading.Event()
    found: list[str] = []

    def judged(completions: list[str], **_: Any) -> list[float]:
        release.wait(30)
        return [1.0] * len(completions)

    def run() -> None:
        rubric = Rubric([Criterion("slow", judged, isolate=False, timeout_seconds=0.2)])
        found.extend(score.errors["slow"] for score in rubric.score([group("a", "b")])[0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    release.set()
    assert len(found) == 2
    assert all("it continues in a thread, which cannot be stopped" in message for message in found)


def test_a_judge_that_always_hangs_costs_a_few_time_outs_and_no_run(tmp_path: Path) -> None:
    calls_made: list[int] = []

    def judged(completions: list[str], **_: Any) -> list[float]:
        calls_made.append(len(completions))
        time.sleep(30)
        return []

    rubric = Rubric([Criterion("hangs", judged, timeout_seconds=0.1)])
    trainer = grpo(tmp_path, rewards=rubric, max_steps=1, logprob_check_bound=1.0)
    trainer.train()
    assert calls_made == [12, 1, 1, 1]
    assert trainer.state.log_history[0]["rewards/failed"] == 12


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_hangs_says_which_criterion_and_how_long(
    is_async: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calls, "_WATCH_SECONDS", 0.2)
    monkeypatch.setattr(calls, "_TICK_SECONDS", 0.1)

    def busy(completions: list[str], **_: Any) -> list[float]:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:  # most of the time inside the regular expression, which keeps the interpreter
            re.match(r"(a|a)*$", "a" * 18 + "b")
        return [1.0] * len(completions)

    async def waiting(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(1.0)
        return [1.0] * len(completions)

    Rubric([Criterion("judge", waiting if is_async else busy)]).score([group("a", "b")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "judge" in line]
    assert (
        lines[0] == "[burnish] criterion 'judge' has run for 0:00 on 2 completions; set its timeout_seconds to give up"
    )
    assert 2 <= len(lines) <= 3  # after 0.2, 0.4 and 0.8 s


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), True, float("inf")])
def test_a_bad_time_out_is_refused(limit: Any) -> None:
    with pytest.raises(ConfigError, match=r"timeout_seconds = .* of criterion 'c'"):
        Criterion("c", sleeps, timeout_seconds=limit)


def test_any_kind_of_criterion_takes_a_time_out_from_a_file() -> None:
    rubric = rubric_from_config(
        [
            {"kind": "exact", "timeout_seconds": 5},
            {"kind": "python", "function": "math:sqrt", "timeout_seconds": 2.5},
            {"kind": "math", "timeout_seconds": 3},
        ]
    )
    # A grader has its own, for each completion.
    assert [criterion.timeout_seconds for criterion in rubric.criteria] == [5, 2.5, None]
    with pytest.raises(ConfigError, match=r"rubric\[0\]\.timeout_seconds = 'x': use a number"):
        rubric_from_config([{"kind": "exact", "timeout_seconds": "x"}])


def test_compute_metrics_and_formatting_cannot_end_the_run(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, eval_dataset=PROMPTS[:2], logprob_check_bound=1.0)
    trainer.stage.compute_metrics = lambda _: sys.exit(0)
    with pytest.raises(BurnishError, match=r"compute_metrics: it raised SystemExit\(0\)"):
        trainer.evaluate()
    with pytest.raises(BurnishError, match=r"formatting_func: it raised SystemExit\(0\)"):
        SFTTrainer(
            trainer.model, SFTConfig(**settings(tmp_path)), train_dataset=PROMPTS, processing_class=trainer.tokenizer,
            formatting_func=lambda _: sys.exit(0),
        )  # fmt: skip


def test_no_command_ends_well_because_a_module_of_the_users_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exits(*_: Any) -> None:
        sys.exit(0)

    monkeypatch.setattr("burnish.cli.train.run", exits)
    assert main(["grpo", "run.toml"]) == 2
    assert re.search(r"error: sys\.exit\(0\) in .*test_rewards_calls\.py, line \d+, ended", capsys.readouterr().err)


def test_a_reward_error_is_one() -> None:
    with pytest.raises(RewardError, match="failed on all 2 completions"):
        Rubric([Criterion("ends", lambda **_: sys.exit(0))]).score([group("a", "b")])


def in_a_thread(work: Any) -> BaseException | None:
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def alarmed(completions: list[str], **_: Any) -> list[float]:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return [1.0] * len(completions)


def verified(completions: list[str], **_: Any) -> list[float]:
    return [float(math_verify.verify(math_verify.parse("$1$"), math_verify.parse(text))) for text in completions]


async def waiting_alarmed(**arguments: Any) -> list[float]:
    return alarmed(**arguments)


@pytest.mark.parametrize("function", [alarmed, verified, waiting_alarmed])
def test_a_function_with_alarms_outside_the_main_thread_is_told_to_take_timeout_seconds(function: Any) -> None:
    rubric = Rubric([Criterion("timed", function)])
    error = in_a_thread(lambda: rubric.score([group("$1$", "$2$")]))
    assert isinstance(error, RewardError)
    assert re.search(r"'timed' failed on .*outside the main thread.*set the criterion's timeout_seconds", str(error))
    if function is not waiting_alarmed:
        assert rubric.score([group("$1$")])[0][0].total == 1.0  # in the main thread they work
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_alarms_that_disable_a_time_out_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rubric = Rubric([Criterion("clashes", alarmed, timeout_seconds=5.0), Criterion("free", alarmed)])
    for _ in range(2):
        assert rubric.score([group("a")])[0][0].total == 2.0
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "criterion 'clashes' sets alarms itself (signal.alarm, as math_verify does), which disable its "
        "timeout_seconds = 5"
    ]
