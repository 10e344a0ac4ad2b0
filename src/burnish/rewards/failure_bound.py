"""Bound on rewards that fail: a run that can no longer grade is stopped, with a report of why."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from burnish.errors import RewardError

__all__ = ["FailureBound"]

_ROLLOUTS = 8
"""Rollouts that the fraction is taken over, so that a service may be gone for a moment."""
_FEWEST_ROLLOUTS = 2


class FailureBound:
    """Stop a run whose rewards fail on too many completions of the last rollouts.

    Args:
        most: largest fraction of completions whose reward fails; 1 never stops.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._counts: deque[tuple[int, int]] = deque(maxlen=_ROLLOUTS)
        self._errors: deque[Counter[str]] = deque(maxlen=_ROLLOUTS)
        self._examples: dict[str, str] = {}

    def add(self, failures: Iterable[bool], errors: Iterable[Mapping[str, str]]) -> None:
        """Count the completions of a rollout.

        Args:
            failures: whether the reward of each completion failed, on all ranks.
            errors: messages by criterion of this rank's completions.

        Raises:
            RewardError: too many failed; it counts the failures by criterion.
        """
        found, kinds = list(failures), list(errors)
        self._counts.append((sum(found), len(found)))
        self._errors.append(Counter(name for messages in kinds for name in messages))
        for messages in kinds:
            self._examples |= messages
        failed, total = (sum(column) for column in zip(*self._counts, strict=True))
        if len(self._counts) < _FEWEST_ROLLOUTS or failed <= self._most * total:
            return
        counts = sum(self._errors, Counter[str]())
        named = (f"{name} {count} times, last: {self._examples[name]}" for name, count in counts.most_common())
        raise RewardError(
            f"rewards failed on {failed} of {total} completions of the last {len(self._counts)} rollouts, more than "
            f"max_failed_rewards = {self._most:g} allows: {'; '.join(named) or 'on other ranks'}. Correct what fails, "
            "or raise max_failed_rewards."
        )
