"""Lines of progress, for people and logs that have no terminal."""

from __future__ import annotations

import sys

__all__ = ["format_seconds", "say"]


def say(line: str) -> None:
    """Write a line at once to standard error, so that results on standard output stay alone."""
    sys.stderr.write(f"[burnish] {line}\n")
    sys.stderr.flush()


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
