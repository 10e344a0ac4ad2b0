"""The child process of the verifier pool: it runs graders that may hang or take the process down.

Protocol, one JSON object a line. In: `{"kind", "arguments", "watchdog_seconds"}`. Out: `{"started": true}` once imports
and set-up are done, then `{"value": x}`; or `{"error": message}` in place of either.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any, cast

__all__ = ["KINDS", "main", "prepare"]

_MEMORY_LIMIT_BYTES = 4 << 30
# These compare boards of tuples, which JSON gives back as lists: their gold answers would score 0.05.
_TUPLE_TASKS = frozenset({"arc_agi", "rearc"})


def _latex_forms(text: str) -> str:
    """Wrap bare mathematics so that the LaTeX parser sees it; plain-text functions are spelled its way."""
    if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text:
        return text
    if "\\" not in text:
        text = re.sub(r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
        text = re.sub(r"\bpi\b", r"\\pi ", text).replace("**", "^").replace("*", r" \cdot ")
    return f"${text}$"


@functools.cache
def _math_verify() -> Any:
    # Imported by name: the package ships no types. The first use builds grammar tables, which is no call's own work.
    module: Any = importlib.import_module("math_verify")
    sides = [module.parse(text, parsing_timeout=None) for text in ("$2x+1$", "$x+1+x$")]
    module.verify(*sides, timeout_seconds=None)
    return module


def _prepare_math(gold: str, answer: str) -> Callable[[], float]:
    math_verify = _math_verify()

    def work() -> float:
        # No time-outs of its own: they rest on signal.alarm. The parent kills this process instead.
        gold_parsed = math_verify.parse(_latex_forms(gold), parsing_timeout=None)
        if not gold_parsed:
            raise ValueError(f"the gold answer {gold!r} cannot be read as mathematics")
        answer_parsed = math_verify.parse(_latex_forms(answer), parsing_timeout=None)
        return float(bool(math_verify.verify(gold_parsed, answer_parsed, timeout_seconds=None)))

    return work


@functools.cache
def _gym_dataset(task: str, config: str) -> Any:
    factory: Any = importlib.import_module("reasoning_gym.factory")
    importlib.import_module("reasoning_gym")
    return factory.create_dataset(task, **json.loads(config))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in cast("dict[str, Any]", value).items()}
    return tuple(_tuples(item) for item in cast("list[Any]", value)) if isinstance(value, list) else value


def _prepare_gym(task: str, config: str, entry: str, answer: str) -> Callable[[], float]:
    dataset = _gym_dataset(task, config)
    parsed: dict[str, Any] = json.loads(entry)
    if task in _TUPLE_TASKS:
        parsed = _tuples(parsed)
    return lambda: float(dataset.score_answer(answer, parsed))


KINDS: dict[str, Callable[..., Callable[[], float]]] = {
    "gym": _prepare_gym,
    "math": _prepare_math,
}
"""Graders by name: each takes its arguments, does what is slow but bounded, and returns the work that is timed."""


def prepare(kind: str, arguments: dict[str, Any]) -> Callable[[], float]:
    """Import and set up what a call needs, so that only the work itself is timed."""
    return KINDS[kind](**arguments)


def _limit_memory() -> None:
    # Best effort: Windows has no such limit and macOS may refuse it; the time-out holds everywhere.
    with contextlib.suppress(ImportError, OSError, ValueError):
        resource: Any = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))


def main() -> None:
    """Serve calls from standard input until it closes."""
    logging.disable(logging.WARNING)
    _limit_memory()
    # Whatever a library prints must not mix with the protocol.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            work = prepare(request["kind"], request["arguments"])
            reply({"started": True})
            # The parent kills a call that is too slow; should the parent be gone, this ends the process.
            faulthandler.dump_traceback_later(request["watchdog_seconds"], exit=True)
            value = work()
            faulthandler.cancel_dump_traceback_later()
            reply({"value": value})
        except Exception as error:
            faulthandler.cancel_dump_traceback_later()
            reply({"error": f"{type(error).__name__}: {error}"[:2000]})


if __name__ == "__main__":
    main()
