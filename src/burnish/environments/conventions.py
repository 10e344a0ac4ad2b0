"""What a convention of tool calls is, and the decoding of calls that they share.

A finder takes a text and a position, and returns the next block of calls, or None. It never raises: a call that
cannot be read is a `ToolCall` with a `problem`, since a model must learn of its mistake.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

__all__ = [
    "Block",
    "Convention",
    "Find",
    "ToolCall",
    "Write",
    "call_from_object",
    "decode_json",
    "dump_json",
    "object_of",
]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call that a model wrote.

    Attributes:
        name: name of the tool; "" where none could be read.
        arguments: arguments by name; None where they could not be read.
        raw: the text of the call.
        id: the model's own identifier of the call; None where the convention has none.
        problem: the reason that the call is malformed, for the model; None for a well-formed call.
    """

    name: str
    arguments: dict[str, Any] | None
    raw: str = ""
    id: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Calls in a text, at the characters [start, end)."""

    start: int
    end: int
    calls: tuple[ToolCall, ...]


Find: TypeAlias = Callable[[str, int], Block | None]
Write: TypeAlias = Callable[[Sequence[ToolCall]], str]


@dataclass(frozen=True, slots=True)
class Convention:
    """A way to write calls.

    Attributes:
        find: return the first block at or after a position.
        write: write calls as a model would.
        reasoning: opening and closing tags of reasoning, in which nothing is a call.
        values_are_text: True where "42" and 42 are written alike, so that only a schema tells them apart.
        content: return what the assistant says apart from calls; None to cut the blocks out.
    """

    find: Find
    write: Write
    reasoning: tuple[tuple[str, str], ...] = (("<think>", "</think>"),)
    values_are_text: bool = False
    content: Callable[[str], str] | None = None


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its pairs.

    Raises:
        ValueError: a key stands twice, of which `dict` would silently keep the last.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


# Models write raw newlines in strings, which strict JSON forbids; nothing is lost by reading them.
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=object_of, parse_float=_finite, parse_constant=_finite)


def decode_json(text: str, start: int = 0) -> tuple[Any, int, str | None]:
    """Decode the JSON value at a position: the value, its end, and what is wrong with it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        return None, start, f"not valid JSON: {error.msg} at character {error.pos - start}"
    except RecursionError:
        return None, start, "JSON that is nested too deeply"
    except ValueError as error:
        return None, start, f"not valid JSON: {str(error)[:200]}"
    return value, end, None


def dump_json(value: Any) -> str:
    """Write JSON with the characters of all scripts as they are."""
    return json.dumps(value, ensure_ascii=False)


_KINDS: dict[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}


def call_from_object(value: Any, raw: str) -> ToolCall:
    """Read a decoded call: `{"name": ..., "arguments": {...}}`, or what else models and servers write for it."""
    if not isinstance(value, dict):
        kind = _KINDS.get(type(value), "null")
        return ToolCall("", None, raw, problem=f"a call is a JSON object with a name and arguments, not {kind}")
    fields = cast("dict[str, Any]", value)
    if isinstance(inner := fields.get("function"), dict):
        fields = {**fields, **inner}
    name, found = fields.get("name"), fields.get("id")
    identifier = found if isinstance(found, str) else None
    if not isinstance(name, str) or not name.strip():
        return ToolCall("", None, raw, identifier, 'the call has no "name"')
    key = "arguments" if "arguments" in fields else "parameters"
    others = sorted(fields.keys() - {"name", "id", "type", "function", key})
    arguments = fields.get(key)
    if key not in fields and others:
        return ToolCall(name, None, raw, identifier, f'the call has no "arguments", but the keys {dump_json(others)}')
    if isinstance(arguments, str):
        arguments, end, problem = decode_json(text := arguments.strip() or "{}")
        if problem or end < len(text):
            return ToolCall(name, None, raw, identifier, f'"arguments" are {problem or "JSON with text after it"}')
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        kind = _KINDS[type(arguments)]
        return ToolCall(name, None, raw, identifier, f'"arguments" must be a JSON object, not {kind}')
    return ToolCall(name.strip(), cast("dict[str, Any]", arguments), raw, identifier)
