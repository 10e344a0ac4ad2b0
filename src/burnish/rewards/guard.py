"""Audit hook against graders that evaluate code, start processes, open sockets or write files.

It is a second line of defence behind graders that evaluate nothing. Native code can bypass audit hooks, so it is not a
sandbox.
"""

from __future__ import annotations

import inspect
import os
import sys
from types import CodeType
from typing import Any

__all__ = ["Guard"]

_REFUSED = frozenset(
    {
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.killpg",
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.spawn",
        "os.system",
        "pty.spawn",
        "shutil.rmtree",
        "socket.bind",
        "socket.connect",
        "subprocess.Popen",
    }
)
# Modules that compile code they generate themselves, none of it from graded text.
_WRITERS = frozenset({"collections", "dataclasses", "sympy.polys.monomials"})


class Guard:
    """Audit hook for the life of the process, in force while `armed`.

    Attributes:
        armed: refuse events.
        refused: first event refused since this was last set to None.
    """

    def __init__(self) -> None:
        self.armed = False
        self.refused: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or not self._is_refused(event, arguments):
            return
        self.refused = self.refused or event
        raise PermissionError(f"{event} is not for graders")

    def _is_refused(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "exec":
            code = arguments[0]
            file = code.co_filename if isinstance(code, CodeType) else ""
            return file.startswith("<") and not file.startswith("<frozen ") and not _is_by_library()
        if event == "open":
            flags = arguments[2]
            return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return event in _REFUSED


def _is_by_library() -> bool:
    """Return True if a library runs code that it generated, or a module is being imported (some are lazily)."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__") in _WRITERS:
        return True
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
