"""Child process of the verifier pool, which runs graders that may hang or crash.

Protocol, one JSON object per line. In: `{"kind", "arguments", "watchdog_seconds", "nonce"}`. Out: `{"started": true}`
once imports and set-up are done, then `{"value": x}`; or `{"error": message}` instead of either, with `is_of_answer` if
the answer caused it. Each reply repeats the
nonce of its request, so that lines written to the channel by other code are rejected.
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
from typing import Any

from burnish.rewards.formulas import stop_sympy_evaluating
from burnish.rewards.grading import is_correct
from burnish.rewards.guard import Guard
from burnish.rewards.gym_tasks import prepare_gym

__all__ = ["KINDS", "main"]

_MEMORY_LIMIT_BYTES = 4 << 30
_FILE_LIMIT_BYTES = 16 << 20


def _latex_forms(text: str) -> str:
    """Wrap bare mathematics for the LaTeX parser and convert plain-text functions to LaTeX."""
    if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text:
        return text
    if "\\" not in text:
        text = re.sub(r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
        text = re.sub(r"\bpi\b", r"\\pi ", text).replace("**", "^").replace("*", r" \cdot ")
    return f"${text}$"


@functools.cache
def _math_verify() -> Any:
    stop_sympy_evaluating()
    # Imported by name, since the package ships no types. Warm up here: grammar tables are built on first use.
    module: Any = importlib.import_module("math_verify")
    sides = [module.parse(text, parsing_timeout=None) for text in ("$2x+1$", "$x+1+x$")]
    module.verify(*sides, timeout_seconds=None)
    return module


def _prepare_math(gold: str, answer: str) -> Callable[[], float]:
    math_verify = _math_verify()

    # math-verify's own time-outs use signal.alarm; the parent kills this process instead.
    def parse(text: str) -> list[Any]:
        return math_verify.parse(_latex_forms(text), parsing_timeout=None)

    def verify(gold_parsed: list[Any], answer_parsed: list[Any]) -> bool:
        return bool(math_verify.verify(gold_parsed, answer_parsed, timeout_seconds=None))

    return lambda: float(is_correct(gold, answer, parse, verify))


KINDS: dict[str, Callable[..., Callable[[], float]]] = {
    "gym": prepare_gym,
    "math": _prepare_math,
}
"""Grader name -> function that does slow but bounded set-up and returns the timed work."""


def main() -> None:
    """Serve calls from standard input until it closes."""
    logging.disable(logging.WARNING)
    # Best effort: macOS may refuse a limit on memory; the time-out holds everywhere.
    resource: Any = importlib.import_module("resource")
    for name, limit in (("RLIMIT_AS", _MEMORY_LIMIT_BYTES), ("RLIMIT_FSIZE", _FILE_LIMIT_BYTES), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.dont_write_bytecode = True
    # Move the channel off the standard streams, which libraries read and print to and children inherit.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    guard = Guard()
    for line in requests:
        _serve(json.loads(line), guard, lambda message: print(json.dumps(message), file=replies, flush=True))


def _serve(request: dict[str, Any], guard: Guard, reply: Callable[[dict[str, Any]], None]) -> None:
    nonce = {"nonce": request["nonce"]}
    guard.refused, is_working = None, False
    try:
        work = KINDS[request["kind"]](**request["arguments"])
        reply(nonce | {"started": True})
        # The parent kills slow calls; this ends the process if the parent is gone.
        faulthandler.dump_traceback_later(request["watchdog_seconds"], exit=True)
        guard.armed = is_working = True
        try:
            value = work()
        finally:
            guard.armed = False
            faulthandler.cancel_dump_traceback_later()
        if guard.refused is not None:
            raise PermissionError(
                f"the grader tried to do what the graded text may have asked for ({guard.refused}): it was refused"
            )
        reply(nonce | {"value": value})
    except Exception as error:
        is_of_answer = is_working and (guard.refused is not None or isinstance(error, MemoryError | RecursionError))
        reply(nonce | {"error": f"{type(error).__name__}: {error}"[:2000], "is_of_answer": is_of_answer})


if __name__ == "__main__":
    main()
