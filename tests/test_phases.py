"""Every moment of a step belongs to one phase, and the log shows the mean over the steps since the last log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from burnish.training.phases import Phases
from test_evaluation_sets import made


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stumble(clock: Clock) -> None:
    clock.now = 2.0
    raise ZeroDivisionError


def alone(rows: Sequence[Any]) -> list[Any]:
    return list(rows)


def test_phases_of_two_steps_by_hand() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.now = 1.0
    with phases.phase("sampling"):
        clock.now = 4.0
        phases.add_tokens("sampling", 60)
        with phases.phase("rewards"):  # stays with the outer phase
            clock.now = 5.0
    phases.add_tokens("sampling", 10)
    phases.begin("update")
    clock.now = 7.0
    with phases.phase("scoring"):
        clock.now = 7.5
    clock.now = 8.0
    phases.begin("other")
    clock.now = 8.25
    assert phases.end_step() == {"sampling": 70}
    with phases.phase("evaluation"):
        clock.now = 10.25
        phases.add_tokens("sampling", 9)
    phases.begin("update")
    clock.now = 12.25
    phases.begin("other")
    assert phases.end_step() == {}
    # Two steps: 1.25 s of other, 4 of sampling, 0.5 of scoring, 2 of evaluation, 2.5 + 2 of update.
    assert phases.flush(alone) == {
        "seconds/evaluation": 1.0,
        "seconds/other": 0.625,
        "seconds/sampling": 2.0,
        "seconds/scoring": 0.25,
        "seconds/update": 2.25,
    }


def test_ranks_are_averaged_and_an_error_ends_a_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    with pytest.raises(ZeroDivisionError), phases.phase("sampling"):
        stumble(clock)
    with phases.phase("rewards"):
        clock.now = 3.0
    phases.end_step()
    other: dict[str, float] = {"sampling": 4.0}
    assert phases.flush(lambda rows: [*rows, other]) == {
        "seconds/other": 0.0, "seconds/rewards": 0.5, "seconds/sampling": 3.0,
    }  # fmt: skip


class Times(TrainerCallback):
    """Take the time at the beginning and at the end of the last step."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("SFT", {"update"}),
        ("DPO", {"update", "scoring"}),
        ("GRPO", {"sampling", "sync", "rewards", "scoring", "update"}),
        ("PPO", {"sampling", "sync", "rewards", "scoring", "update"}),
    ],
)
def test_phases_of_a_run_sum_to_its_time(kind: str, expected: set[str], tmp_path: Path) -> None:
    times = Times()
    settings: dict[str, Any] = {"beta": 0.1} if kind == "GRPO" else {}
    trainer = made(kind, tmp_path, max_steps=4, logging_steps=1, callbacks=[times], **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    phases = [{name: log[name] for name in log if name.startswith("seconds/")} for log in logs]
    assert len(phases) == 4
    for found in phases:
        names = {name.removeprefix("seconds/") for name in found}
        assert expected <= names - {"other"} <= expected | {"saving"}
        assert found["seconds/update"] > 0
    # Two callbacks take the time at either end, not quite at the same moment.
    assert sum(sum(found.values()) for found in phases) == pytest.approx(times.ended - times.began, rel=0.1, abs=0.05)
    assert {name.removeprefix("tokens/") for name in logs[0] if name.startswith("tokens/")} == set(
        trainer.stage.token_phases
    )
    assert all(log["tokens/update"] > 0 for log in logs)
