"""Pool of killable worker processes for graders that may hang.

`signal.alarm` works only in the main thread and cannot stop a C loop; a thread cannot be stopped at all. A process can
be killed together with everything that it started. Workers are started with `subprocess` rather than `multiprocessing`:
they do not import the user's main module, do not inherit CUDA or locks, and can be started from any thread. What
graders read was written by a model, so they run isolated where the machine can isolate them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import math
import os
import queue
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from burnish.errors import ConfigError, RewardError
from burnish.rewards.failures import AnswerFailure, AnswerTimeout
from burnish.rewards.sandbox.levels import check_isolation, jailed_command, worker_view
from burnish.rewards.sandbox.trial import find_level

__all__ = ["WorkerPool", "default_pool"]

logger = logging.getLogger(__name__)

_STARTUP_SECONDS = 300.0
_MAX_REPLY_BYTES = 1 << 16
_BOOT = (
    "import json, sys; sys.path[:0] = [p for p in json.loads(sys.argv[1]) if p not in sys.path]; "
    "from burnish.rewards.worker import main; main()"
)
# All that an interpreter may need to start. Graders work on model output, so tokens, keys and HOME are withheld.
_KEPT_VARIABLES = ("DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")
_MARK = "BURNISH_WORKER"
_LOCK = threading.Lock()
_KILLED = (-signal.SIGKILL, -signal.SIGKILL & 0xFF, 128 + signal.SIGKILL)
"""Exit status of a worker that was killed, by an operator or for the machine's memory: its own, or as passed on."""
_EXIT_SECONDS = 1.0


class _WorkerKilled(RewardError):
    """A worker process was killed by something other than its pool, which says nothing about the answer."""


class _Worker:
    """Child process with its own session, folder and environment."""

    def __init__(self, level: str) -> None:
        self._stderr = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115 - closed in kill
        self._folder = tempfile.TemporaryDirectory(prefix="burnish-worker-", ignore_cleanup_errors=True)
        self._mark = secrets.token_hex(16)
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        private = {"HOME": self._folder.name, "TMPDIR": self._folder.name, _MARK: self._mark}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        paths = json.dumps([os.path.abspath(path) for path in sys.path if path])
        command = [sys.executable, "-s", "-W", "ignore", "-c", _BOOT, paths]
        if level != "none":
            command = jailed_command(level, view=worker_view(), folder=self._folder.name, command=command)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            cwd=self._folder.name,
            env=kept | private | threads | {"PYTHONUTF8": "1"},
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._unread = b""
        self.alive = True
        self.last_words = ""

    def call(self, kind: str, arguments: Mapping[str, Any], timeout_seconds: float) -> float:
        nonce = secrets.token_hex(16)
        watchdog_seconds = 2 * timeout_seconds + 10
        request = {"kind": kind, "arguments": arguments, "watchdog_seconds": watchdog_seconds, "nonce": nonce}
        try:
            deadline = time.monotonic() + _STARTUP_SECONDS
            self._send(json.dumps(request).encode() + b"\n", deadline)
            reply = self._receive(nonce, deadline)
            if reply is None:
                raise TimeoutError(f"{kind}: the worker was not ready after {_STARTUP_SECONDS:g} s")
            if "started" in reply:
                try:
                    reply = self._receive(nonce, time.monotonic() + timeout_seconds)
                except _WorkerKilled:
                    raise
                except RewardError as error:
                    raise AnswerFailure(str(error)) from error
                if reply is None:
                    raise AnswerTimeout(f"{kind}: no result after {timeout_seconds:g} s of work")
            value = reply.get("value")
            if "error" not in reply and not (isinstance(value, float) and math.isfinite(value)):
                raise RewardError(f"{kind}: the worker replied {value!r:.80}, not a finite number")
        except BaseException:
            self.kill()  # a late reply must not be mistaken for that of the next call
            raise
        if "error" in reply:
            raise (AnswerFailure if reply.get("is_of_answer") else RewardError)(str(reply["error"]))
        return cast("float", value)

    def _send(self, data: bytes, deadline: float) -> None:
        with contextlib.suppress(BrokenPipeError):  # `_receive` reports a dead worker
            while data and _wait(self._requests, select.POLLOUT, deadline):
                data = data[os.write(self._requests, data) :]

    def _receive(self, nonce: str, deadline: float) -> dict[str, Any] | None:
        """Return the next reply, or None at the deadline."""
        while b"\n" not in self._unread:
            if not _wait(self._replies, select.POLLIN, deadline):
                return None
            received = os.read(self._replies, _MAX_REPLY_BYTES)
            if not received:
                status: int | None = None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self.process.wait(_EXIT_SECONDS)  # its own, before it is killed here
                self.kill()
                died = _WorkerKilled if status in _KILLED else RewardError
                raise died(f"the verifier process died (exit {status}): {self.last_words}")
            self._unread += received
            if len(self._unread) > _MAX_REPLY_BYTES:
                break
        line, _, self._unread = self._unread.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            reply: Any = json.loads(line)
            if isinstance(reply, dict) and cast("dict[str, Any]", reply).get("nonce") == nonce:
                return cast("dict[str, Any]", reply)
        raise RewardError("a process other than the grader wrote a reply; the worker is replaced")

    def kill(self) -> None:
        """Kill the process and all that it started; safe to call twice."""
        if not self.alive:
            return
        self.alive = False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        _kill_marked(f"{_MARK}={self._mark}".encode())
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
        self.last_words = self._stderr.read().decode(errors="replace").strip()[-500:]
        self._stderr.close()
        self._folder.cleanup()


