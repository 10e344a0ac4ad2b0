"""Describe in words the state of a run, from its status, lock and checkpoints."""

from __future__ import annotations

from burnish.report.records import Run
from burnish.runs.checkpoints import checkpoints_in
from burnish.runs.status import Status

__all__ = ["ending", "standing"]

_STATES = {
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "interrupted": "Interrupted",
    "stopped": "Stopped by a check",
}

_SAID = {"failed": "failed", "interrupted": "was interrupted", "stopped": "was stopped by a check"}


def standing(run: Run) -> str | None:
    """Return state and step of a run in a few words; None without a status."""
    status = run.status
    if status is None:
        return None
    if status.state == "finished":
        return _STATES["finished"]
    return f"{'Killed' if _is_killed(run, status) else _STATES[status.state]}, {_step(run, status)}"


def ending(run: Run) -> list[str]:
    """Explain why a run ended early and how to continue it; empty for one that is finished or running."""
    status = run.status
    if status is None or status.state == "finished":
        return []
    killed = _is_killed(run, status)
    if status.state == "running" and not killed:
        return []
    what = "was killed" if killed else _SAID[status.state]
    why = f" ({status.error}: {status.reason})" if status.error else ""
    where = f" while {status.doing}" if status.doing else ""
    return [f"{status.stage or 'this run'}: {what} at {_step(run, status)}{where}{why}. {_resume(run, status)}"]


def _is_killed(run: Run, status: Status) -> bool:
    return status.state == "running" and run.is_alive is False


def _step(run: Run, status: Status) -> str:
    """Return `step S of M`; metrics may be newer than the status."""
    if status.stage == "pipeline":
        part, stage = run.part, _of("stage", status.step, status.max_steps)
        if part is not None and part.state != "finished" and part.stage != "pipeline":
            return f"{stage}, its {_step(run, part)}"
        return stage
    step = status.step
    if status.max_steps is not None:
        logged = [row.step for row in run.metrics if row.stage == status.stage and row.step <= status.max_steps]
        step = max([step, *logged])
    return _of("step", step, status.max_steps)


def _of(unit: str, count: int, limit: int | None) -> str:
    return f"{unit} {count:,}" + ("" if limit is None else f" of {limit:,}")


def _resume(run: Run, status: Status) -> str:
    if status.stage == "pipeline":
        return "Repeat the command to continue; finished work is not repeated."
    if not checkpoints_in(run.path):
        return "It has saved no checkpoint: start it again."
    first = "Fix what the check names, then resume" if status.state == "stopped" else "Resume"
    return (
        f"{first} with resume_from_checkpoint = true (--training.resume_from_checkpoint=true), from "
        f"{checkpoints_in(run.path)[0].name}."
    )
