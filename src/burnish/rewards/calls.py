"""Calls of plain and async reward functions and tools, with time limits, progress messages and contained failures."""

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
from functools import partial
from typing import Any

from burnish.errors import RewardError, contained
from burnish.progress import format_seconds, say

__all__ = ["Call", "CallTimeout", "accepted", "in_thread", "parameters_of", "shared_loop"]

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 60.0
"""Seconds after which a running call is first reported; then again at each doubling."""

_TICK_SECONDS = 1.0
_GRACE_SECONDS = 2.0
"""Seconds for a coroutine to be cancelled; one that takes longer blocks the event loop."""


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function; `**arguments` where it has no signature, as some built-in ones."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {"arguments": inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)}


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function's signature names; all of them where it takes `**kwargs`."""
    parameters = parameters_of(function)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in arguments.items() if takes_all or name in parameters}


class CallTimeout(RewardError, TimeoutError):
    """Raised when a criterion or tool exceeds its `timeout_seconds`."""


class _Overdue(BaseException):
    """Deadline of a function, raised inside it; a BaseException, so that its `except Exception` does not catch it."""


@dataclass(slots=True)
class Call:
    """One call of the function of a criterion or tool.

    A plain function runs in the caller's thread. In the main thread a SIGALRM timer interrupts it at the deadline, in
    Python code, regular expressions and waits, but not inside a C library, nor if the function sets alarms itself.
    Outside the main thread a function with a limit runs in another thread, which is abandoned at the deadline, since
    threads cannot be stopped. A coroutine is cancelled.

    Attributes:
        name: name of the criterion or tool.
        size: number of completions in the call; 0 for a tool.
        timeout_seconds: time limit; None for no limit.
        kind: what has the name, for messages.
    """

    name: str
    size: int
    timeout_seconds: float | None
    kind: str = "criterion"
    _started: float = 0.0
    _future: Future[Any] | None = None
    _is_in_thread: bool = False

    def start(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Call a plain function, or start a coroutine and return.

        Raises:
            KeyboardInterrupt: it was interrupted; other errors are raised by `result`.
        """
        self._started = time.monotonic()
        self._future = future = Future()
        try:
            result = self._timed(function, arguments)
            if inspect.isawaitable(result):
                asyncio.run_coroutine_threadsafe(self._into(future, result), shared_loop())
            else:
                future.set_result(result)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            future.set_exception(self._failure(error))

    def start_in_thread(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Call a plain function in a thread of its own and return; the thread is abandoned at the deadline."""
        self._started, self._is_in_thread = time.monotonic(), True

        def run() -> Any:
            try:
                result = function(**arguments)
            except BaseException as error:
                raise self._failure(error) from error
            if self.timeout_seconds is not None and time.monotonic() - self._started > self.timeout_seconds:
                raise self._late()  # whenever the result is asked for
            return result

        self._future = in_thread(run)

    def result(self) -> Any:
        """Return the function's result; waits for a coroutine or a thread.

        Raises:
            CallTimeout: the call exceeded its limit.
            Exception: raised by the function; `sys.exit` and the like become a `RewardError`.
        """
        future = self._future
        assert future is not None
        try:
            with nullcontext() if future.done() else self._watched():
                return future.result(timeout=self._seconds_left())
        except TimeoutError as error:
            if future.done():
                raise
            if self._is_in_thread:
                raise self._late("; it continues in a thread, which cannot be stopped") from None
            _loop_of.cache_clear()  # later coroutines get a new loop
            raise self._late(", and blocks the event loop: await what takes time") from error

    @property
    def timed_out(self) -> bool:
        """True if the call was ended at its deadline."""
        future = self._future
        return future is not None and future.done() and isinstance(future.exception(), CallTimeout)

    def _seconds_left(self) -> float | None:
        if self.timeout_seconds is None:
            return None
        grace = 0.0 if self._is_in_thread else _GRACE_SECONDS
        return max(0.0, self._started + self.timeout_seconds + grace - time.monotonic())

    def _timed(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        limit = self.timeout_seconds
        with self._watched(), _alarm(min(limit or _WATCH_SECONDS, _WATCH_SECONDS), self._tick) as rings:
            if rings or limit is None:
                result = function(**arguments)
                if rings and limit is not None and not signal.getitimer(signal.ITIMER_REAL)[0]:
                    _warn_of_alarms(self.name, limit)
                return result
            future = in_thread(function, **arguments)
            try:
                return future.result(timeout=limit)
            except TimeoutError:
                if future.done():
                    raise
                raise self._late("; it continues in a thread, which cannot be stopped") from None

    def _tick(self) -> None:
        if self.timeout_seconds is not None and time.monotonic() - self._started >= self.timeout_seconds:
            raise _Overdue
        time.sleep(0.01)  # releases the GIL, so that the watching thread can print

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
        cause: BaseException | None = error
        for _ in range(10):  # other exceptions may wrap that of signal.signal
            if isinstance(cause, ValueError) and "only works in main thread" in str(cause):
                return RewardError(
                    f"{' '.join(str(error).split())[:200]}. It sets a time limit by a signal (signal.alarm), but runs "
                    "outside the main thread, as coroutines and runs started in another thread do: remove that limit "
                    "(of math_verify: parsing_timeout=None, timeout_seconds=None) and set the criterion's "
                    "timeout_seconds"
                ).with_traceback(error.__traceback__)
            cause = None if cause is None else cause.__cause__ or cause.__context__
        return contained(error, RewardError)

    def _late(self, more: str = "") -> CallTimeout:
        return CallTimeout(f"it took longer than timeout_seconds = {self.timeout_seconds:g}{more}")

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Print at growing intervals that the call is still running."""
        done = threading.Event()

        def watch() -> None:
            due = _WATCH_SECONDS
            while not done.wait(max(0.0, self._started + due - time.monotonic())):
                limit = self.timeout_seconds
                fix = "set its timeout_seconds to give up" if limit is None else f"given up after {limit:g} s"
                elapsed = format_seconds(time.monotonic() - self._started)
                work = f" on {self.size} completions" if self.size else ""
                say(f"{self.kind} {self.name!r} has run for {elapsed}{work}; {fix}")
                due *= 2

        threading.Thread(target=watch, name="burnish-watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()


@functools.cache
def _warn_of_alarms(name: str, limit: float) -> None:
    """Warn once that a function's own alarms disable its time limit."""
    logger.warning(
        "criterion %r sets alarms itself (signal.alarm, as math_verify does), which disable its timeout_seconds = %g: "
        "remove one of them (of math_verify: parsing_timeout=None, timeout_seconds=None).",
        name,
        limit,
    )


def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Start a function in a thread of its own, which does not keep the process alive."""
    future: Future[Any] = Future()
    name = getattr(function, "__name__", "call")
    threading.Thread(target=_fill, args=(future, partial(function, *args), kwargs), name=name, daemon=True).start()
    return future


def _fill(future: Future[Any], function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        future.set_result(function(**arguments))
    except BaseException as error:
        future.set_exception(error)


@contextmanager
def _alarm(seconds: float, tick: Callable[[], None]) -> Generator[bool]:
    """Call `tick` in the main thread after `seconds` and then every second.

    Yields:
        False outside the main thread and where other code uses the alarm, so that `tick` is never called.
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
    finally:  # once more, since the alarm may have interrupted the line above
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def shared_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of this process, to which clients stay bound; after a fork its thread is gone."""
    return _loop_of(os.getpid())


@functools.cache
def _loop_of(pid: int) -> asyncio.AbstractEventLoop:
    assert pid == os.getpid()
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="burnish-async-rewards", daemon=True).start()
    return loop
