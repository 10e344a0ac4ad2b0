"""Choice of an isolation by experiment: a level counts if a program inside fails at everything it must not do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path

from burnish.errors import ConfigError, RewardError
from burnish.rewards.sandbox.levels import LEVELS, check_isolation, clean_environment
from burnish.rewards.sandbox.zygotes import Limits, SandboxError, Zygote

__all__ = ["find_level", "trial"]

_LOCK = threading.Lock()
_PROCESSES = 8
_ATTACKS = """
import ctypes, json, mmap, os, socket, sys, time

task = json.load(sys.stdin)
breaches = []
libc = ctypes.CDLL(None, use_errno=True)


def attempt(name, act):
    try:
        if act() is not False:
            breaches.append(name)
    except (OSError, ValueError):
        pass


def processes():
    for _ in range(task["processes"] + 8):
        if os.fork() == 0:
            time.sleep(60)


def call(name, *arguments):
    return lambda: getattr(libc, name)(*arguments) == 0


attempt("reads a file outside", lambda: open(task["file"]).read())
attempt("writes a file outside", lambda: open(task["file"], "w"))
attempt("creates a file outside", lambda: open(task["file"] + ".new", "w"))
attempt("lists a folder outside", lambda: os.listdir(os.path.dirname(task["file"])))
attempt("sees the environment", lambda: not os.environ.keys().isdisjoint(task["variables"]))
attempt("opens a connection", lambda: socket.create_connection(("127.0.0.1", task["port"]), 1))
attempt("signals the trainer", lambda: os.kill(task["pid"], 0))
attempt("reads another process", lambda: open(f"/proc/{task['pid']}/environ").read())
attempt("makes a user namespace", call("unshare", 0x10000000))
attempt("mounts", call("mount", b"none", b"/dev", b"tmpfs", 0, None))
attempt("traces", call("ptrace", 16, task["pid"], 0, 0))
attempt("shares memory that does not count", lambda: mmap.mmap(-1, 4096))
attempt("writes to the interpreter", lambda: open(os.path.join(os.path.dirname(os.__file__), "burnish_x.py"), "w"))
attempt("starts processes without end", processes)
if task["namespaces"] and os.getpid() > 9:
    breaches.append("shares process numbers")
with open("kept", "w") as file:
    file.write("1")
print(json.dumps(breaches))
"""


def trial(level: str) -> str | None:
    """Start a level and attack it from inside; returns None if it holds, otherwise the reason."""
    try:
        zygote = Zygote(level)
    except SandboxError as error:
        return str(error)
    with tempfile.TemporaryDirectory(prefix="burnish-") as folder, socket.socket() as server:
        with contextlib.suppress(OSError):  # this machine may have no network to reach
            server.bind(("127.0.0.1", 0))
            server.listen()
        file = Path(folder) / "secret"
        file.write_text("secret")
        variables = os.environ.keys() - clean_environment("").keys() - {"PWD", "LC_CTYPE"}  # those that shells set
        task = {
            "file": str(file), "variables": sorted(variables),
            "port": server.getsockname()[1], "pid": os.getpid(), "processes": _PROCESSES,
            "namespaces": level != "landlock",
        }  # fmt: skip
        limits = Limits(wall_seconds=20.0, processes=_PROCESSES)
        try:
            run = zygote.run(_ATTACKS, json.dumps(task), None, "", limits)
            breaches = json.loads(run.stdout) if run.end == "ok" else [f"the trial ended with {run.end}: {run.stderr}"]
        except (RewardError, ValueError) as error:
            return str(error)
        finally:
            zygote.kill()
        if file.read_text() != "secret" or len(list(Path(folder).iterdir())) != 1:
            breaches.append("changes files outside")
    return ", ".join(breaches) or None


@functools.cache
def _trial_of_process(level: str) -> str | None:
    return trial(level)


def find_level(isolation: str) -> str:
    """Return the level in force for an option `isolation`; each is tried once per process.

    Raises:
        ConfigError: no level holds, or the one asked for does not.
    """
    check_isolation(isolation)
    if isolation == "none":
        return isolation
    reasons: list[str] = []
    with _LOCK:
        for level in LEVELS if isolation == "auto" else (isolation,):
            reason = _trial_of_process(level) if sys.platform == "linux" else "it needs Linux"
            if reason is None:
                return level
            reasons.append(f"{level}: {reason}")
    raise ConfigError(
        f"isolation = {isolation!r}: model-written code cannot be isolated on this machine "
        f"({'; '.join(reasons)[:1200]}). Install bubblewrap, allow user namespaces, or use Linux 6.12 with Landlock. "
        'To run it with all rights of this process, set isolation = "none".'
    )
