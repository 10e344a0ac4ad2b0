"""Calls of plain and async reward functions and tools, with time limits, progress messages and contained failures."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from burnish.errors import RewardError, contained
from burnish.progress import format_seconds, say

__all__ = ["Call", "CallTimeout", "accepted", "in_thread", "parameters_of", "shared_loop"]

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 60.0
"""Seconds after which a running call is first reported; then again at each doubling."""

_TICK_SECONDS = 1.0
_GRACE_SECONDS = 2.0
"""Seconds for a coroutine to be cancelled; one that takes longer ignores that, or blocks the event loop."""
_NUM_THREADS = 8
"""Threads of calls that do not block their caller."""


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


@dataclass(slots=True, eq=False)
class Call:
    """One call of the function of a criterion or tool.

    A plain function runs in the caller's thread. In the main thread a SIGALRM timer interrupts it at the deadline, in
    Python code, regular expressions and waits, but not inside a C library, nor if the function sets alarms itself.
    Outside the main thread a function with a limit runs in another thread, which is abandoned at the deadline, since
    threads cannot be stopped. A coroutine is cancelled. If another call's coroutine blocks the event loop beyond that
    call's limit, this one is repeated in a new loop.

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
    _started: float | None = None
    """Time when the function began to run; None while it waits for a thread or the event loop."""
    _future: Future[Any] = field(default_factory=Future[Any])
    _work: Callable[[], Any] | None = None
    _home: asyncio.AbstractEventLoop | None = None
    _in_thread: bool = False

    def start(self, function: Callable[..., Any], arguments: Mapping[str, Any], *, in_thread: bool = False) -> None:
        """Call a plain function, or start a coroutine and return.

        Args:
            function: the criterion's.
            arguments: by keyword.
            in_thread: call a plain function in another thread, and return.

        Raises:
            KeyboardInterrupt: it was interrupted; other errors are raised by `result`.
        """
        self._work, self._in_thread = functools.partial(function, **arguments), in_thread
        if in_thread:
            with _LOCK:
                jobs = _jobs(os.getpid())
            jobs.put(self._begin)
            return
        self._begin()
        if self._future.done() and isinstance(error := self._future.exception(), KeyboardInterrupt):
            raise error

    def start_in_thread(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Call a plain function in a thread of its own, and return."""
        self._work, self._in_thread = functools.partial(function, **arguments), True
        in_thread(self._begin)

    def _begin(self) -> None:
        assert self._work is not None
        future, self._started = self._future, time.monotonic()
        try:
            result = self._timed(self._work)
            if inspect.isawaitable(result):
                self._started, self._home = None, shared_loop()
                asyncio.run_coroutine_threadsafe(self._into(future, result), self._home)
            else:
                future.set_result(result)
        except KeyboardInterrupt as error:  # raised again where the result is asked for; here it would end a thread
            future.set_exception(error)
        except BaseException as error:
            future.set_exception(self._failure(error))

    def result(self) -> Any:
        """Return the function's result; waits for a coroutine or a thread.

        Raises:
            CallTimeout: the call exceeded its limit.
            Exception: raised by the function; `sys.exit` and the like become a `RewardError`.
        """
        with nullcontext() if self._future.done() else self._watched():
            while True:
                try:
                    return self._future.result(timeout=_TICK_SECONDS)
                except TimeoutError:
                    if self._future.done():
                        raise
                    self._check_loop()

    def _check_loop(self) -> None:
        """Give up a coroutine that does not end at its limit, and a loop that it blocks; repeat what that loop held."""
        home = self._home
        if home is None:
            return
        if home is not shared_loop():
            self._home, self._future = None, Future()
            self._begin()
            return
        task = asyncio.current_task(home)
        # Whoever runs now keeps the others waiting.
        late = self if task is None else _owners.get(task, self)
        if late.timeout_seconds is None or late._started is None:
            return
        if time.monotonic() - late._started < late.timeout_seconds + _GRACE_SECONDS:
            return
        why = ", and ignores that it is cancelled"
        if task is not None:
            _loops.pop((os.getpid(), "rewards"), None)  # later coroutines get a new loop
            why = ", and blocks the event loop: await what takes time"
        with suppress(InvalidStateError):  # it has ended just now
            late._future.set_exception(late._late(why))

    @property
    def timed_out(self) -> bool:
        """True if the call was ended at its deadline."""
        return self._future.done() and isinstance(self._future.exception(), CallTimeout)

    def _timed(self, work: Callable[[], Any]) -> Any:
        limit, watch = self.timeout_seconds, nullcontext() if self._in_thread else self._watched()
        with watch, _alarm(min(limit or _WATCH_SECONDS, _WATCH_SECONDS), self._tick) as rings:
            if rings or limit is None:
                result = work()
                if rings and limit is not None and not signal.getitimer(signal.ITIMER_REAL)[0]:
                    _warn_of_alarms(self.name, limit)
                return result
            future = in_thread(work)
            try:
                return future.result(timeout=limit)
            except TimeoutError:
                if future.done():
                    raise
                raise self._late("; it continues in a thread, which cannot be stopped") from None

    def _tick(self) -> None:
        assert self._started is not None
        if self.timeout_seconds is not None and time.monotonic() - self._started >= self.timeout_seconds:
            raise _Overdue
        time.sleep(0.01)  # releases the GIL, so that the watching thread can print

    async def _into(self, future: Future[Any], awaitable: Awaitable[Any]) -> None:
        if future is not self._future:  # repeated in another loop before it began in this one
            if inspect.iscoroutine(awaitable):
                awaitable.close()
            return
        self._started = time.monotonic()
        _current.set(self)
        _owners[asyncio.current_task()] = self
        limit = asyncio.timeout(self.timeout_seconds)
        with suppress(InvalidStateError):  # it was given up
            try:
                async with limit:
                    result = await awaitable
            except KeyboardInterrupt as error:
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
        done, asked = threading.Event(), time.monotonic()

        def watch() -> None:
            due = _WATCH_SECONDS
            while not done.wait(max(0.0, (self._started or asked) + due - time.monotonic())):
                limit = self.timeout_seconds
                fix = "set its timeout_seconds to give up" if limit is None else f"given up after {limit:g} s"
                elapsed = format_seconds(time.monotonic() - (self._started or asked))
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
    future.set_running_or_notify_cancel()  # whoever waits may give up; the function goes on
    work = functools.partial(function, *args, **kwargs)
    threading.Thread(target=_fill, args=(future, work), name="burnish-call", daemon=True).start()
    return future


def _fill(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
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


def shared_loop(purpose: str = "rewards") -> asyncio.AbstractEventLoop:
    """Return the event loop of this process for a purpose, to which clients stay bound.

    Rewards have one of their own, which is given up where a function blocks it. After a fork its thread is gone.
    """
    with _LOCK:
        loop = _loops.get((os.getpid(), purpose))
        if loop is None:
            loop = _loops[os.getpid(), purpose] = asyncio.new_event_loop()
            loop.set_task_factory(_owned_task)
            threading.Thread(target=loop.run_forever, name=f"burnish-{purpose}", daemon=True).start()
        return loop


def _owned_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Create a task that is known to belong to the call that creates it."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    if (call := _current.get()) is not None:
        _owners[task] = call
    return task


@functools.cache
def _jobs(pid: int) -> queue.SimpleQueue[Callable[[], None]]:
    """Return the queue of calls in threads, which are daemons: one that hangs must not keep the process."""
    assert pid == os.getpid()
    jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def serve() -> None:
        while True:
            jobs.get()()

    for _ in range(_NUM_THREADS):
        threading.Thread(target=serve, name="burnish-rewards", daemon=True).start()
    return jobs


_LOCK = threading.Lock()
_loops: dict[tuple[int, str], asyncio.AbstractEventLoop] = {}
"""Event loops by process and purpose."""
_current: ContextVar[Call | None] = ContextVar("current", default=None)
_owners: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()
"""Call that each task of the event loop belongs to."""