def _wait(descriptor: int, event: int, deadline: float) -> bool:
    """Wait for a descriptor; False at the deadline."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _kill_marked(mark: bytes) -> None:
    """Kill children that left the worker's session, by a variable of their environment (Linux only)."""
    found = True
    while found:  # they may start others meanwhile
        found = False
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in file.read_bytes().split(b"\0"):
                    os.kill(int(file.parent.name), signal.SIGKILL)
                    found = True


class WorkerPool:
    """Pool that runs graders in worker processes; time-outs exclude the time in the queue.

    Processes start on first use, isolated as programs in a :class:`burnish.rewards.Sandbox` are; one that hangs is
    killed and replaced. Thread-safe.

    Args:
        num_workers: maximum number of processes, at least 1.
        isolation: as of a `Sandbox`; with "auto" a machine without isolation is warned about once and runs graders as
            plain processes, since they are not the model's code.

    Raises:
        ConfigError: `num_workers` below 1, or an unknown isolation.
    """

    def __init__(self, num_workers: int, isolation: str = "auto") -> None:
        check_isolation(isolation)
        if num_workers < 1:
            raise ConfigError(f"num_workers = {num_workers!r}: use an integer of at least 1.")
        self.num_workers = num_workers
        self._isolation = isolation
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    @functools.cached_property
    def level(self) -> str:
        """Isolation of the workers, "none" where the machine has none."""
        try:
            return find_level(self._isolation)
        except ConfigError as error:
            if self._isolation != "auto":
                raise
            logger.warning("Graders run without isolation: %s", error)
            return "none"

    def map(self, kind: str, calls: Sequence[Mapping[str, Any]], *, timeout_seconds: float) -> list[float | Exception]:
        """Run a grader on each set of arguments; equal sets run once (completions of a group often agree).

        Args:
            kind: name of a grader in :data:`burnish.rewards.worker.KINDS`.
            calls: arguments of each call, JSON values.
            timeout_seconds: time limit of one call.

        Returns:
            For each call its value or its exception (TimeoutError for a hang).
        """
        keys = [json.dumps(arguments, sort_keys=True, default=repr) for arguments in calls]
        unique = dict(zip(keys, calls, strict=True))
        run = functools.partial(self._run, kind, timeout_seconds)
        with ThreadPoolExecutor(max_workers=self.num_workers) as threads:
            results = dict(zip(unique, threads.map(run, unique.values()), strict=True))
        return [results[key] for key in keys]

    def _run(self, kind: str, timeout_seconds: float, arguments: Mapping[str, Any]) -> float | Exception:
        worker = self._slots.get()
        try:
            with contextlib.suppress(_WorkerKilled):
                worker = worker or _Worker(self.level)
                return worker.call(kind, arguments, timeout_seconds)
            worker = _Worker(self.level)  # once more; killed again, the completion is excluded
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
    # Keyed by process, since a forked child must not use its parent's workers.
    assert pid == os.getpid()
    pool = WorkerPool(num_workers=min(4, max(1, (os.cpu_count() or 2) // 2)))
    atexit.register(pool.close)
    return pool


def default_pool() -> WorkerPool:
    """Return the pool that verifiers share: up to 4 workers, closed when the process exits."""
    with _LOCK:  # `functools.cache` alone would make one for each thread that asks first
        return _pool_of_process(os.getpid())
