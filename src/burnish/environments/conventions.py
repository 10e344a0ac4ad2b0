"""Tool calls as models write them: one finder and one writer for each convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ToolCall"]


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
