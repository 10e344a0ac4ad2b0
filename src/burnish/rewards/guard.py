"""What a grader may not do while it works on a text: evaluate code, start a process, open a socket, write a file.

Python reports such acts to audit hooks before it performs them. This is a second line behind graders that evaluate
nothing; code that runs natively can go around it, so it is no sandbox.
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
# These write functions out of their own words, of which none comes from a text that is graded.
_WRITERS = frozenset({"collections", "dataclasses", "sympy.polys.monomials"})


class Guard:
    """An audit hook for the life of the process, in force while `armed`.

    Attributes:
        armed: whether acts are refused now.
        refused: the first act that was refused since this was last set to None.
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
            return isinstance(code, CodeType) and _is_from_text(code.co_filename) and not _is_by_library()
        if event == "open":
            flags = arguments[2]
            return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        return event in _REFUSED


def _is_from_text(file: str) -> bool:
    return file.startswith("<") and not file.startswith("<frozen ")


def _is_by_library() -> bool:
    """Whether a library writes its own code, or a module is being loaded (libraries load parts late)."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__") in _WRITERS:
        return True
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
