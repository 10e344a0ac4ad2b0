"""Failures that an answer causes, as opposed to those of the machine, and what they score."""

from __future__ import annotations

from burnish.errors import ConfigError, RewardError

__all__ = ["AnswerFailure", "AnswerTimeout", "check_failures", "judged"]

_CHOICES = ("zero", "exclude")


class AnswerFailure(RewardError):
    """Grading failed on an answer because of the answer: it crashed the grader, exhausted its memory or attacked it."""


class AnswerTimeout(AnswerFailure, TimeoutError):
    """Grading an answer exceeded the time limit."""


def check_failures(kind: str, failures: str) -> None:
    """Check the option `failures` of a verifier.

    Raises:
        ConfigError: an unknown choice.
    """
    if failures not in _CHOICES:
        raise ConfigError(f"failures = {failures!r} of {kind}: use zero or exclude.")


def judged(value: float | Exception, failures: str) -> float | Exception:
    """Score a failure caused by an answer 0 if `failures` is "zero"; keep every other value."""
    return 0.0 if failures == "zero" and isinstance(value, AnswerFailure) else value
