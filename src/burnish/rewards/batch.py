"""Calls of one criterion on the completions of a rollout: all at once, one by one, by prompt, or from a cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from burnish.errors import RewardError
from burnish.rewards.calls import Call, CallTimeout, accepted
from burnish.rewards.criterion import Criterion
from burnish.rewards.notes import Notes, as_list
from burnish.types import Completion, Episode, Group

__all__ = ["OWN_ARGUMENTS", "Batch", "Grading", "LogMetric", "Outcome", "flatten"]

Outcome: TypeAlias = float | Exception | None
"""Value of a completion, why it has none, or None where the criterion does not apply."""
LogMetric: TypeAlias = Callable[[str, float], object]

OWN_ARGUMENTS = frozenset(
    {
        "completion_ids", "completions", "environments", "episodes", "log_extra", "log_metric", "prompts",
        "trainer_state",
    }
)  # fmt: skip
"""Arguments of reward functions, which are reserved as column names."""
_LIVE = frozenset({"environments", "episodes"})
"""Columns of objects rather than data."""
_MOST_TIMEOUTS = 3
"""Completions of a call that may time out, each in a separate call, before the remaining ones are skipped."""
_MOST_CACHED = 100_000
"""Values that a cache holds; the oldest make room."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Completions of several prompts as the arguments of a call: parallel lists.

    Attributes:
        groups: number of the group that each completion belongs to.
        labels: names of the completions in messages.
        prompts: prompt of each.
        completions: text, or messages, of each.
        completion_ids: tokens of each.
        columns: the other columns of the data set; of episodes also their records, live environments and fields.
        extras: columns that functions log for each completion.
    """

    groups: list[int]
    labels: list[str]
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    extras: list[dict[str, Any]]

    def part(self, indices: Sequence[int]) -> Batch:
        """Return some of the completions; what functions log of them is theirs here too."""

        def chosen(values: list[Any]) -> list[Any]:
            return [values[i] for i in indices]

        columns = {name: chosen(values) for name, values in self.columns.items()}
        lists = (self.groups, self.labels, self.prompts, self.completions, self.completion_ids)
        return Batch(*map(chosen, lists), columns=columns, extras=chosen(self.extras))

    def key(self, i: int) -> str:
        """Return a hash of all that a function may know of one completion."""
        columns = {name: values[i] for name, values in self.columns.items() if name not in _LIVE}
        known = [self.prompts[i], self.completions[i], self.completion_ids[i], columns]
        return hashlib.sha256(json.dumps(known, sort_keys=True, default=repr).encode()).hexdigest()

    def arguments(self) -> dict[str, Any]:
        """Copy the lists, so that a function that modifies its arguments does not affect the next one."""
        lists = {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.completion_ids}
        return {name: list(values) for name, values in (self.columns | lists).items()}


def flatten(groups: Sequence[Group]) -> Batch:
    """Return the completions of groups as parallel lists.

    Raises:
        RewardError: a row has no prompt.
    """
    rows = [(group, i) for group in groups for i in range(len(group.completions))]
    for group, _ in rows:
        if "prompt" not in group.row:
            raise RewardError(
                f"the row of prompt {group.index} has no column 'prompt' (it has: {', '.join(map(str, group.row))}): "
                f"rewards receive the prompt as the data set gives it."
            )
    names = dict.fromkeys(name for group in groups for name in group.row if name not in {"prompt", *OWN_ARGUMENTS})
    completions = [group.completions[i] for group, i in rows]
    prompts = [group.row["prompt"] for group, _ in rows]
    columns: dict[str, list[Any]] = {name: [group.row.get(name) for group, _ in rows] for name in names}
    if any(completion.episode is not None for completion in completions):
        episodes = [completion.episode or Episode() for completion in completions]
        columns |= {
            "episodes": [completion.episode for completion in completions],
            "environments": [getattr(episode.environment, "exposed", None) for episode in episodes],
        }
        for name in dict.fromkeys(name for episode in episodes for name in episode.fields):
            columns[name] = [episode.fields.get(name) for episode in episodes]
    return Batch(
        groups=[place for place, group in enumerate(groups) for _ in group.completions],
        labels=[f"prompt {group.index}, completion {i}" for group, i in rows],
        prompts=prompts,
        completions=[_as_given(prompt, c) for prompt, c in zip(prompts, completions, strict=True)],
        completion_ids=[completion.token_ids for completion in completions],
        columns=columns,
        extras=[{} for _ in rows],
    )


def _as_given(prompt: Any, completion: Completion) -> Any:
    """Return a completion as the prompt is given: text, or messages, which are those of an episode."""
    if isinstance(prompt, str):
        return completion.text
    if completion.episode is not None and completion.episode.messages:
        return [dict(message) for message in completion.episode.messages]
    return [{"role": "assistant", "content": completion.text}]


class Grading:
    """One criterion on a batch: its calls start at once, and end in `outcomes`.

    Args:
        criterion: the function, and how to call it.
        batch: the completions.
        shared: further arguments.
        log_metric: receives the metrics that functions log in calls that succeed; None drops them.
        known: values of earlier batches by completion, which is added to; None without a cache.
    """

    def __init__(
        self,
        criterion: Criterion,
        batch: Batch,
        shared: dict[str, Any],
        log_metric: LogMetric | None,
        known: dict[str, float | None] | None = None,
    ) -> None:
        self._criterion, self._batch, self._shared, self._log_metric = criterion, batch, shared, log_metric
        self._known = known
        size = len(batch.labels)
        self._keys = [str(i) for i in range(size)] if known is None else [batch.key(i) for i in range(size)]
        # Equal completions are graded once.
        new = sorted({key: i for i, key in enumerate(self._keys) if known is None or key not in known}.values())
        parts = [new]
        if criterion.per_group:
            parts = [list(part) for _, part in itertools.groupby(new, key=lambda i: batch.groups[i])]
        self._started = [(part, *self._start(batch.part(part))) for part in parts if part]

    def outcomes(self) -> list[Outcome]:
        """Wait for the calls; return one outcome per completion."""
        found: dict[str, Outcome] = {}
        for part, call, notes in self._started:
            found |= zip((self._keys[i] for i in part), self._finish(self._batch.part(part), call, notes), strict=True)
        if self._known is None:
            return [found[key] for key in self._keys]
        outcomes = [found[key] if key in found else self._known[key] for key in self._keys]
        self._known |= {key: value for key, value in found.items() if not isinstance(value, Exception)}
        for key in list(self._known)[: max(0, len(self._known) - _MOST_CACHED)]:
            del self._known[key]
        return outcomes

    def _start(self, batch: Batch) -> tuple[Call, Notes]:
        size, criterion = len(batch.labels), self._criterion
        call, notes = Call(criterion.name, size, criterion.timeout_seconds), Notes(size)
        loggers = {"log_extra": notes.log_extra, "log_metric": notes.log_metric}
        arguments = batch.arguments() | self._shared | loggers
        call.start(criterion.function, accepted(criterion.function, arguments))
        return call, notes

    def _finish(self, batch: Batch, call: Call, notes: Notes) -> list[Outcome]:
        size, criterion = len(batch.labels), self._criterion
        try:
            result = call.result()
        except Exception as error:
            if size == 1 or criterion.per_group or not criterion.isolate:
                return [error] * size
            return self._one_by_one(batch)
        values = as_list(result)
        if values is None:
            return [TypeError(f"it returned {type(result).__name__}, not a list of {size} numbers")] * size
        if len(values) != size:
            # Not truncated, padded or broadcast: values could end up with the wrong completions.
            return [ValueError(f"it returned {len(values)} values for {size} completions")] * size
        notes.settle(criterion.name, batch.extras, self._log_metric)
        return [_as_number(value) for value in values]

    def _one_by_one(self, batch: Batch) -> list[Outcome]:
        """Grade each completion in a separate call; after several time-outs, skip the rest."""
        singles = [batch.part([i]) for i in range(len(batch.labels))]
        started: list[tuple[Call, Notes] | None] = []
        for single in singles:
            late = sum(call is not None and call[0].timed_out for call in started)
            started.append(self._start(single) if late < _MOST_TIMEOUTS else None)
        untried = CallTimeout(f"not tried, since {_MOST_TIMEOUTS} completions of this call took too long")
        return [
            untried if call is None else self._finish(single, *call)[0]
            for call, single in zip(started, singles, strict=True)
        ]


def _as_number(value: Any) -> Outcome:
    if value is None or isinstance(value, Exception):
        return value
    if hasattr(value, "item") and getattr(value, "size", None) != 0:  # a NumPy scalar or a tensor of one element
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            return TypeError(f"its value is not one number: {error}")
    if not isinstance(value, int | float):
        return TypeError(f"its value is {value!r:.80}, of type {type(value).__name__}, not a number or None")
    number = float(value)
    return number if math.isfinite(number) else ValueError(f"its value is {number}, not a finite number")
