"""Formats of tool calls, and the choice of the one that a chat template renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.formats import Message
from burnish.environments.conventions import ToolCall

__all__ = ["TOOL_FORMATS", "ToolCall", "ToolFormat", "describes_tools", "system_text", "tool_format"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A convention in which models write tool calls.

    Attributes:
        name: key of `TOOL_FORMATS`.
        in_template: True if the chat template renders `tool_calls` of messages in this format.
        encodes_arguments: True if the template takes the arguments of a call as JSON text instead of an object.
    """

    name: str
    in_template: bool = True
    encodes_arguments: bool = False

    def parse(self, text: str, schemas: Sequence[Mapping[str, Any]] | None = None) -> list[ToolCall]:
        """Read the calls in what the assistant wrote (special tokens kept); malformed ones carry a `problem`.

        Args:
            text: completion, decoded with its special tokens.
            schemas: the tools' schemas, by which conventions that write values as plain text tell "42" from 42.
        """
        raise NotImplementedError

    def strip(self, text: str) -> str:
        """Return the text without its calls."""
        raise NotImplementedError

    def render(self, calls: Sequence[ToolCall]) -> str:
        """Write calls as a model would."""
        raise NotImplementedError

    def message(self, text: str, schemas: Sequence[Mapping[str, Any]] | None = None) -> Message:
        """Return the assistant's message that the chat template renders as this text."""
        raise NotImplementedError


TOOL_FORMATS: dict[str, ToolFormat] = {}
"""Name -> format, in the order in which they are tried on a chat template."""


def tool_format(tokenizer: Any, template: str, choice: str | None = None) -> ToolFormat:
    """Choose the format in which a chat template renders tool calls.

    Args:
        tokenizer: tokenizer or processor.
        template: resolved Jinja source.
        choice: key of `TOOL_FORMATS`; None to find it by a round trip through the template.

    Raises:
        ConfigError: an unknown choice, or a template whose calls no format reads.
    """
    raise NotImplementedError


def describes_tools(tokenizer: Any, template: str, schemas: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if a chat template renders the tools that it is given."""
    raise NotImplementedError


def system_text(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Describe tools, and the hermes format of calls, for templates that do not."""
    raise NotImplementedError
