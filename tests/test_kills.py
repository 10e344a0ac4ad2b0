"""Kill runs at every file operation and at random moments: resumed, each ends as the run that nobody killed.

Final weights are equal bit for bit; metrics, transcripts, samples and evaluations have no gap and no double. The whole
suite is `make kills`; three kills are part of the fast one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kill_worker import BASE, CONFIGURATIONS, RUN, Job, Zygote

NUM_RANDOM = 5
EVERY_OPERATION = ("sft_one_checkpoint", "grpo_iterated", "ppo_lora", "pairs")
"""Rotation to 1 and 2 checkpoints, full weights and adapters, optimizer, critic, samples in flight, transcripts."""

KILLED = (-9, -14)
VOLATILE = ("time", "seconds", "runtime", "per_second", "rate", "started", "updated")
"""Parts of the names of what a clock says."""

NEEDED = (
    "checkpoint-#/model.safetensors",
    "checkpoint-#/adapter_model.safetensors",
    "checkpoint-#/optimizer.pt",
    "checkpoint-#/scheduler.pt",
    "checkpoint-#/rng_state.pth",
    "checkpoint-#/critic.pt",
    "checkpoint-#/rollout_#.json",
    "checkpoint-#/trainer.json",
    "checkpoint-#/complete",
    "os.rename checkpoint-#",
    "os.rmdir .saving/removed-checkpoint-#",
    "metrics.jsonl",
    "transcripts.jsonl",
    "samples.jsonl",
)
"""Operations that the configurations must have between them, or a kind of write would be missed."""


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """A warm process, and beside its folder of runs the start model."""
    made = Zygote(tmp_path_factory.mktemp("kills") / BASE)
    yield made
    made.close()


class Killing:
    """Runs of one configuration, and what the uninterrupted one came to."""

    def __init__(self, zygote: Zygote, start: Path, name: str) -> None:
        self.zygote, self.start, self.name = zygote, start, name
        self.number = 0
        self.whole, _ = self.finished()
        assert self.whole
        shutil.rmtree(self.folder(0))
        # Again: the first run's time is that of its imports.
        repeated, reply = self.finished()
        assert not different(self.whole, repeated)
        self.seconds: float = reply["seconds"]
        self.events: list[str] = reply["events"]

    def finished(self, *kills: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run, or go on after kills, to the end: what it came to, and the reply."""
        reply = self.zygote.run(self.job())
        assert reply["status"] == 0, f"{kills}: {self.log(self.number)}"
        return outcome(self.folder(self.number) / RUN), reply

    def folder(self, number: int) -> Path:
        return self.start.parent / f"{self.name}-{number}"

    def log(self, number: int) -> str:
        return f"{self.folder(number)}: {(self.folder(number) / 'log.txt').read_text()[-3000:]}"

    def job(self, **changes: Any) -> Job:
        return Job(self.name, str(self.folder(self.number)), **changes)

    def killed(self, *kills: dict[str, Any], before: Path | None = None) -> None:
        """Run, be killed as often as there are kills, run to the end; compare."""
        self.number += 1
        if before is not None:
            shutil.copytree(before, self.folder(self.number))
        for kill in kills:
            job = self.job(**kill)
            while (status := self.zygote.run(job)["status"]) == 0 and job.seconds is not None:
                # It was over before: again, from the start, to be killed earlier.
                shutil.rmtree(self.folder(self.number))
                job = replace(job, seconds=job.seconds / 2)
            assert status in KILLED, f"{kill}: status {status}. {self.log(self.number)}"
        resumed, _ = self.finished(*kills)
        differences = different(self.whole, resumed)
        assert not differences, f"{kills}: {differences} differ. {self.log(self.number)}"
        shutil.rmtree(self.folder(self.number))


