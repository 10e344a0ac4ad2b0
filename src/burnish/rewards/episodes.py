"""Criteria of episodes: what the environment itself says of them, and how their tools were called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.types import Episode

__all__ = ["EnvironmentReward", "valid_tool_calls"]


@dataclass(frozen=True)
class EnvironmentReward:
    """Reward function that returns the environment's own reward; None where it gives none.

    Args:
        environment: name of the environment, that of its class; None for any.
        per_turn: return the rewards of the turns instead.
    """

    environment: str | None = None
    per_turn: bool = False

    def __call__(self, episodes: Sequence[Episode | None] = (), **columns: Any) -> list[float | list[float] | None]:
        return [None if e is None or self.environment not in (None, e.name) else self._value(e) for e in episodes]

    def _value(self, episode: Episode) -> float | list[float] | None:
        if not self.per_turn:
            return episode.reward
        if all(reward is None for reward in episode.rewards):
            return None
        return [reward or 0.0 for reward in episode.rewards]


def valid_tool_calls() -> Any:
    """Make a reward function that returns the fraction of an episode's tool calls that gave no error.

    It does not apply to an episode without calls.
    """

    def tool_calls(episodes: Sequence[Episode | None] = (), **columns: Any) -> list[float | None]:
        return [None if e is None or not e.num_calls else 1.0 - e.num_failed_calls / e.num_calls for e in episodes]

    return tool_calls
