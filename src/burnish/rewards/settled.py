"""Settled rewards: tell when no continuation of a completion can change its reward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

from burnish.errors import ConfigError, RewardError, show
from burnish.rewards.calls import accepted
from burnish.rewards.rubric import RewardFunction, Rubric

__all__ = ["SettledRule"]


class SettledRule:
    """Predicate of texts whose reward is settled: that of every criterion with a weight is.

    A reward function says so by an attribute `is_settled(text, **columns) -> bool`: True if its value is the same for
    every text that begins with `text`. `columns` are those of the row, less one named `text`; without `**columns` it
    gets only those that its signature names.

    Args:
        rubric: the criteria.

    Raises:
        ConfigError: a criterion with a weight has no `is_settled`, or no criterion has a weight.
    """

    def __init__(self, rubric: Rubric) -> None:
        gates = {gate for criterion in rubric.criteria if not criterion.never_counts for gate in criterion.gates}
        weighted = [c for c in rubric.criteria if not c.never_counts or c.name in gates]
        if not weighted:
            raise ConfigError(
                "stop_settled = True: every criterion has weight 0; give one a weight, or remove stop_settled."
            )
        self._predicates = {criterion.name: _predicate_of(criterion.function) for criterion in weighted}
        for name, (predicate, _) in self._predicates.items():
            if not callable(predicate):
                raise ConfigError(
                    f"stop_settled = True: criterion {name!r} has no is_settled, so no completion could be stopped. "
                    "Set until_closed = true (exact, numeric, math, gym, format), give the function an attribute "
                    "is_settled(text, **columns) -> bool, or remove stop_settled."
                )

    def __call__(self, text: str, row: Mapping[str, Any]) -> bool:
        """Tell whether no continuation of a text changes its reward.

        Args:
            text: text of a completion so far.
            row: columns of its prompt.

        Raises:
            RewardError: a predicate raised, or returned something other than a bool.
        """
        columns = {name: value for name, value in row.items() if name != "text"}
        return all(self._ask(name, text, columns) for name in self._predicates)

    def _ask(self, name: str, text: str, columns: Mapping[str, Any]) -> bool:
        predicate, options = self._predicates[name]
        where = f"is_settled of criterion {name!r}"
        try:
            answer: Any = predicate(text, **accepted(predicate, {**options, **columns}))
        except (Exception, SystemExit) as error:
            raise RewardError(f"{where} failed on {show(text)}: {type(error).__name__}: {error}.") from error
        if not isinstance(answer, bool):
            raise RewardError(f"{where} returned {show(answer)} for {show(text)}: return True or False.")
        return answer


def _predicate_of(function: RewardFunction) -> tuple[Any, dict[str, Any]]:
    """Return the `is_settled` of a reward function, None if it has none, and the options bound to the function."""
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not hasattr(function, "is_settled"):
        call = cast("functools.partial[Any]", function)
        function, options = call.func, {**call.keywords, **options}
    return getattr(function, "is_settled", None), options
