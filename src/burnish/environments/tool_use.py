"""The environment of a policy that calls tools: typed functions, or the methods of an object with a state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from burnish.data.formats import Message
from burnish.environments.environment import Environment, Reply, called
from burnish.environments.formats import ToolFormat
from burnish.environments.tool_sets import ToolSet
from burnish.environments.tools import Tool, Toolbox

__all__ = ["ToolEnvironment", "public_methods"]


def public_methods(subject: Any) -> list[Callable[..., Any] | Tool]:
    """Return the tools of an object: its public methods, but for those of TRL's protocol, or those of a `ToolSet`."""
    if isinstance(subject, ToolSet):
        return [*subject.tools]
    names = [name for name, _ in inspect.getmembers(type(subject), inspect.isroutine) if not name.startswith("_")]
    return [getattr(subject, name) for name in names if name not in ("reset", "get_reward")]


class ToolEnvironment(Environment):
    """Calls the tools that a turn asks for, until a turn asks for none.

    Args:
        toolbox: the tools.
        tool_format: reads calls from the text of a turn.
        subject: object with a state, whose methods are among the tools; as TRL's, it has `reset(**row)`, which may
            return text for the prompt's last message, and `get_reward()` where it owns the reward.
        hides: columns that `reset` does not receive.
        recycle: takes the environment back at the end of an episode.
    """

    def __init__(
        self,
        toolbox: Toolbox,
        tool_format: ToolFormat,
        *,
        subject: Any = None,
        hides: frozenset[str] = frozenset(),
        recycle: Callable[[Environment], None] | None = None,
    ) -> None:
        self._toolbox, self._format, self._subject = toolbox, tool_format, subject
        self._hides, self._recycle = hides, recycle
        self._schemas = toolbox.schemas

    @property
    def name(self) -> str:
        """The name of the object's class."""
        if self._subject is None or isinstance(self._subject, ToolSet):
            return getattr(self._subject, "name", "tools")
        return type(self._subject).__name__

    @property
    def exposed(self) -> Any:
        """The object with the state."""
        return self._subject

    def schemas(self) -> Sequence[dict[str, Any]]:
        """Return the schemas of the tools."""
        return self._schemas

    async def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | None:
        """Reset the object; append what it returns to the last message of the prompt."""
        if self._subject is None:
            return None
        columns = {name: value for name, value in row.items() if name not in self._hides}
        seen = await called(self._subject.reset, **columns)
        if seen is None:
            return None
        if not isinstance(seen, str | list):
            raise TypeError(f"reset() returned {type(seen).__name__}: return text for the prompt, or None")
        *before, last = row["prompt"]
        content = last["content"]
        if isinstance(content, str) and isinstance(seen, str):
            return [*before, {**last, "content": content + seen}]
        blocks = [[{"type": "text", "text": part}] if isinstance(part, str) else part for part in (content, seen)]
        return [*before, {**last, "content": [*blocks[0], *blocks[1]]}]

    def message(self, text: str) -> Message:
        """Return a turn with its tool calls."""
        return self._format.message(text, self._schemas)

    def step(self, text: str) -> Reply:
        """Run the calls of a turn concurrently; errors are answers, which the policy reads."""
        calls = self._format.parse(text, self._schemas)
        results = self._toolbox.run(calls)
        return Reply(
            [result.message() for result in results],
            done=not results,
            calls=len(results),
            failed_calls=sum(result.failed for result in results),
        )

    async def reward(self) -> float | None:
        """Return the object's own reward."""
        if not hasattr(self._subject, "get_reward"):
            return None
        return await called(self._subject.get_reward)

    def close(self) -> None:
        """Make the environment available to another episode."""
        if isinstance(self._subject, ToolSet):
            self._subject.close()
        if self._recycle is not None:
            self._recycle(self)
