"""Calls of reward functions, plain and async: timed, watched, and unable to end the process or to hang in silence."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from burnish.errors import RewardError, contained
from burnish.progress import format_seconds, say

__all__ = ["Call", "CallTimeout"]

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 60.0
"""When a call that still runs is first mentioned; then again at each doubling."""

_TICK_SECONDS = 1.0
_GRACE_SECONDS = 2.0
"""How long a coroutine may take to be cancelled; one that takes longer blocks the event loop."""


class CallTimeout(RewardError, TimeoutError):
    """A criterion took longer than its `timeout_seconds`."""


class _Overdue(BaseException):
    """Raised inside a function at its deadline; no `except Exception` of its own takes it for a failure of the task."""


@dataclass(slots=True)
class Call:
    """One call of a criterion's function.

    A plain function runs here, in the caller's thread. In the main thread its deadline is an alarm of the operating
    system, which interrupts Python code, regular expressions and waiting alike; not what a C library computes, nor
    functions that set alarms of their own. Elsewhere it runs in a thread that is left behind at the deadline, since no
    thread can be stopped. A coroutine is cancelled.

    Attributes:
        name: of the criterion.
        size: completions of the call.
        timeout_seconds: most seconds it may take; None for no limit.
    """

    name: str
    size: int
    timeout_seconds: float | None
    _started: float = 0.0
    _future: Future[Any] | None = None

    def start(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Call a plain function, or start a coroutine and return.

        Raises:
            KeyboardInterrupt: it was interrupted; nothing else.
        """
        self._started = time.monotonic()
        self._future = future = Future()
        try:
            result = self._timed(function, arguments)
            if inspect.isawaitable(result):
                asyncio.run_coroutine_threadsafe(self._into(future, result), _loop(os.getpid()))
            else:
                future.set_result(result)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            future.set_exception(self._failure(error))

    def result(self) -> Any:
        """What the function returned; waits for a coroutine.

        Raises:
            CallTimeout: it took too long.
            Exception: what it raised; what would have ended the process (`sys.exit`) as a `RewardError`.
        """
        future = self._future
        assert future is not None
        try:
            with nullcontext() if future.done() else self._watched():
                return future.result(timeout=self._seconds_left())
        except TimeoutError as error:
            if future.done():
                raise
            _loop.cache_clear()  # the next coroutines get a loop that is not blocked
            raise self._late(", and blocks the event loop: await what takes time") from error

    @property
    def timed_out(self) -> bool:
        """Whether the call has ended at its deadline."""
        future = self._future
        return future is not None and future.done() and isinstance(future.exception(), CallTimeout)

    def _seconds_left(self) -> float | None:
        if self.timeout_seconds is None:
            return None
        return max(0.0, self._started + self.timeout_seconds + _GRACE_SECONDS - time.monotonic())

    def _timed(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        limit = self.timeout_seconds
        with self._watched(), _alarm(min(limit or _WATCH_SECONDS, _WATCH_SECONDS), self._tick) as rings:
            if rings or limit is None:
                result = function(**arguments)
                if rings and limit is not None and not signal.getitimer(signal.ITIMER_REAL)[0]:
                    _say_that_alarms_clash(self.name, limit)
                return result
            future: Future[Any] = Future()
            thread = threading.Thread(target=_fill, args=(future, function, arguments), name=self.name, daemon=True)
            thread.start()
            try:
                return future.result(timeout=limit)
            except TimeoutError:
                if future.done():
                    raise
                raise self._late("; it goes on in a thread, which cannot be stopped") from None

    def _tick(self) -> None:
        if self.timeout_seconds is not None and time.monotonic() - self._started >= self.timeout_seconds:
            raise _Overdue
        time.sleep(0.01)  # lets the watching thread speak while the function keeps the interpreter to itself

    async def _into(self, future: Future[Any], awaitable: Awaitable[Any]) -> None:
        limit = asyncio.timeout(self.timeout_seconds)
        try:
            async with limit:
                result = await awaitable
        except KeyboardInterrupt as error:  # raised again where the result is asked for; here it would end the loop
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(self._late() if limit.expired() else self._failure(error))
        else:
            future.set_result(result)

    def _failure(self, error: BaseException) -> Exception:
        if isinstance(error, _Overdue):
            return self._late()
        return _without_signals(error) if _lacks_signals(error) else contained(error, RewardError)

    def _late(self, more: str = "") -> CallTimeout:
        return CallTimeout(f"it took longer than timeout_seconds = {self.timeout_seconds:g}{more}")

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Say now and then that the call still runs."""
        done = threading.Event()

        def watch() -> None:
            due = _WATCH_SECONDS
            while not done.wait(max(0.0, self._started + due - time.monotonic())):
                limit = self.timeout_seconds
                fix = "set its timeout_seconds to give up" if limit is None else f"given up after {limit:g} s"
                elapsed = format_seconds(time.monotonic() - self._started)
                say(f"criterion {self.name!r} has run for {elapsed} on {self.size} completions; {fix}")
                due *= 2

        threading.Thread(target=watch, name="burnish-watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def _lacks_signals(error: BaseException | None) -> bool:
    """Whether a function failed because it sets a signal handler outside the main thread; others may wrap that."""
    for _ in range(10):
        if isinstance(error, ValueError) and "only works in main thread" in str(error):
            return True
        error = None if error is None else error.__cause__ or error.__context__
    return False


def _without_signals(error: BaseException) -> RewardError:
    return RewardError(
        f"{' '.join(str(error).split())[:200]}. It sets a time limit by a signal (signal.alarm), and runs outside the "
        "main thread, as coroutines and everything in a run that was not started in the main thread do: remove that "
        "limit (of math_verify: parsing_timeout=None, timeout_seconds=None) and set the criterion's timeout_seconds"
    ).with_traceback(error.__traceback__)


@functools.cache
def _say_that_alarms_clash(name: str, limit: float) -> None:
    """Warn, once, of a limit that does not hold."""
    logger.warning(
        "criterion %r sets alarms of its own (signal.alarm, as math_verify does), which switch its timeout_seconds = "
        "%g off: remove one of them (of math_verify: parsing_timeout=None, timeout_seconds=None).",
        name,
        limit,
    )


def _fill(future: Future[Any], function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        future.set_result(function(**arguments))
    except BaseException as error:
        future.set_exception(error)


@contextmanager
def _alarm(seconds: float, tick: Callable[[], None]) -> Generator[bool]:
    """Call `tick` in the main thread after so many seconds and every second from then on.

    Yields:
        Whether it can: not outside the main thread, nor where somebody else uses the alarm.
    """
    free = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not free or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield False
        return
    signal.signal(signal.SIGALRM, lambda *_: tick())
    signal.setitimer(signal.ITIMER_REAL, seconds, _TICK_SECONDS)
    try:
        try:
            yield True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # once more, since it may have rung just before the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@functools.cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """One event loop for the life of a process (a fork has no thread to run it): clients stay bound to it."""
    assert pid == os.getpid()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="burnish-async-rewards", daemon=True).start()
    return loop
