"""Wire format between a judge and an answer's process: values as data, objects of the other side as handles."""

from __future__ import annotations

import builtins
import json
import socket
import struct
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeAlias, cast

__all__ = ["Lost", "Opaque", "decode", "encode", "receive", "send"]

Opaque: TypeAlias = Callable[[Any], dict[str, Any]]

_MAX_FRAME_BYTES = 16 << 20
_SMALL = 1 << 53
_SEQUENCES: dict[str, type] = {
    "bytearray": bytearray, "bytes": bytes, "deque": deque, "frozenset": frozenset, "list": list, "set": set,
    "tuple": tuple,
}  # fmt: skip
_SCALARS: dict[str, tuple[type, Callable[[Any], str]]] = {"decimal": (Decimal, str), "fraction": (Fraction, str)}


class Lost(Exception):
    """The other process has ended, or wrote something that is not a message."""


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send a message."""
    data = json.dumps(message).encode()
    if len(data) > _MAX_FRAME_BYTES:
        raise ValueError(f"a value of {len(data)} bytes is too large to pass on")
    channel.sendall(struct.pack("=I", len(data)) + data)


def receive(channel: socket.socket) -> dict[str, Any]:
    """Receive a message.

    Raises:
        Lost: the channel is closed, or holds no message.
    """
    try:
        (size,) = struct.unpack("=I", _read(channel, 4))
        message = json.loads(_read(channel, min(size, _MAX_FRAME_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        raise Lost(str(error)) from error
    if not isinstance(message, dict):
        raise Lost("not a message")
    return message


def _read(channel: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            raise Lost("the process of the answer has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def encode(value: Any, opaque: Opaque) -> Any:
    """Encode a value as JSON; what is not plain data is encoded by `opaque`.

    Instances of subclasses of the plain types are reduced to their contents, so that no method of theirs travels.
    """
    if value is None or type(value) in (bool, str, float):
        return value
    if isinstance(value, int):
        number = int.__add__(value, 0)
        return number if -_SMALL < number < _SMALL else {"t": "int", "v": hex(number)}
    if isinstance(value, str | float):
        return str.__str__(value) if isinstance(value, str) else float.__add__(value, 0.0)
    if isinstance(value, complex):
        return {"t": "complex", "v": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"t": "dict", "v": [[encode(k, opaque), encode(v, opaque)] for k, v in dict.items(value)]}
    if isinstance(value, range):
        return {"t": "range", "v": [value.start, value.stop, value.step]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {"t": name, "v": [encode(item, opaque) for item in kind.__iter__(value)]}
    for name, (kind, text) in _SCALARS.items():
        if isinstance(value, kind):
            return {"t": name, "v": text(value)}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), opaque)
    if isinstance(value, type) and value is getattr(builtins, value.__name__, None):
        return {"t": "type", "v": value.__name__}
    return opaque(value)


def decode(value: Any, handle: Callable[[dict[str, Any]], Any]) -> Any:
    """Decode a value; `handle` decodes what `opaque` encoded.

    Raises:
        Lost: not a value.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise Lost("a bare list is not a value")
        return value
    name, content = value.get("t"), cast("Any", value.get("v"))
    try:
        if name == "int":
            return int(content, 16)
        if name == "complex":
            return complex(float(content[0]), float(content[1]))
        if name == "dict":
            return {decode(k, handle): decode(v, handle) for k, v in content}
        if name == "range":
            return range(*(int(n) for n in content))
        if name in _SEQUENCES:
            return _SEQUENCES[name]([decode(item, handle) for item in content])
        if name in _SCALARS:
            return _SCALARS[name][0](content)
        if name == "type":
            found = getattr(builtins, str(content), None)
            if isinstance(found, type):
                return found
            raise Lost(f"{content!r:.80} is not a type")
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise Lost(f"not a value: {error}") from error
    return handle(value)
