"""Tools that an environment offers as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.environments.tools import Tool

__all__ = ["ToolSet"]


class ToolSet:
    """Tools that are not methods of an object: where a factory makes one, an episode offers its tools.

    Args:
        tools: the tools of an episode.
        name: name of the environment in metrics.
    """

    def __init__(self, tools: Sequence[Tool], name: str = "tools") -> None:
        self.tools, self.name = list(tools), name

    async def reset(self, **row: Any) -> None:
        """Begin an episode."""

    def close(self) -> None:
        """End an episode, without waiting."""
