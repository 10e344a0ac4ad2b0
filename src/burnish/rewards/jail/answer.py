"""The process of an answer: runs it as a program, or serves calls of what it defines to a judge in another process."""

from __future__ import annotations

import atexit
import builtins
import operator
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from socket import socket
from typing import Any

from .wire import Lost, decode, encode, receive, send

__all__ = ["OPERATIONS", "prepare_streams", "run_program", "serve_calls"]

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, /, *arguments, **named: function(*arguments, **named),
    "delattr": delattr,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "getattr": getattr,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "setattr": setattr,
    **{
        name: getattr(builtins, name) for name in ("abs", "bool", "float", "hash", "int", "iter", "len", "next", "repr")
    },
    **{name: getattr(builtins, name) for name in ("reversed", "round", "str")},
    **{name: getattr(operator, name) for name in ("delitem", "getitem", "index", "neg", "pos", "setitem")},
    **{name: getattr(operator, name) for name in ("eq", "ge", "gt", "le", "lt", "ne")},
    **{name: getattr(operator, name) for name in ("add", "floordiv", "matmul", "mod", "mul", "pow", "sub", "truediv")},
    **{f"{name}_": getattr(operator, f"{name}_") for name in ("and", "or")},
    "xor": operator.xor,
}
"""What a judge may do with an object of the answer."""

_LONGEST_TEXT = 2000


def prepare_streams() -> None:
    """Replace the standard streams by descriptors 0 to 2."""
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def run_program(source: str) -> int:
    """Run a program as `python FILE` does, with its exit handlers; returns its exit status."""
    status = 0
    try:
        _execute(source)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
        status = error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        kind, error, frames = sys.exc_info()
        while frames is not None and frames.tb_frame.f_code.co_filename != "<answer>":
            frames = frames.tb_next
        traceback.print_exception(kind, error, frames, limit=-20)
        status = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] - waits for threads, as the interpreter does
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    return status


def _execute(source: str) -> dict[str, Any]:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    code = compile(source, "<answer>", "exec", dont_inherit=True)
    exec(code, main.__dict__)
    return main.__dict__


class _Server:
    """Objects of the answer by number, and the channel to the judge."""

    def __init__(self, channel: socket) -> None:
        self.channel = channel
        self.objects: list[Any] = []

    def opaque(self, value: Any) -> dict[str, Any]:
        if isinstance(value, types.ModuleType):
            return {"t": "module", "v": value.__name__}
        self.objects.append(value)
        handle: dict[str, Any] = {"t": "object", "v": len(self.objects) - 1}
        if isinstance(value, type) and issubclass(value, BaseException):
            handle["error"] = _bases(value)
        return handle

    def handle(self, value: dict[str, Any]) -> Any:
        if value["t"] == "object":
            return self.objects[value["v"]]
        number = value["v"]

        def callback(*arguments: Any) -> Any:
            """Call a function of the judge's side."""
            send(self.channel, {"callback": number, "arguments": encode(arguments, self.opaque)})
            reply = receive(self.channel)
            if "error" in reply:
                raise RuntimeError(reply["error"])
            return decode(reply["value"], self.handle)

        return callback

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        arguments = [decode(value, self.handle) for value in request["arguments"]]
        named = {name: decode(value, self.handle) for name, value in request["named"].items()}
        try:
            value = OPERATIONS[request["operation"]](*arguments, **named)
        except BaseException as error:
            return {"raised": _bases(type(error)), "text": _text(error)}
        # A function may change its arguments in place.
        changed = [encode(a, self.opaque) if isinstance(a, list | dict | set | bytearray) else None for a in arguments]
        return {"value": encode(value, self.opaque), "arguments": changed}


def _bases(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_TEXT]
    except BaseException:
        return "an exception without a text"


def serve_calls(source: str, channel: socket) -> None:
    """Run an answer, send what it defines, and serve the judge's calls until it is gone."""
    server = _Server(channel)
    try:
        names = _execute(source)
        message = {
            "names": {name: encode(v, server.opaque) for name, v in list(names.items()) if not name.startswith("__")}
        }
    except BaseException as error:
        send(channel, {"failed": f"{type(error).__name__}: {_text(error)}"})
        return
    send(channel, message)
    while True:
        try:
            request = receive(channel)
        except Lost:
            return
        if "test" in request:
            # In the answer's own process; the token goes back only after the last statement.
            try:
                exec(compile(request["test"], "<test>", "exec", dont_inherit=True), names)
                send(channel, {"token": request["token"]})
            except BaseException as error:
                send(channel, {"error": f"{type(error).__name__}: {_text(error)}"})
            continue
        try:
            reply = server.reply(request)
        except BaseException as error:
            reply = {"raised": ["TypeError", "Exception"], "text": _text(error)}
        send(channel, reply)
