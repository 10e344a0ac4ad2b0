"""A pool of killable worker processes for graders that may hang.

`signal.alarm` works in the main thread only and cannot stop a C loop; a thread cannot be stopped at all. A process can
be killed. The workers are started with `subprocess`, not `multiprocessing`: they never import the user's main module
again, never inherit CUDA or locks, and can be started from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, cast

from burnish.errors import ConfigError, RewardError

__all__ = ["WorkerPool", "default_pool"]

_STARTUP_SECONDS = 300.0
_BOOT = (
    "import json, sys; sys.path[:0] = [p for p in json.loads(sys.argv[1]) if p not in sys.path]; "
    "from burnish.rewards.worker import main; main()"
)
# Graders evaluate what the model wrote: the worker sees no tokens or keys of the environment.
_KEPT_VARIABLES = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "SYSTEMROOT",
    "TEMP",
    "TMP",
    "TMPDIR",
    "VIRTUAL_ENV",
)


class _Worker:
    """One child process and the thread that reads its replies."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        self._stderr = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115 - closed in kill
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _BOOT, json.dumps([path for path in sys.path if path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        )
        self._replies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.alive = True
        self.last_words = ""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._replies.put(line)
        self._replies.put(b"")

    def call(self, kind: str, arguments: Mapping[str, Any], timeout_seconds: float) -> float:
        request = {"kind": kind, "arguments": arguments, "watchdog_seconds": 2 * timeout_seconds + 10}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows in the reply
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        reply = self._receive(_STARTUP_SECONDS, f"{kind}: the worker was not ready after {_STARTUP_SECONDS:g} s")
        if "started" in reply:
            reply = self._receive(timeout_seconds, f"{kind}: no result after {timeout_seconds:g} s of work")
        if "error" in reply:
            raise RewardError(reply["error"])
        return float(reply["value"])

    def _receive(self, timeout_seconds: float, message: str) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=timeout_seconds)
        except queue.Empty:
            self.kill()
            raise TimeoutError(message) from None
        if not line:
            self.kill()
            raise RewardError(f"the verifier process died (exit {self.process.returncode}): {self.last_words}")
        return cast("dict[str, Any]", json.loads(line))

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self._stderr.seek(0)
        self.last_words = self._stderr.read().decode(errors="replace").strip()[-500:]
        self._stderr.close()


class WorkerPool:
    """Runs graders in worker processes, with a time-out counted from the start of the work, not of the queueing.

    Processes start when first needed; one that hangs is killed and replaced. Safe to use from several threads.

    Args:
        num_workers: most processes at once, at least 1.

    Raises:
        ConfigError: `num_workers` below 1.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers = {num_workers!r}: use an integer of at least 1.")
        self.num_workers = num_workers
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    def map(self, kind: str, calls: Sequence[Mapping[str, Any]], *, timeout_seconds: float) -> list[float | Exception]:
        """Run a grader on each set of arguments; equal ones run once (completions of a group often agree).

        Args:
            kind: name of a grader in :data:`burnish.rewards.worker.KINDS`.
            calls: arguments of each call, JSON values.
            timeout_seconds: most seconds of work for one call.

        Returns:
            For each call its value, or the exception that stands in its place (TimeoutError for a hang).
        """
        keys = [json.dumps(arguments, sort_keys=True) for arguments in calls]
        unique = dict(zip(keys, calls, strict=True))
        run = functools.partial(self._run, kind, timeout_seconds)
        with ThreadPoolExecutor(max_workers=self.num_workers) as threads:
            results = dict(zip(unique, threads.map(run, unique.values()), strict=True))
        return [results[key] for key in keys]

    def _run(self, kind: str, timeout_seconds: float, arguments: Mapping[str, Any]) -> float | Exception:
        worker = self._slots.get()
        try:
            if worker is None:
                worker = _Worker()
            return worker.call(kind, arguments, timeout_seconds)
        except Exception as error:
            return error
        finally:
            self._slots.put(worker if worker is not None and worker.alive else None)

    def close(self) -> None:
        """Kill the idle processes; the pool starts new ones if it is used again."""
        workers = [self._slots.get() for _ in range(self.num_workers)]
        for worker in workers:
            if worker is not None:
                worker.kill()
            self._slots.put(None)


@functools.cache
def _pool_of_process(pid: int) -> WorkerPool:
    # Keyed by process: after a fork the child must not talk to the parent's workers.
    assert pid == os.getpid()
    pool = WorkerPool(num_workers=min(4, max(1, (os.cpu_count() or 2) // 2)))
    atexit.register(pool.close)
    return pool


def default_pool() -> WorkerPool:
    """The pool that verifiers share: up to 4 workers, closed when the process exits."""
    return _pool_of_process(os.getpid())
