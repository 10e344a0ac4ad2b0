"""Zygote: a warm interpreter that forks one process tree per run, each with namespaces, limits and a folder of its own.

It never reads a program, nor what one writes: those are files whose descriptors it passes on, so that no run can find
traces of another in memory that it inherits.

A request is one JSON object with descriptors of the program, its input, its two outputs and, to judge tests, the tests.
The reply is one line of JSON: `{"end", "code", "results", "note"}`, or `{"broken": reason}` if the sandbox failed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

from . import kernel
from .answer import prepare_streams, run_program, serve_calls
from .entry import readable
from .judge import judge

__all__ = ["serve"]

# Modules that programs often import: loaded once, shared by all runs.
_WARM = (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq io itertools json math numbers operator os random re statistics "
    "string struct sys textwrap time traceback types typing unicodedata"
)
_PER_RUN = kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_IPC
_NOSUID, _NODEV = 2, 4
_GRACE_SECONDS = 1.0
_OPEN_FILES = 64
_LARGEST_REPORT_BYTES = 1 << 20


class _Overdue(BaseException):
    """Time limit of a run, raised in its supervisor."""

    @classmethod
    def ring(cls, *_: object) -> None:
        raise cls


def serve(spec: dict[str, Any]) -> None:
    """Serve runs until the other end of descriptor 0 closes."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.stdin = sys.stdout = None
    for name in _WARM.split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    control.sendall(
        json.dumps({"landlock": kernel.landlock_version() if spec["level"] != "none" else 0}).encode() + b"\n"
    )
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 8)
        if not data:
            return
        report = _run(spec, json.loads(data), descriptors, control)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(report)


def _run(spec: dict[str, Any], request: dict[str, Any], descriptors: list[int], control: socket.socket) -> bytes:
    """Fork a supervisor, wait for its report or the deadline, and kill all that it started."""
    reader, writer = os.pipe()
    try:
        child = kernel.clone(_PER_RUN) if spec["level"] in ("bubblewrap", "namespaces") else os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        return _line({"broken": f"no process for the run: {error}"})
    if child == 0:
        try:
            os.close(reader)
            os.close(control.detach())
            os.write(writer, _line(_supervise(spec, request, descriptors)))
        except BaseException as error:
            with contextlib.suppress(BaseException):
                os.write(writer, _line({"broken": f"{type(error).__name__}: {error}"[:2000]}))
        finally:
            os._exit(0)
    os.close(writer)
    report = _read_until(reader, time.monotonic() + request["wall_seconds"] + _GRACE_SECONDS)
    os.close(reader)
    # Process 1 of a PID namespace takes every other process of it along, before waitpid returns.
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if report is None:
        return _line({"end": "timeout"})
    return report if report.endswith(b"\n") else _line({"end": "crash", "note": "the supervisor of the run died"})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    """Read to the end of a pipe; None at the deadline."""
    poll, data = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(data) < _LARGEST_REPORT_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        received = os.read(descriptor, 1 << 16)
        if not received or received.endswith(b"\n"):
            return data + received
        data += received
    return data


def _supervise(spec: dict[str, Any], request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """Confine this process, fork the one that runs the program, and report how it ended."""
    has_namespaces = spec["level"] in ("bubblewrap", "namespaces")
    folder = request["folder"]
    if has_namespaces:
        options = f"size={request['file_bytes']},nr_inodes=4096,mode=700"
        kernel.mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, options)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    if spec["level"] != "none":
        kernel.drop_capabilities()
        kernel.lock_files(readable(spec), [folder, "/dev/null"])
        kernel.forbid_privileges()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        _become_program(spec, request, descriptors, theirs.fileno())
    theirs.close()
    # The judge decodes what the answer returns.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"],) * 2)
    if has_namespaces:  # its signals end a run without namespaces
        kernel.filter_calls(bytes.fromhex(spec["filter"]))
    signal.signal(signal.SIGALRM, _Overdue.ring)
    signal.setitimer(signal.ITIMER_REAL, request["wall_seconds"], 0.05)
    try:
        if request["judge"]:
            # Read only now, so that the answer's process has never held the tests.
            with os.fdopen(descriptors[4], "rb", closefd=False) as file:
                job = json.load(file)
            return judge(job, ours, inside=request["judge"] == "inside")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        end = "timeout" if code == -signal.SIGXCPU else "crash" if code < 0 else "error" if code else "ok"
        return {"end": end, "code": code}
    except _Overdue:
        return {"end": "timeout"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(child, signal.SIGKILL)


def _become_program(spec: dict[str, Any], request: dict[str, Any], descriptors: list[int], channel: int) -> None:
    """Run the program, or serve calls of its functions, in this process, and exit."""
    status = 70
    try:
        os.setsid()
        source = os.pread(descriptors[0], os.fstat(descriptors[0]).st_size, 0).decode()
        os.dup2(channel, 3 + max(channel, *descriptors))
        channel = 3 + max(channel, *descriptors)
        for target, descriptor in enumerate(descriptors[1:4]):
            os.dup2(descriptor, target)
        if request["judge"]:
            os.dup2(channel, 3)
        os.closerange(4 if request["judge"] else 3, 1024)
        cpu = int(request["cpu_seconds"])
        limits = {
            resource.RLIMIT_AS: request["memory_bytes"],
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_FSIZE: request["file_bytes"],
            resource.RLIMIT_NOFILE: _OPEN_FILES,
        }
        for name, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some
                resource.setrlimit(name, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        if spec["level"] != "none":
            # The zygote, the supervisor, and two of the process that waits outside count too.
            resource.setrlimit(resource.RLIMIT_NPROC, (request["processes"] + 4,) * 2)
            if spec["level"] == "landlock":
                # A layer of its own, so that it cannot open the supervisor's files through /proc.
                kernel.lock_files(readable(spec), [request["folder"], "/dev/null"])
            kernel.filter_calls(bytes.fromhex(spec["filter"]))
        prepare_streams()
        gc.enable()
        if request["judge"]:
            serve_calls(source, socket.socket(fileno=3))
            status = 0
        else:
            status = run_program(source)
    finally:
        os._exit(status)
