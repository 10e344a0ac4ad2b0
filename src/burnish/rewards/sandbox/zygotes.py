"""Limits and results of runs, and the process that serves them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import IO, Any, cast

from burnish.errors import ConfigError, RewardError
from burnish.rewards.jail.entry import FOLDER
from burnish.rewards.sandbox.levels import clean_environment, interpreter_view, jailed_command
from burnish.rewards.sandbox.memory import descendants, innermost, kill_all, memory_exceeds, warn_if_unseen

__all__ = ["Limits", "Run", "SandboxError", "Zygote"]

_START_SECONDS = 60.0
_BACKSTOP_SECONDS = 30.0
_WATCH_SECONDS = 0.02
"""Time between two looks at the memory of a run; most runs have ended before the first."""
_WATCH_SHARE = 4
"""A look that took long is followed by a pause of at least so many times its duration."""


class SandboxError(RewardError):
    """The sandbox failed, not the program in it."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run.

    Attributes:
        wall_seconds: time until everything is killed.
        cpu_seconds: processor time of one process, whole seconds.
        memory_bytes: memory of the processes of a run together (Linux), and address space of each.
        processes: processes and threads of a run together.
        output_bytes: bytes kept of each output; a program that writes more has failed.
        file_bytes: bytes of the run's folder, and of any one file.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 16
    output_bytes: int = 1 << 20
    file_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not value > 0 or value == float("inf"):
                raise ConfigError(f"{name} = {value!r} of Limits: use a finite positive number.")


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        end: "ok", "error" (exit status above 0, or an exception), "crash" (a signal), "timeout", "output" (too much) or
            "memory" (its processes took too much together).
        code: exit status, negative for a signal; None if it is not known.
        stdout: standard output.
        stderr: standard error.
        results: 1 or 0 for each test; empty for a program.
        note: reason of the first failed test.
    """

    end: str
    code: int | None = None
    stdout: str = ""
    stderr: str = ""
    results: list[int] = field(default_factory=list[int])
    note: str = ""


class Zygote:
    """A zygote process and the socket to it; runs one program at a time."""

    def __init__(self, level: str) -> None:
        self.level = level
        self._stderr = cast("IO[bytes]", tempfile.TemporaryFile())  # noqa: SIM115 - closed in kill
        ours, theirs = socket.socketpair()
        self._control = ours
        try:
            self._process = subprocess.Popen(
                jailed_command(level, view=interpreter_view()),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                cwd="/",
                env=clean_environment(FOLDER),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            self._stderr.close()
            raise SandboxError(f"the sandbox cannot be started ({level}): {error}") from error
        finally:
            theirs.close()
        self.alive = True
        self.last_words = ""
        self.landlock = int(self._reply(_START_SECONDS).get("landlock", 0))
        self._pid = innermost(self._process.pid)
        warn_if_unseen(self._pid)

    def run(self, program: str, stdin: str, job: dict[str, Any] | None, judge: str, limits: Limits) -> Run:
        """Run a program with an input, or judge it by tests."""
        texts = [program, stdin, None, None, *([json.dumps(job)] if job is not None else [])]
        with contextlib.ExitStack() as stack:
            files = [_file(stack, text) for text in texts]
            folder = FOLDER
            if self.level in ("landlock", "none"):
                folder = tempfile.mkdtemp(prefix="burnish-")
                # Not shutil.rmtree, which recurses, so that a run could make it fail.
                stack.callback(subprocess.run, ["rm", "-rf", folder], stderr=subprocess.DEVNULL, check=False)
            request = asdict(limits) | {"judge": judge, "folder": folder}
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], files)
            except OSError as error:
                self.kill()
                raise SandboxError(f"the sandbox died: {self.last_words}") from error
            exceeded = False

            def watch() -> None:
                nonlocal exceeded
                below = descendants(self._pid)
                exceeded = exceeded or memory_exceeds(below, limits.memory_bytes)
                if exceeded:
                    # The first is the supervisor, which reports once the program is gone, and takes the rest along.
                    kill_all(below[1:], self._pid)

            reply = self._reply(limits.wall_seconds + _BACKSTOP_SECONDS, watch)
            if "broken" in reply:
                raise SandboxError(f"the sandbox failed: {reply['broken']}")
            outputs = [os.pread(file, limits.output_bytes + 1, 0) for file in files[2:4]]
        end = str(reply["end"])
        if any(len(output) > limits.output_bytes for output in outputs):
            end = "output"
        out, err = (output[: limits.output_bytes].decode(errors="replace") for output in outputs)
        if exceeded:
            return Run("memory", None, out, err)
        return Run(end, reply.get("code"), out, err, reply.get("results", []), str(reply.get("note", "")))

    def _reply(self, seconds: float, watch: Callable[[], None] | None = None) -> dict[str, Any]:
        """Wait for a reply, and meanwhile call `watch` now and then."""
        data, start = b"", time.monotonic()
        deadline, pause = start + seconds, seconds if watch is None else _WATCH_SECONDS
        try:
            while not data.endswith(b"\n"):
                left = deadline - time.monotonic()
                self._control.settimeout(max(0.001, min(left, pause)))
                try:
                    received = self._control.recv(1 << 16)
                except TimeoutError:
                    looked = time.monotonic()
                    if watch is None or looked >= deadline:
                        raise
                    watch()
                    pause = max(_WATCH_SECONDS, _WATCH_SHARE * (time.monotonic() - looked))
                    continue
                if not received:
                    raise SandboxError("")
                data += received
            return cast("dict[str, Any]", json.loads(data))
        except (OSError, ValueError) as error:
            self.kill()
            reason = f"no reply in {seconds:g} s" if isinstance(error, TimeoutError) else "it died"
            raise SandboxError(f"the sandbox failed ({self.level}): {reason}; {self.last_words}") from None
        except BaseException:
            self.kill()  # a late reply must not be taken for that of the next run
            raise

    def kill(self) -> None:
        """Kill the zygote and everything in its namespace; safe to call twice."""
        if not self.alive:
            return
        self.alive = False
        self._process.kill()
        self._process.wait()
        self._control.close()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
        self.last_words = self._stderr.read().decode(errors="replace").strip()[-500:]
        self._stderr.close()


def _file(stack: contextlib.ExitStack, text: str | None) -> int:
    """Open a file without a name, in memory where the system can; None for an empty one that programs append to."""
    data = b"" if text is None else text.encode(errors="replace")
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("run")
        stack.callback(os.close, descriptor)
    else:
        descriptor = stack.enter_context(tempfile.TemporaryFile()).fileno()  # noqa: SIM115
    while data:
        data = data[os.write(descriptor, data) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
