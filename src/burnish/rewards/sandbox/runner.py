"""Pool of sandboxed processes for model-written programs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from burnish.errors import ConfigError
from burnish.rewards.sandbox.levels import check_isolation
from burnish.rewards.sandbox.trial import find_level
from burnish.rewards.sandbox.zygotes import Limits, Run, Zygote

__all__ = ["Sandbox", "default_sandbox"]

_LOCK = threading.Lock()

_T = TypeVar("_T")
_R = TypeVar("_R")


class Sandbox:
    """Pool of zygotes that run model-written programs, each isolated from the system and from other runs. Thread-safe.

    Isolation is the first of "bubblewrap", "namespaces" (user, mount, PID, network, IPC and UTS) and "landlock" (no
    namespaces: programs cannot start processes) that withstands a set of attacks when the sandbox starts. All add
    seccomp, and Landlock where the kernel has it.

    Args:
        num_workers: runs at a time; None for one per two processors, at most 4.
        isolation: "auto", one level, or "none" to run programs with the rights of this process.

    Raises:
        ConfigError: an unknown isolation, or fewer than 1 worker.
    """

    def __init__(self, num_workers: int | None = None, isolation: str = "auto") -> None:
        if num_workers is None:
            num_workers = min(4, max(1, (os.cpu_count() or 2) // 2))
        if num_workers < 1:
            raise ConfigError(f"num_workers = {num_workers!r}: use an integer of at least 1.")
        check_isolation(isolation)
        self.num_workers = num_workers
        self._asked = isolation
        self._slots: queue.LifoQueue[Zygote | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    @functools.cached_property
    def level(self) -> str:
        """Level in force.

        Raises:
            ConfigError: this machine has no isolation that withstands the test.
        """
        return find_level(self._asked)

    @property
    def isolation(self) -> str:
        """Isolation in force, for logs, such as "namespaces + landlock 7 + seccomp"."""
        with self._borrowed() as zygote:
            if zygote.level == "none":
                return "none"
            parts = [zygote.level] if zygote.level != "landlock" else []
            return " + ".join([*parts, *([f"landlock {zygote.landlock}"] if zygote.landlock else []), "seccomp"])

    def run(self, program: str, stdin: str = "", *, limits: Limits | None = None) -> Run:
        """Run a program as `python FILE < stdin` would.

        Raises:
            ConfigError: this machine has no isolation.
            SandboxError: the sandbox failed, not the program.
        """
        with self._borrowed() as zygote:
            return zygote.run(program, stdin, None, "", limits or Limits())

    def judge(
        self,
        program: str,
        tests: Sequence[str],
        *,
        setup: str = "",
        inside: bool = False,
        limits: Limits | None = None,
    ) -> Run:
        """Run tests, code that raises if it fails, against what a program defines.

        Args:
            program: model-written code.
            tests: code; each test is passed if it raises nothing.
            setup: code to run before the tests.
            inside: run the tests in the program's own process, which can then forge results. By default they run in
                another one, on proxies: arguments and results are copied, and objects of the program can be called,
                read, iterated and compared with each other, but not combined with values of the tests.
            limits: limits of the run.

        Raises:
            ConfigError: this machine has no isolation.
            SandboxError: the sandbox failed, not the program.
        """
        with self._borrowed() as zygote:
            job = {"setup": setup, "tests": list(tests)}
            return zygote.run(program, "", job, "inside" if inside else "outside", limits or Limits())

    def map(self, function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R | Exception]:
        """Apply a function that uses the sandbox to each item, as many at a time as there are workers."""

        def contained(item: _T) -> _R | Exception:
            try:
                return function(item)
            except Exception as error:
                return error

        with ThreadPoolExecutor(max_workers=self.num_workers) as threads:
            return list(threads.map(contained, items))

    @contextlib.contextmanager
    def _borrowed(self) -> Generator[Zygote]:
        level = self.level
        zygote = self._slots.get()
        try:
            if zygote is None:
                zygote = Zygote(level)
            yield zygote
        finally:
            self._slots.put(zygote if zygote is not None and zygote.alive else None)

    def close(self) -> None:
        """Kill the idle zygotes; the sandbox starts new ones if it is used again."""
        zygotes = [self._slots.get() for _ in range(self.num_workers)]
        for zygote in zygotes:
            if zygote is not None:
                zygote.kill()
            self._slots.put(None)


@functools.cache
def _sandbox_of_process(pid: int, isolation: str) -> Sandbox:
    # Keyed by process, since a forked child must not use its parent's zygotes.
    assert pid == os.getpid()
    sandbox = Sandbox(isolation=isolation)
    atexit.register(sandbox.close)
    return sandbox


def default_sandbox(isolation: str = "auto") -> Sandbox:
    """Return the sandbox that verifiers share, closed when the process exits."""
    with _LOCK:  # `functools.cache` alone would make one for each thread that asks first
        return _sandbox_of_process(os.getpid(), isolation)
