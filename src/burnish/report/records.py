"""Read a run directory leniently, so that an interrupted run still has a report.

Whatever is missing, cut or unusable becomes a sentence in `Run.notes`; nothing is dropped in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from burnish.config.paths import is_file, is_folder
from burnish.config.stages import STAGES
from burnish.errors import DataError, FileError, show
from burnish.runs.evaluations import Comparison, EvaluationSummary, Interval
from burnish.runs.files import read_json, read_lines
from burnish.runs.lock import is_locked
from burnish.runs.status import STATUS, Status, read_status

__all__ = ["MetricRow", "Run", "Transcript", "finite", "read_run"]

_OFFLINE = {kind for kind, stage in STAGES.items() if not stage.online}
"""Stages that sample nothing, so that a run of them alone has no transcripts to miss."""


@dataclass(slots=True)
class MetricRow:
    """The metrics of one step; a value is None where it was logged and is not finite."""

    stage: str
    step: int
    time: float | None
    values: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Transcript:
    """One completion with its scores."""

    stage: str
    step: int
    prompt_index: int | None
    sample: int | None
    prompt: str
    completion: str
    stop_reason: str
    num_tokens: int | None
    reward: float | None
    criteria: dict[str, float | None]
    errors: dict[str, str]
    advantage: float | None


@dataclass(slots=True)
class Run:
    """Everything a report shows."""

    path: Path
    metrics: list[MetricRow] = field(default_factory=list[MetricRow])
    transcripts: list[Transcript] = field(default_factory=list[Transcript])
    evaluations: list[EvaluationSummary] = field(default_factory=list[EvaluationSummary])
    comparisons: list[Comparison] = field(default_factory=list[Comparison])
    config: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    status: Status | None = None
    part: Status | None = None
    """Status of the current stage of an unfinished pipeline."""
    is_alive: bool | None = None
    """Whether a process runs in the folder; None if that cannot be known."""
    notes: list[str] = field(default_factory=list[str])


def finite(value: object) -> float | None:
    """`value` as a finite float, or None where it is not one (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_run(run_dir: Path) -> Run:
    """Read a run directory; files that are missing or cut become notes.

    Raises:
        DataError: `run_dir` does not exist or is not a directory.
    """
    if not is_folder(run_dir):
        what = "is a file" if is_file(run_dir) else "does not exist"
        raise DataError(
            f"run_dir = {show(str(run_dir))} {what}: pass the output directory of a run, with metrics.jsonl."
        )
    run = Run(run_dir, is_alive=is_locked(run_dir))
    run.status = _status(run, run_dir)
    if run.status is not None and run.status.part.isidentifier():
        run.part = _status(run, run_dir / run.status.part)
    run.config = _read_object(run, "config.json")
    run.environment = _read_object(run, "environment.json")
    run.metrics = _metrics(run)
    stages = {row.stage for row in run.metrics}
    if (run_dir / "transcripts.jsonl").is_file() or not stages or not stages <= _OFFLINE:
        run.transcripts = _transcripts(run)
    _evaluations(run)
    if run.metrics and run.evaluations and run.metrics[-1].stage not in {e.name for e in run.evaluations}:
        stage = run.metrics[-1].stage
        run.notes.append(f"evaluations.json: no evaluation of {stage}, the last stage that logged metrics.")
    return run


def _status(run: Run, folder: Path) -> Status | None:
    """Read the status in a folder; runs of earlier versions have none."""
    try:
        return read_status(folder)
    except (OSError, ValueError):  # a FileError is one; so is a name that is too long
        run.notes.append(f"{STATUS}: cannot be read, or not a JSON object; left out.")
        return None


def _text(value: object) -> str:
    """A JSON value as text: strings as they are, None as nothing, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)


def _integer(value: object) -> int | None:
    number = finite(value)
    return None if number is None else int(number)


def _mapping(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _items(value: object) -> list[dict[str, Any]]:
    return [_mapping(item) for item in cast("list[object]", value)] if isinstance(value, list) else []


def _read_object(run: Run, name: str) -> dict[str, Any] | None:
    value, problem = None, "cut or not a JSON object; left out"
    if not (run.path / name).is_file():
        problem = "missing"
    try:
        value = read_json(run.path / name)
    except FileError as error:
        if isinstance(error.__cause__, OSError):
            problem = f"cannot be read ({error.__cause__.strerror})"
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    run.notes.append(f"{name}: {problem}.")
    return None


def _read_steps(run: Run, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (step, record) of a JSONL file; what cannot be read or placed is counted in one note each."""
    path = run.path / name
    if not path.is_file():
        run.notes.append(f"{name}: missing.")
        return
    bad: list[int] = []
    unplaced = number = 0
    for number, (line, record) in enumerate(read_lines(path), 1):
        if record is not None:
            step = _integer(record.get("step"))
            if step is None:
                unplaced += 1
            else:
                yield step, record
        elif line.endswith(b"\n") and line.strip():
            bad.append(number)
        elif line.strip():
            run.notes.append(f"{name}: line {number}, the last, is cut and left out (the run stopped as it wrote).")
    if bad:
        run.notes.append(f"{name}: {len(bad)} lines are not JSON objects and are left out; the first is line {bad[0]}.")
    if unplaced:
        run.notes.append(f"{name}: {unplaced} lines have no step and are left out.")
    if not number:
        run.notes.append(f"{name}: empty.")


def _metrics(run: Run) -> list[MetricRow]:
    """Rows in the order of stages and steps; lines of the same step are merged, the later value wins."""
    rows: dict[tuple[str, int], MetricRow] = {}
    stages: dict[str, None] = {}
    not_finite: dict[str, int] = {}
    for step, line in _read_steps(run, "metrics.jsonl"):
        stage = _text(line.get("stage")) or "train"
        stages.setdefault(stage)
        row = rows.setdefault((stage, step), MetricRow(stage, step, None, {}))
        row.time = finite(line.get("time")) or row.time
        for name, value in line.items():
            if name in ("stage", "step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            row.values[name] = finite(value)
            if row.values[name] is None:
                not_finite.setdefault(f"{name} of {stage}", step)
    for name, step in not_finite.items():
        run.notes.append(f"metrics.jsonl: {name} is not finite (NaN or infinite), first at step {step}.")
    order = {stage: place for place, stage in enumerate(stages)}
    return sorted(rows.values(), key=lambda row: (order[row.stage], row.step))


def _transcripts(run: Run) -> list[Transcript]:
    return [
        Transcript(
            stage=_text(line.get("stage")) or "train",
            step=step,
            prompt_index=_integer(line.get("prompt_index")),
            sample=_integer(line.get("sample")),
            prompt=_text(line.get("prompt")),
            completion=_text(line.get("completion")),
            stop_reason=_text(line.get("stop_reason")),
            num_tokens=_integer(line.get("num_tokens")),
            reward=finite(line.get("reward")),
            criteria={name: finite(value) for name, value in _mapping(line.get("criteria")).items()},
            errors={name: _text(message) for name, message in _mapping(line.get("errors")).items()},
            advantage=finite(line.get("advantage")),
        )
        for step, line in _read_steps(run, "transcripts.jsonl")
    ]


def _interval(value: object) -> Interval | None:
    record = _mapping(value)
    mean = finite(record.get("mean"))
    return None if mean is None else Interval(mean, finite(record.get("low")), finite(record.get("high")))


def _intervals(value: object) -> dict[str, Interval]:
    found = {name: _interval(record) for name, record in _mapping(value).items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def _evaluations(run: Run) -> None:
    record = _read_object(run, "evaluations.json")
    if record is None:
        return
    for item in _items(record.get("evaluations")):
        passes = {int(k): v for k, v in _intervals(item.get("pass_at_k")).items() if k.isdecimal()}
        run.evaluations.append(
            EvaluationSummary(
                name=_text(item.get("name")) or "unnamed",
                num_problems=_integer(item.get("num_problems")),
                num_samples=_integer(item.get("num_samples")),
                pass_at_k=dict(sorted(passes.items())),
                criteria=_intervals(item.get("criteria")),
                mean_tokens=finite(item.get("mean_tokens")),
                truncated_fraction=finite(item.get("truncated_fraction")),
            )
        )
    for item in _items(record.get("comparisons")):
        difference = _interval(item)
        if difference is not None:
            before, after, metric = (_text(item.get(name)) for name in ("before", "after", "metric"))
            run.comparisons.append(Comparison(before, after, metric.replace("pass_at_", "pass@"), difference))
    if not run.evaluations:
        run.notes.append("evaluations.json: holds no evaluation.")
