"""Safe handling of untrusted values: JSON parsing, checks for broken text, and short representations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from burnish.errors import DataError

__all__ = ["check_text", "half_character", "object_of", "parse_json", "repeated", "short"]


def parse_json(text: str, where: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse a JSON text.

    Args:
        text: JSON.
        where: its location, for messages.
        object_pairs_hook: see `json.loads`.

    Raises:
        DataError: not JSON, nested too deeply, or a number with more digits than Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{where} is JSON nested too deeply: flatten it, or drop the row.") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{where} holds a number with too many digits: write it as a string.") from error


def object_of(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object from its pairs; json alone would silently keep the last of two equal keys.

    Raises:
        DataError: a duplicate key.
    """
    if (twice := repeated([key for key, _ in pairs])) is not None:
        raise DataError(f"{where} has the key {twice!r} twice: rename or remove one.")
    return dict(pairs)


def repeated(names: Sequence[str]) -> str | None:
    """Return the first duplicate name, or None."""
    if len(set(names)) == len(names):
        return None
    return next(name for position, name in enumerate(names) if name in names[:position])


def short(value: Any) -> str:
    """Represent any value in at most 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 80 else text[:77] + "..."


def check_text(value: Any, row: str, column: str) -> None:
    """Refuse strings that UTF-8 cannot encode, at any depth.

    Raises:
        DataError: a lone surrogate, or nesting that Python cannot walk.
    """
    try:
        broken = _broken(value)
    except RecursionError as error:
        raise DataError(f"{row}: column {column} is nested too deeply: flatten it, or drop the column.") from error
    if broken is not None:
        raise DataError(f"{row}: {half_character(broken, f'in column {column}, ')}")


def half_character(text: str, where: str = "") -> str | None:
    """Describe the lone surrogate in a text that UTF-8 cannot encode; None for any other text."""
    spot = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if spot is None:
        return None
    return (
        f"the text holds half a character ({where}a lone surrogate, {text[spot]!r} at character {spot}): it was cut "
        "within an emoji or decoded wrongly; repair the text, or drop the row."
    )


def _broken(value: Any) -> str | None:
    """Return the first string with a lone surrogate."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return value
        return None
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return next((text for pair in pairs for part in pair if (text := _broken(part)) is not None), None)
    if isinstance(value, list | tuple):
        parts = cast("list[Any]", value)
        if parts and isinstance(parts[0], int | float):  # token ids or numbers, which need no walk
            return None
        return next((text for part in parts if (text := _broken(part)) is not None), None)
    return None
