"""Checks of single values, shared by several packages."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["is_number", "is_seed", "is_text", "parse_size", "text_problem"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gb|gib)", re.IGNORECASE)


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def is_seed(value: Any) -> bool:
    """Return True for a seed of every random generator; numpy's are below 2^32."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def is_text(value: Any) -> bool:
    """Return True for a text that is not empty."""
    return isinstance(value, str) and value != ""


def parse_size(text: str) -> int | None:
    """Return the bytes of a size such as 8GB (10^9 bytes) or 7.5GiB (2^30), or None."""
    found = _SIZE.fullmatch(text.strip())
    size = 0 if found is None else round(float(found[1]) * (2**30 if found[2].lower() == "gib" else 1e9))
    return size or None


def text_problem(text: str) -> str | None:
    """Return why a text cannot be written to a file or passed to the system, with the fix, or None."""
    if "\0" in text:
        return "it contains a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it contains half a character (a lone surrogate); write whole characters"
    return None
