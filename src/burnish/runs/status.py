"""The status of a run, in a small file that outlives the process."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from burnish.errors import CheckFailed, FileError, Interrupted
from burnish.runs.files import read_json, write_json

__all__ = ["STATUS", "RunStatus", "State", "Status", "read_status"]

STATUS = "status.json"
"""File of the status, in the folder of a run."""

State = Literal["running", "finished", "failed", "interrupted", "stopped"]
"""`stopped`: by a check (`CheckFailed`). A process that is killed leaves `running` behind, and its lock free."""

_QUIET_SECONDS = 30.0
"""Longest time for which steps are counted without being written down."""

_LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a run.

    Attributes:
        stage: kind of the run, such as "grpo" or "pipeline".
        state: see `State`.
        doing: current activity, in words.
        part: folder of a pipeline's stage that was running, inside the run's.
        step: optimizer steps taken; of a pipeline, parts begun.
        max_steps: of how many; None where the run ended before that was known.
        error: class of what ended the run.
        reason: first line of its message.
    """

    stage: str
    state: State
    doing: str
    part: str
    step: int
    max_steps: int | None
    error: str
    reason: str


class RunStatus:
    """Write the status of a run at each change.

    Args:
        folder: of the run; None in a process that does not write.
        stage: kind of the run.
    """

    def __init__(self, folder: str | Path | None, stage: str) -> None:
        self._file = None if folder is None else Path(folder) / STATUS
        self._record: dict[str, Any] = {"stage": stage, "state": None}
        self._depth = 0
        self._written = 0.0

    def begin(self, doing: str, *, step: int = 0, max_steps: int | None = None) -> None:
        """Mark the run as started; an error before that leaves the status of an earlier run.

        Raises:
            FileError: the file cannot be written.
        """
        self._record |= {"state": "running", "doing": doing, "part": "", "step": step, "max_steps": max_steps}
        self._record |= {"started": time.time(), "error": None, "reason": None}
        self._write()

    def update(self, **changes: Any) -> None:
        """Update the status of a running run; that of one that has ended is kept.

        Raises:
            FileError: the file cannot be written.
        """
        if self._record["state"] == "running":
            self._record |= changes
            self._write()

    def count(self, step: int) -> None:
        """Record a step, to be written with the next change or after 30 seconds.

        Raises:
            FileError: the file cannot be written.
        """
        if self._record["state"] == "running":
            self._record["step"] = step
            if time.monotonic() - self._written > _QUIET_SECONDS:
                self._write()

    def finish(self) -> None:
        """Mark the run as finished.

        Raises:
            FileError: the file cannot be written.
        """
        self.update(state="finished", doing="", part="")

    @contextmanager
    def recording(self) -> Generator[None]:
        """Record how the block ends; where blocks are nested, only the outermost one finishes the run.

        Raises:
            FileError: the end cannot be written.
        """
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self.finish()
        except BaseException as error:
            with suppress(FileError):  # the error itself says more
                self._fail(error)
            raise
        finally:
            self._depth -= 1

    @contextmanager
    def resumed(self, doing: str) -> Generator[None]:
        """Record work after training, such as saving; a run that failed keeps its status."""
        if self._record["state"] not in ("running", "finished"):
            yield
            return
        self._record["state"] = "running"
        self.update(doing=doing)
        with self.recording():
            yield

    def _fail(self, error: BaseException) -> None:
        state = "stopped" if isinstance(error, CheckFailed) else "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            state = "interrupted"
        if self._record["state"] == "finished":  # work after the end, such as the report
            self._record["state"] = "running"
        reason = next(iter(str(error).splitlines()), "")[:_LONGEST_REASON]
        self.update(state=state, error=type(error).__name__, reason=reason)

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._file is not None:
            write_json(self._file, {**self._record, "updated": time.time()})


def read_status(folder: Path) -> Status | None:
    """Read the status of a run; None where it has none, or one that burnish did not write.

    Raises:
        FileError: the file cannot be read, or is not JSON.
    """
    value: Any = read_json(folder / STATUS)
    record = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if record.get("state") not in get_args(State):
        return None
    return Status(
        state=record["state"],
        step=_count(record.get("step")) or 0,
        max_steps=_count(record.get("max_steps")),
        **{name: _text(record.get(name)) for name in ("stage", "doing", "part", "error", "reason")},
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
