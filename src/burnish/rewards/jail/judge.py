"""The judge: runs tests in a process that never executes the answer, on proxies of what the answer defines.

A function of the answer is called in the answer's process, and what it returns comes back as plain data, whose `==` is
Python's own. The process of the answer never sees an expected value: comparing, or combining, an object of its own with
data of the test is refused. So patched builtins, `__eq__` methods, exits and forged replies can only fail a test.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import secrets
import sys
from collections.abc import Callable
from socket import socket
from typing import Any

from .wire import Lost, decode, encode, receive, send

__all__ = ["judge"]

_LONGEST_NOTE = 1000


def judge(job: dict[str, Any], channel: socket, *, inside: bool) -> dict[str, Any]:
    """Run tests against the answer at the other end of the channel.

    Args:
        job: `setup`, code to run before the tests, and `tests`, a list of code.
        channel: leads to the process of the answer.
        inside: run the tests in the process of the answer, which can then cheat.

    Returns:
        Report with one result per test, 1 or 0, and a note on the first failure.
    """
    results, note = [0] * len(job["tests"]), ""
    try:
        first = receive(channel)
        if "failed" in first:
            return {"end": "error", "results": results, "note": str(first["failed"])[:_LONGEST_NOTE]}
        side = _Side(channel)
        scope = {} if inside else side.scope(first, _modules_used([job["setup"], *job["tests"]]))
        if job["setup"] and not inside:
            try:
                exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), scope)
            except (ImportError, SyntaxError) as error:  # the data set's fault
                return {"end": "setup", "results": results, "note": f"{type(error).__name__}: {error}"[:_LONGEST_NOTE]}
        elif job["setup"]:
            _run_inside(channel, job["setup"])
    except (Exception, SystemExit) as error:
        return {"end": "error", "results": results, "note": f"{type(error).__name__}: {error}"[:_LONGEST_NOTE]}
    for i, test in enumerate(job["tests"]):
        try:
            if inside:
                _run_inside(channel, test)
            else:
                exec(compile(test, "<test>", "exec", dont_inherit=True), dict(scope))
            results[i] = 1
        except (Exception, SystemExit) as error:
            note = note or f"test {i + 1}: {type(error).__name__}: {error}"[:_LONGEST_NOTE]
    return {"end": "ok", "results": results, "note": note}


def _run_inside(channel: socket, code: str) -> None:
    token = secrets.token_hex(16)
    send(channel, {"test": code, "token": token})
    reply = receive(channel)
    if reply.get("token") != token:
        raise AssertionError(str(reply.get("error", "no token")))


class _Side:
    """The judge's end of the channel."""

    def __init__(self, channel: socket) -> None:
        self.channel = channel
        self.functions: list[Callable[..., Any]] = []
        self.errors: dict[tuple[str, ...], type[Exception]] = {}

    def scope(self, message: dict[str, Any], modules: set[str]) -> dict[str, Any]:
        """Namespace of the tests: what the answer defines, but for names of builtins and of modules that tests use."""
        names = message.get("names")
        if not isinstance(names, dict):
            raise Lost("the answer's names are missing")
        scope: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
        for name, value in names.items():
            if not hasattr(builtins, name) and not name.startswith("__"):
                scope[name] = importlib.import_module(name) if name in modules else decode(value, self.handle)
        return scope

    def opaque(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Proxy):
            return {"t": "object", "v": object.__getattribute__(value, "_number")}
        if callable(value) and not isinstance(value, type):
            self.functions.append(value)
            return {"t": "function", "v": len(self.functions) - 1}
        raise TypeError(f"a {type(value).__name__} of the tests cannot be passed to the answer's process")

    def handle(self, value: dict[str, Any]) -> Any:
        if value.get("t") == "module":
            name = str(value.get("v"))
            if name.partition(".")[0] in sys.stdlib_module_names:
                return importlib.import_module(name)
            raise Lost(f"module {name:.80} of the answer")
        if value.get("t") == "function" and isinstance(value.get("v"), int):
            return self.functions[value["v"]]
        if value.get("t") != "object" or not isinstance(value.get("v"), int):
            raise Lost("not a value")
        if isinstance(value.get("error"), list):
            return self.error([str(name) for name in value["error"]])
        return Proxy(self, value["v"])

    def error(self, names: list[str]) -> type[Exception]:
        """Return the exception of a name: Python's own, or a class of that name derived from its first such base."""
        own = [kind for name in names if isinstance(kind := getattr(builtins, name, None), type)]
        base = next((kind for kind in own if issubclass(kind, Exception)), Exception)
        if names and base.__name__ == names[0]:
            return base
        key = tuple(names)
        self.errors[key] = self.errors.get(key) or type(names[0] if names else "Error", (base,), {})
        return self.errors[key]

    def ask(self, operation: str, /, *arguments: Any, **named: Any) -> Any:
        """Have the answer's process apply an operation; serves its calls of functions of the tests meanwhile."""
        sent = [encode(value, self.opaque) for value in arguments]
        named = {name: encode(value, self.opaque) for name, value in named.items()}
        send(self.channel, {"operation": operation, "arguments": sent, "named": named})
        while "callback" in (reply := receive(self.channel)):
            send(self.channel, self.called_back(reply))
        if "raised" in reply:
            raise self.error([str(name) for name in reply["raised"]])(str(reply.get("text")))
        changed = reply.get("arguments")
        for mine, before, after in zip(arguments, sent, changed if isinstance(changed, list) else (), strict=False):
            if after is not None and after != before:
                _replace(mine, decode(after, self.handle))
        return decode(reply.get("value"), self.handle)

    def called_back(self, message: dict[str, Any]) -> dict[str, Any]:
        number = message["callback"]
        if not isinstance(number, int) or not 0 <= number < len(self.functions):
            raise Lost("a call of no function of the tests")
        try:
            arguments = decode(message.get("arguments"), self.handle)
            return {"value": encode(self.functions[number](*arguments), self.opaque)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def _modules_used(codes: list[str]) -> set[str]:
    """Find the modules of the standard library that code reads attributes of and never calls."""
    attributes, called = set[str](), set[str]()
    for code in codes:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                attributes.add(node.value.id)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
    return (attributes - called) & sys.stdlib_module_names


def _replace(mine: Any, theirs: Any) -> None:
    """Give a container of the tests the contents that its copy has in the answer's process."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)


def _ask(proxy: Proxy, operation: str, *arguments: Any) -> Any:
    return object.__getattribute__(proxy, "_side").ask(operation, proxy, *arguments)


def _unary(operation: str) -> Callable[..., Any]:
    return lambda self, *arguments: _ask(self, operation, *arguments)


def _binary(operation: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _ask(self, operation, other) if isinstance(other, Proxy) else NotImplemented


_UNARY = "abs bool delitem enter float getitem hash index int iter len neg next pos repr reversed round setitem str"
_BINARY = "add and_ eq floordiv ge gt le lt matmul mod mul ne or_ pow sub truediv xor"
_OPERATORS: Any = type(
    "_OPERATORS",
    (),
    {f"__{name}__": _unary(name) for name in _UNARY.split()}
    | {f"__{name.rstrip('_')}__": _binary(name) for name in _BINARY.split()}
    | {"__slots__": ()},
)


class Proxy(_OPERATORS):
    """Object of the answer. Operators combine it with other objects of the answer only, never with data of a test."""

    __slots__ = ("_number", "_side")

    def __init__(self, side: _Side, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Proxy
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delattr", name)

    def __exit__(self, *_: object) -> bool:
        return bool(_ask(self, "exit"))

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Proxy) and bool(_ask(self, "isinstance", value))

    def __call__(self, /, *arguments: Any, **named: Any) -> Any:
        return object.__getattribute__(self, "_side").ask("call", self, *arguments, **named)
