"""Values that no field of a type takes, and values that one may take: decided from the annotation alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["BAD_PATHS", "bad_values", "kinds_of"]

_NESTED: Any = "x"
for _ in range(30):
    _NESTED = [_NESTED]

_CANDIDATES: tuple[tuple[str, Any], ...] = (
    ("bool", True), ("int", 3), ("float", 1.5), ("str", "nonsense"), ("list", ["x"]), ("list", [[1], {"a": "b"}]),
    ("dict", {"a": 1}), ("dict", {"a": {"b": [1]}}), ("list", []), ("dict", {}), ("none", None),
)  # fmt: skip

_NEVER: tuple[tuple[str, str, Any], ...] = (
    ("int", "10**23", 10**23), ("int", "-10**23", -(10**23)), ("int", "2**63", 2**63), ("int", "10**400", 10**400),
    ("float", "nan", math.nan), ("float", "-inf", -math.inf), ("float", "10**400", 10**400), ("float", "'nan'", "nan"),
    ("float", "'inf'", "inf"), ("float", "'1e'", "1e"), ("float", "'1,5'", "1,5"), ("float", "''", ""),
    ("int", "'5'", "5"), ("int", "3.5", 3.5), ("int", "nan", math.nan), ("int", "inf", math.inf), ("int", "''", ""),
    ("bool", "'true'", "true"), ("bool", "1", 1), ("bool", "0", 0), ("bool", "1.0", 1.0), ("bool", "''", ""),
    ("str", "NUL", "a\0b"), ("str", "half a character", "a\ud83d"),
)  # fmt: skip

BAD_PATHS: tuple[tuple[str, str], ...] = (
    ("empty", ""), ("blank", "   "), ("NUL", "a\0b"), ("half a character", "a\ud800"), ("a name too long", "n" * 300),
    ("a path too long", "/".join(["n" * 100] * 60)), ("a file", "file"), ("below a file", "file/below/it"),
    ("below a device", "/dev/null/x"),
)  # fmt: skip


def kinds_of(annotation: str) -> set[str]:
    """The types that an annotation allows, as `bool`, `int`, `float`, `str`, `list`, `dict`, `none` and `any`."""
    outer = annotation
    for _ in range(0 if annotation.startswith(("Optional", "Union")) else annotation.count("[")):
        outer = re.sub(r"\[[^\[\]]*\]", "", outer)
    found = set(re.findall(r"\b(bool|int|float|str|list|dict|Any)\b", outer))
    if "None" in annotation or "Optional" in annotation:
        found.add("none")
    if "Literal" in annotation:
        found |= {"bool"} if re.search("True|False", annotation) else {"str"}
        found.add("str")
    if "tuple" in annotation:
        found.add("list")
    return {"any" if kind == "Any" else kind for kind in found}


def bad_values(annotation: str) -> Iterator[tuple[str, Any]]:
    """Names and values that a field of the annotation must refuse, whatever it means."""
    kinds = kinds_of(annotation)
    if "any" in kinds:
        return
    for kind, value in _CANDIDATES:
        fits = kind in kinds or (kind == "int" and "float" in kinds)
        if not fits:
            yield f"{type(value).__name__} {value!r:.20}", value
    numbers = kinds & {"int", "float"}
    for kind, name, value in _NEVER:
        if kind not in kinds:
            continue
        if kind == "str" or (isinstance(value, str) and "str" in kinds and kind != "str"):
            if kind == "str" and "str" in kinds:
                yield name, value
            continue
        if kind == "int" and isinstance(value, float) and "float" in numbers and math.isfinite(value):
            continue
        if kind == "int" and value in (10**23, -(10**23), 2**63) and "float" in numbers:
            continue
        if kind == "bool" and (numbers and not isinstance(value, str)):
            continue
        yield f"{kind} {name}", value
    if not kinds & {"list", "dict"}:
        yield "30 lists in each other", _NESTED
