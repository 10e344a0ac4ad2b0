"""The exception tree.

Every error that a user can cause is a :class:`BurnishError` whose message names the field, the value received and the
fix. Each class also inherits the standard exception of its kind, so `except ValueError` keeps working.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "BurnishError",
    "CheckFailed",
    "ConfigError",
    "DataError",
    "EngineError",
    "FileError",
    "Interrupted",
    "MissingName",
    "ModelError",
    "RewardError",
    "contained",
    "show",
    "user_code",
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


class MissingName(BurnishError, ImportError):
    """A name that TRL exports and burnish does not."""


class EngineError(BurnishError, RuntimeError):
    """A rollout engine failed or was asked for something it cannot do."""


class FileError(BurnishError, OSError):
    """A file or folder of the run cannot be read or written."""


class Interrupted(BurnishError):
    """A signal ended training at a step boundary, after a checkpoint was saved.

    Attributes:
        signal_name: such as "SIGTERM".
        exit_status: 128 + the signal's number, as shells report a process that it ended.
        step: optimizer steps taken.
        checkpoint: folder to resume from; None where training had ended and saved none.
    """

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        self.signal_name = signal.Signals(signum).name
        self.exit_status = 128 + signum
        self.step = step
        self.checkpoint = checkpoint
        found = "no checkpoint was saved" if checkpoint is None else f"saved {checkpoint}"
        super().__init__(
            f"{self.signal_name}: stopped after step {step}, {found}; train(resume_from_checkpoint=True) continues."
        )


class CheckFailed(BurnishError, RuntimeError):
    """A run-time check against silent failure fired (sampler and trainer mismatch, NaN, stale weights...)."""


def show(value: Any, limit: int = 200) -> str:
    """Format a value for a message: its repr, cut where it is long, a description where Python refuses to make one."""
    if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to print 4,300 digits
        return f"(an integer of {value.bit_length()} bits)"
    try:
        text = repr(value)
    except Exception:  # too deep, an integer inside that is too long, or an object with a broken repr
        return f"(a {type(value).__name__} that cannot be printed)"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def contained(error: BaseException, kind: type[BurnishError] = BurnishError) -> Exception:
    """Convert an exception that would end the process, such as `SystemExit`, into an ordinary error."""
    if isinstance(error, Exception):
        return error
    return kind(f"it raised {type(error).__name__}({error}), which would end the program").with_traceback(
        error.__traceback__
    )


@contextmanager
def user_code(what: str) -> Generator[None]:
    """Run a function of the user's that may fail but must not end the run.

    Args:
        what: its name, for the message.

    Raises:
        BurnishError: it called `sys.exit()`, or raised something of that kind.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise BurnishError(f"{what}: {contained(error)}. Raise an exception instead.") from error
