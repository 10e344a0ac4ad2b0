"""Calls of one criterion on the completions of a rollout: all at once, one by one, by prompt, or from a cache."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

from burnish.errors import RewardError
from burnish.rewards.calls import Call, CallTimeout, accepted
from burnish.rewards.criterion import Criterion
from burnish.rewards.notes import Notes, as_list
from burnish.types import Completion, Episode, Group

__all__ = ["OWN_ARGUMENTS", "Batch", "Grading", "LogMetric", "Outcome", "PerTurn", "column_names", "flatten"]

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


def column_names(groups: Sequence[Group]) -> list[str]:
    """Return the columns that functions get of groups, beside the prompt."""
    names = dict.fromkeys(name for group in groups for name in group.row)
    return [name for name in names if name not in {"prompt", *OWN_ARGUMENTS}]


def flatten(groups: Sequence[Group], names: Sequence[str]) -> Batch:
    """Return the completions of groups as parallel lists.

    Args:
        groups: prompts with their completions.
        names: columns, which a row may lack.

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


@dataclass(frozen=True, slots=True)
class _Part:
    """One call of a criterion's function.

    Attributes:
        batch: the completions of the call.
        keys: what names each one's outcome.
        call: the call.
        notes: what the function logs in it.
    """

    batch: Batch
    keys: list[str]
    call: Call
    notes: Notes


class PerTurn(float):
    """The value of a criterion that judges turns: the sum of its `turns`."""

    turns: list[float]

    def __new__(cls, turns: Sequence[float]) -> Self:
        """Add up the values of turns."""
        value = super().__new__(cls, math.fsum(turns))
        value.turns = list(turns)
        return value


class Grading:
    """One criterion on the completions of a rollout: `start` begins calls, and `outcomes` ends them.

    Args:
        criterion: the function, and how to call it.
        shared: further arguments.
        known: values of earlier rollouts by completion, which is added to; None without a cache.
    """

    def __init__(self, criterion: Criterion, shared: dict[str, Any], known: dict[str, float | None] | None) -> None:
        self._criterion, self._shared, self._known = criterion, shared, known
        self._begun: dict[int, tuple[list[str], list[_Part]]] = {}

    def start(self, batch: Batch, position: int = 0) -> None:
        """Start the calls on completions.

        Args:
            batch: the completions.
            position: order of these among the completions of other calls of `start`.
        """
        criterion, known, size = self._criterion, self._known, len(batch.labels)
        keys = [f"{position}, {i}" for i in range(size)] if known is None else [batch.key(i) for i in range(size)]
        # Equal completions are graded once.
        new = sorted({key: i for i, key in enumerate(keys) if known is None or key not in known}.values())
        parts = [new]
        if criterion.per_group:
            parts = [list(part) for _, part in itertools.groupby(new, key=lambda i: batch.groups[i])]
        in_thread = criterion.overlaps and not inspect.iscoroutinefunction(criterion.function)
        started = [self._call(batch.part(p), [keys[i] for i in p], in_thread=in_thread) for p in parts if p]
        self._begun[position] = (keys, started)

    def outcomes(self, log_metric: LogMetric | None) -> list[Outcome]:
        """Wait for the calls; return one outcome per completion.

        Args:
            log_metric: receives the metrics that functions log in calls that succeed; None drops them.
        """
        # In the order of the groups, whichever was sampled first.
        begun = [self._begun[position] for position in sorted(self._begun)]
        found: dict[str, Outcome] = {}
        failed: list[_Part] = []
        for part in (part for _, parts in begun for part in parts):
            values = self._values(part, log_metric)
            if not isinstance(values, Exception):
                found |= zip(part.keys, values, strict=True)
            elif len(part.keys) == 1 or self._criterion.per_group or not self._criterion.isolate:
                found |= dict.fromkeys(part.keys, values)
            else:
                failed.append(part)
        found |= self._one_by_one(failed, log_metric)
        keys = [key for names, _ in begun for key in names]
        if self._known is None:
            return [found[key] for key in keys]
        outcomes = [found[key] if key in found else self._known[key] for key in keys]
        self._known |= {key: value for key, value in found.items() if not isinstance(value, Exception)}
        for key in list(self._known)[: max(0, len(self._known) - _MOST_CACHED)]:
            del self._known[key]
        return outcomes

    def _call(self, batch: Batch, keys: list[str], *, in_thread: bool = False) -> _Part:
        size, criterion = len(batch.labels), self._criterion
        call, notes = Call(criterion.name, size, criterion.timeout_seconds), Notes(size)
        loggers = {"log_extra": notes.log_extra, "log_metric": notes.log_metric}
        arguments = batch.arguments() | self._shared | loggers
        call.start(criterion.function, accepted(criterion.function, arguments), in_thread=in_thread)
        return _Part(batch, keys, call, notes)

    def _values(self, part: _Part, log_metric: LogMetric | None) -> Sequence[Outcome] | Exception:
        """Return one outcome per completion, or the exception of the call."""
        size = len(part.keys)
        try:
            result = part.call.result()
        except Exception as error:
            return error
        values = as_list(result)
        if values is None:
            return TypeError(f"it returned {type(result).__name__}, not a list of {size} numbers")
        if len(values) != size:
            # Not truncated, padded or broadcast: values could end up with the wrong completions.
            error = ValueError(f"it returned {len(values)} values for {size} completions")
            # Of a function that returns one value whatever it gets, asking one by one would take that for each.
            return [error] * size if len(values) == 1 else error
        part.notes.settle(self._criterion.name, part.batch.extras, log_metric)
        episodes = part.batch.columns.get("episodes") or [None] * size
        return [_as_number(*pair) for pair in zip(values, episodes, strict=True)]

    def _one_by_one(self, failed: Sequence[_Part], log_metric: LogMetric | None) -> dict[str, Outcome]:
        """Grade each completion in a separate call; after several time-outs, skip the rest."""
        skipped: Outcome = CallTimeout(f"not tried, since {_MOST_TIMEOUTS} completions took too long")
        found: dict[str, Outcome] = {key: skipped for part in failed for key in part.keys}
        started: list[_Part] = []
        for part, i in [(one, i) for one in failed for i in range(len(one.keys))]:
            if sum(single.call.timed_out for single in started) < _MOST_TIMEOUTS:
                started.append(self._call(part.batch.part([i]), [part.keys[i]]))
        for single in started:
            values = self._values(single, log_metric)
            found[single.keys[0]] = values if isinstance(values, Exception) else values[0]
        return found


def _as_number(value: Any, episode: Episode | None) -> Outcome:
    if value is None or isinstance(value, Exception):
        return value
    if episode is not None and isinstance(value, list | tuple):
        turns = [_as_number(turn, None) for turn in cast("Sequence[Any]", value)]
        if len(turns) != len(episode.turns):
            return ValueError(f"it returned {len(turns)} values for an episode of {len(episode.turns)} turns")
        wrong = next((turn for turn in turns if isinstance(turn, Exception)), None)
        return wrong or PerTurn([0.0 if turn is None else turn for turn in turns if not isinstance(turn, Exception)])
    if hasattr(value, "item") and getattr(value, "size", None) != 0:  # a NumPy scalar or a tensor of one element
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            return TypeError(f"its value is not one number: {error}")
    if not isinstance(value, int | float):
        return TypeError(f"its value is {value!r:.80}, of type {type(value).__name__}, not a number or None")
    number = float(value)
    return number if math.isfinite(number) else ValueError(f"its value is {number}, not a finite number")
