"""The Environment protocol: what a policy acts on over the turns of an episode."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from burnish.data.formats import Message
from burnish.rewards.calls import in_thread

if TYPE_CHECKING:
    from burnish.environments.formats import ToolFormat

__all__ = ["Environment", "Reply", "called"]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a turn of the policy.

    Attributes:
        messages: what the policy reads next, as chat messages; they are never in the loss. Without any, the episode
            ends.
        done: True ends the episode; `messages` are then not read by anyone.
        reward: the environment's reward of this turn; None for none.
        calls: tool calls that the turn made.
        failed_calls: those that gave an error.
    """

    messages: Sequence[Message] = ()
    done: bool = False
    reward: float | None = None
    calls: int = 0
    failed_calls: int = 0


class Environment:
    """One task over several turns; subclass it, and override `step` at least.

    An instance plays one episode at a time: `reset`, then `step` after each turn of the policy, then `reward` and
    `close`. `reset`, `step`, `reward` and `close` may be async; plain ones run in threads, so that episodes do not wait
    for one another. An exception in any method excludes the completion from the loss, with its reason; an error that
    the policy has caused and should see is a message of the reply.

    Attributes:
        tool_format: reads and writes tool calls in the format of the run's chat template; set before an episode.
    """

    tool_format: ToolFormat | None = None

    @property
    def name(self) -> str:
        """The name of the environment in metrics and criteria: that of its class."""
        return type(self).__name__

    @property
    def exposed(self) -> Any:
        """The object that reward functions receive in `environments`."""
        return self

    def schemas(self) -> Sequence[dict[str, Any]]:
        """Return the JSON schemas of the tools that the prompt describes."""
        return ()

    def reset(
        self, row: Mapping[str, Any], seed: int
    ) -> Sequence[Message] | Awaitable[Sequence[Message] | None] | None:
        """Begin an episode.

        Args:
            row: the columns of the data set's row.
            seed: equal for all episodes of a group, which then share their opening; it differs from step to step.

        Returns:
            The conversation that the first turn answers; None for the row's own prompt.
        """
        return None

    def step(self, text: str) -> Reply | Awaitable[Reply]:
        """Answer a turn of the policy: its text, without the tokens that end a turn."""
        raise NotImplementedError

    async def cut(self, text: str) -> None:
        """Receive a last turn that the limit on tokens has cut off, in place of `step`; it may be plain, too."""

    def message(self, text: str) -> Message:
        """Return a turn as a chat message, as the template and the reward functions read it."""
        return {"role": "assistant", "content": text}

    def reward(self) -> float | Awaitable[float | None] | None:
        """Return the environment's own reward of the whole episode; None if it gives none."""
        return None

    def close(self) -> Awaitable[None] | None:
        """End the episode; its completion has been scored."""


async def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Await an async function; call a plain one in a thread, where it cannot hold up other episodes."""
    if inspect.iscoroutinefunction(function):
        return await function(*args, **kwargs)
    result = await asyncio.wrap_future(in_thread(function, *args, **kwargs))
    return await result if inspect.isawaitable(result) else result