def outcome(folder: Path) -> dict[str, Any]:
    """What a run came to: bytes of weights, records of logs, by path."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if "checkpoint-" in name:
            continue
        if file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        elif file.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in file.read_bytes().split(b"\n") if line]
        elif file.name in ("evaluations.json", "status.json") or file.parent.name == "evaluations":
            found[name] = timeless(json.loads(file.read_text()))
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(part in k for part in VOLATILE)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def different(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    found = [f"{name} in one only" for name in left.keys() ^ right.keys()]
    for name in left.keys() & right.keys():
        if left[name] == right[name]:
            continue
        detail = ""
        if name.endswith(".jsonl"):
            steps = [[record.get("step", record.get("index")) for record in side[name]] for side in (left, right)]
            detail = f" (steps {steps[0]} and {steps[1]})" if steps[0] != steps[1] else " (values)"
        found.append(name + detail)
    return found


@pytest.fixture
def killing(zygote: Zygote, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The killing of one configuration."""
    folder = tmp_path_factory.mktemp("runs")
    start = folder / BASE
    zygote_start = Path(zygote.start)
    os.symlink(zygote_start, start)
    yield Killing(zygote, start, request.param)
    shutil.rmtree(folder, ignore_errors=True)


def writes(events: list[str]) -> list[int]:
    return [i for i, line in enumerate(events) if line.startswith(("open", "save"))]


@pytest.mark.kills
@pytest.mark.parametrize("killing", CONFIGURATIONS, indirect=True)
def test_killed_at_random_moments(killing: Killing) -> None:
    draw = random.Random(killing.name)
    for number in range(NUM_RANDOM):
        # The last of them is killed twice.
        times = [draw.uniform(0, killing.seconds) for _ in range(2 if number == NUM_RANDOM - 1 else 1)]
        if killing.name in ("pairs", "pipeline"):
            killing.killed({"event": draw.randrange(len(killing.events))})
        else:
            killing.killed(*({"seconds": seconds} for seconds in times))


@pytest.mark.kills
@pytest.mark.parametrize("killing", EVERY_OPERATION, indirect=True)
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_every_file_operation(killing: Killing, torn: bool) -> None:
    """Before each operation, which is after the one before it; and in each write."""
    for event in writes(killing.events) if torn else range(len(killing.events)):
        killing.killed({"event": event, "torn": torn})


@pytest.mark.kills
@pytest.mark.parametrize("killing", EVERY_OPERATION, indirect=True)
@pytest.mark.parametrize("torn", [False, True])
def test_killed_again_while_it_resumes(killing: Killing, torn: bool) -> None:
    """At every operation of a resumed run, from a kill between two checkpoints on."""
    completed = [i for i, line in enumerate(killing.events) if "complete" in line or "samples" in line]
    first = {"event": completed[len(completed) // 2] + 3}
    killing.number += 1
    before = killing.folder(killing.number)
    assert killing.zygote.run(killing.job(**first))["status"] in KILLED
    probe = killing.folder(10_000)
    shutil.copytree(before, probe)
    reply = killing.zygote.run(Job(killing.name, str(probe)))
    assert reply["status"] == 0
    events = reply["events"]
    for event in writes(events) if torn else range(len(events)):
        killing.killed({"event": event, "torn": torn}, before=before)


@pytest.mark.kills
def test_every_kind_of_write_is_among_the_operations(zygote: Zygote, tmp_path: Path) -> None:
    os.symlink(zygote.start, tmp_path / BASE)
    events = [line for name in EVERY_OPERATION for line in Killing(zygote, tmp_path / BASE, name).events]
    assert not [kind for kind in NEEDED if not any(kind in line for line in events)]


@pytest.mark.parametrize("killing", ["grpo_lora_kl"], indirect=True)
def test_a_few_kills(killing: Killing) -> None:
    """Of the suite's kinds: in the last file of a checkpoint, before one is rotated away, in a log."""
    last = max(i for i, line in enumerate(killing.events) if "checkpoint-#/complete" in line)
    killing.killed({"event": last, "torn": killing.events[last].startswith("open")})
    rotated = next(i for i, line in enumerate(killing.events) if line.startswith("os.r") and "checkpoint-" in line)
    killing.killed({"event": rotated})
    killing.killed({"event": next(i for i, line in enumerate(killing.events) if "metrics" in line), "torn": True})
