"""What the value of a field must satisfy, for the tables of rules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from enum import Enum
from typing import Any, TypeAlias, cast

from burnish.config.inherited import words_of

__all__ = [
    "Rule", "above", "as_names", "at_least", "count", "is_fraction", "is_in", "is_number", "is_seed", "is_table",
    "is_text", "list_of", "one_of", "optional", "text_problem", "words_or_members",
]  # fmt: skip

Rule: TypeAlias = tuple[str, Callable[[Any], bool], str | Callable[[], str]]
"""A field, what its value must satisfy, and the fix (called where names may have been added)."""


def is_number(value: Any) -> bool:
    """A finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def at_least(minimum: float) -> Callable[[Any], bool]:
    """A finite number of at least so much."""
    return lambda value: is_number(value) and value >= minimum


def above(bound: float) -> Callable[[Any], bool]:
    """A finite number above a bound."""
    return lambda value: is_number(value) and value > bound


def count(minimum: int) -> Callable[[Any], bool]:
    """An integer of at least so much."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """None, or what the rule asks."""
    return lambda value: value is None or rule(value)


def one_of(*allowed: object) -> Callable[[Any], bool]:
    """One of these words or constants."""
    return lambda value: any(value is one or (isinstance(value, str) and value == one) for one in allowed)


def is_in(names: Collection[str]) -> Callable[[Any], bool]:
    """A name in a collection that may grow."""
    return lambda value: isinstance(value, str) and value in names


def list_of(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list that is not empty, of what the rule asks."""
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(rule(item) for item in value)


def is_fraction(value: Any) -> bool:
    """A number in [0, 1]."""
    return is_number(value) and 0 <= value <= 1


def as_names(value: Any) -> list[Any]:
    """One name or several, as a list."""
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else [value]


def is_seed(value: Any) -> bool:
    """A seed that every generator takes; numpy's are below 2^32."""
    return count(0)(value) and value < 2**32


def is_text(value: Any) -> bool:
    """A text that is not empty."""
    return isinstance(value, str) and value != ""


def is_table(value: Any) -> bool:
    """A table, or the text of one in JSON, which transformers takes on command lines."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, dict)


def text_problem(text: str) -> str | None:
    """What keeps a text from being written to a file or given to the system, and the fix."""
    if "\0" in text:
        return "it holds a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate); write whole characters"
    return None


def words_or_members(path: str, class_name: str) -> tuple[Callable[[Any], bool], Callable[[], str]]:
    """Ask for a member or a word of one of transformers' enumerations, and say which there are."""
    return (
        lambda value: isinstance(value, Enum) or (isinstance(value, str) and value in words_of(path, class_name)),
        lambda: f"use one of {', '.join(words_of(path, class_name))}",
    )
