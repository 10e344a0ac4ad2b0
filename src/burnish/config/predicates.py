"""Questions about a value that several rooms ask."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["is_number", "is_seed", "is_text", "text_problem"]


def is_number(value: Any) -> bool:
    """A finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )


def is_seed(value: Any) -> bool:
    """A seed that every generator takes; numpy's are below 2^32."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def is_text(value: Any) -> bool:
    """A text that is not empty."""
    return isinstance(value, str) and value != ""


def text_problem(text: str) -> str | None:
    """What keeps a text from being written to a file or given to the system, and the fix."""
    if "\0" in text:
        return "it holds a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "it holds half a character (a lone surrogate); write whole characters"
    return None
