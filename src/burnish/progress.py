"""Report messages, phases and progress in a terminal, a notebook or a log."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

__all__ = ["Progress", "format_seconds", "phase", "say"]

_LINE_SECONDS = 20.0
"""Shortest time between two lines where there is no bar."""

_SHORT_SECONDS = 0.1
"""A phase that took less is not worth a line."""


def say(line: str) -> None:
    """Write a line at once to standard error, so that results on standard output stay alone."""
    sys.stderr.write(f"[burnish] {line}\n")
    sys.stderr.flush()


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def phase(title: str) -> Generator[None]:
    """Report how long a block took, `loading MODEL ... 12 s`; a terminal shows it while it runs."""
    console = _live_console()
    started = time.monotonic()
    with nullcontext() if console is None else console.status(f"{title} ..."):
        yield
    seconds = time.monotonic() - started
    if seconds >= _SHORT_SECONDS and _is_main():
        say(f"{title} ... {seconds:.0f} s" if seconds >= 10 else f"{title} ... {seconds:.1f} s")


class Progress:
    """Counted work and the time left: a bar in terminals and notebooks, a line now and then elsewhere.

    The time left follows the work of this process only, so it is right after a resume.

    Args:
        title: of the work.
        total: when it is done.
        completed: done before, by an earlier process.
    """

    def __init__(self, title: str, total: int, *, completed: int = 0) -> None:
        self._title, self._total, self._first = title, total, completed
        self._started = self._said = time.monotonic()
        self._note = ""
        self._bar: Any = None
        if (console := _live_console()) is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TextColumn("left {task.fields[left]}  {task.fields[note]}"), console=console)
            self._bar.add_task(title, total=total, completed=completed, left="?", note="")
            self._bar.start()
            # An error may end the process inside a run: the terminal's cursor comes back.
            atexit.register(self._bar.stop)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def update(self, completed: int, note: str | None = None, *, now: bool = False) -> None:
        """Advance.

        Args:
            completed: how much is done in all.
            note: what stands after the time left from now on.
            now: write a line even if the last one is not long ago.
        """
        self._note = self._note if note is None else note
        elapsed, done = time.monotonic() - self._started, completed - self._first
        left = format_seconds(elapsed / done * (self._total - completed)) if done else "?"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=completed, left=left, note=self._note)
        elif _is_main() and (now or time.monotonic() - self._said >= _LINE_SECONDS):
            self._said = time.monotonic()
            say(f"{self._title} {completed}/{self._total}  left {left}  {self._note}".rstrip())

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            atexit.unregister(self._bar.stop)


def _is_main() -> bool:
    """Return whether this rank writes."""
    return os.environ.get("RANK", "0") == "0"


@cache
def _console() -> Any:
    """Return the one console of the process: what is shown on it while a bar runs stands below the bar."""
    from rich.console import Console

    return Console(stderr=True)


def _live_console() -> Any:
    """Return a console that can redraw lines; None in logs, notebooks without widgets and on other ranks."""
    if not _is_main() or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    console = _console()
    redraws = console.is_interactive or (console.is_jupyter and find_spec("ipywidgets") is not None)
    return console if redraws else None
