"""The exception tree.

Every error that a user can cause is a :class:`BurnishError` whose message names the field, the value received and the
fix. Each class also inherits the standard exception of its kind, so `except ValueError` keeps working.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BurnishError",
    "CheckFailed",
    "ConfigError",
    "DataError",
    "EngineError",
    "FileError",
    "ModelError",
    "RewardError",
    "show",
]

_LONGEST_MESSAGE = 2000


class BurnishError(Exception):
    """Base of every error that burnish raises on purpose."""

    def __str__(self) -> str:
        """The message, without the middle of a very long one: it begins with the field and ends with the fix."""
        text = super().__str__()
        if len(text) <= _LONGEST_MESSAGE:
            return text
        half = _LONGEST_MESSAGE // 2
        return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


class ConfigError(BurnishError, ValueError):
    """A configuration field is unknown, has a bad value, or contradicts another field."""


class DataError(BurnishError, ValueError):
    """A data set or one of its rows cannot be turned into a prompt and its completions."""


class ModelError(BurnishError, ValueError):
    """A model cannot be loaded, or cannot serve what was asked of it."""


class RewardError(BurnishError, ValueError):
    """A reward function is unusable (a failure on one completion is data, not an error)."""


class EngineError(BurnishError, RuntimeError):
    """A rollout engine failed or was asked for something it cannot do."""


class FileError(BurnishError, OSError):
    """A file or folder of the run cannot be read or written."""


class CheckFailed(BurnishError, RuntimeError):
    """A run-time check against silent failure fired (sampler and trainer apart, NaN, stale weights...)."""


def show(value: Any, limit: int = 200) -> str:
    """Format a value for a message: its repr, cut where it is long, a description where Python refuses to make one."""
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to print 4,300 digits
        return f"(an integer of {value.bit_length()} bits)"
    try:
        text = repr(value)
    except Exception:  # too deep, an integer inside that is too long, or an object with a broken repr
        return f"(a {type(value).__name__} that cannot be printed)"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
