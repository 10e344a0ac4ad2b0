"""Tools: typed Python functions that a model calls, and their concurrent, time-limited execution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.formats import Message
from burnish.environments.conventions import ToolCall

__all__ = ["Tool", "ToolResult", "Toolbox"]


@dataclass(frozen=True, slots=True)
class ToolResult:
    """Result of a tool call, as the model reads it.

    Attributes:
        content: text; for a failed call, JSON such as `{"error": {"type": "timeout", "message": ...}}`.
        name: name of the tool that was called.
        id: the call's identifier.
        failed: True if the call has no result.
        error: the type of the failure; None for a result.
    """

    content: str
    name: str
    id: str | None = None
    failed: bool = False
    error: str | None = None

    def message(self) -> Message:
        """Return the result as a message with the role `tool`."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Tool:
    """A typed Python function that a model can call.

    Attributes:
        function: plain or async function, or bound method.
        name: name of the function.
        description: the docstring up to its first section; "" without one.
        schema: JSON schema in OpenAI's shape.
    """

    function: Callable[..., Any]
    name: str
    description: str
    schema: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any] | Tool) -> Tool:
        """Describe a function by its signature and docstring.

        Raises:
            ConfigError: the signature cannot be described.
        """
        raise NotImplementedError


class Toolbox:
    """The tools of a run.

    Args:
        tools: functions or `Tool`s.
        timeout_seconds: time limit of each call, from its own start.
        max_result_chars: longest result; the rest is cut and counted.
        max_concurrent_calls: calls that run at once.

    Raises:
        ConfigError: a function that cannot be a tool, or two tools with one name.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any] | Tool],
        *,
        timeout_seconds: float = 30.0,
        max_result_chars: int = 10_000,
        max_concurrent_calls: int = 256,
    ) -> None:
        raise NotImplementedError

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """JSON schemas, for chat templates."""
        raise NotImplementedError

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run calls concurrently; each gets a result, in order, whatever goes wrong."""
        raise NotImplementedError
