"""Write values as TOML, for messages that users can paste."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

__all__ = ["as_toml", "toml_line"]

Value: TypeAlias = "str | bool | int | float | Sequence[Value] | Mapping[str, Value]"

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def toml_line(name: str, value: Value) -> str:
    """Write one line of a run file, `name = value`."""
    return f"{name if _BARE.fullmatch(name) else as_toml(name)} = {as_toml(value)}"


def as_toml(value: Value) -> str:
    """Write a value in one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(toml_line(name, one) for name, one in value.items()) + " }"
    if isinstance(value, str):
        # TOML has JSON's escapes, but does not allow a bare DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Sequence):
        return "[" + ", ".join(as_toml(one) for one in value) + "]"
    return str(value).lower()
