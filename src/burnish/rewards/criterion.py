"""Criteria of a rubric: what is scored, and how its value counts."""

from __future__ import annotations

import inspect
import itertools
import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from burnish.config.predicates import is_number
from burnish.errors import ConfigError, show
from burnish.rewards.calls import parameters_of

__all__ = ["Criterion", "RewardFunction"]

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or async."""

_GATE = 1.0
"""Value that opens a gate where none is named: that of a verifier which is satisfied."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """Named, weighted reward function of a rubric.

    Its term in the total is weight * schedule(progress) * value, where the value is 0 behind a closed gate, and is
    normalised within the group on request.

    Args:
        name: name in metrics and errors, unique in the rubric; "total" is reserved.
        function: called by keyword with `prompts`, `completions`, `completion_ids` and every other column of the data
            set (including `completion`) as lists of one length, and with `trainer_state`, `log_extra(column, values)`,
            which adds a column to the transcripts, and `log_metric(name, value)`; without `**kwargs` it gets only the
            arguments that its signature names. Completions are strings, or
            `[{"role": "assistant", "content": text}]` if the prompt is a list of messages; of an episode of several
            turns all its messages, and `episodes` and `environments` are arguments too; its value may then be a list
            of one number per turn. It returns one value per
            completion: a number, None (does not apply), or an Exception (could not be graded). It may have an attribute
            `is_settled`, see `burnish.rewards.settled.SettledRule`.
        weight: factor in the total; finite. A criterion of weight 0 is logged, and its failures do not void the total.
        isolate: if the call raises, or returns something other than a list of as many values (or of one), repeat it
            with one completion at a time, so that only the offending ones fail. Set
            False for functions that compare completions with each other; then all completions of the call fail.
        timeout_seconds: time limit of one call, None for no limit. After a time-out, completions are graded one at a
            time within the same limit, and those that time out are excluded from the loss; after three time-outs, so
            are the rest. Without `isolate`, all completions of the call are excluded. See
            `burnish.rewards.calls.Call` for what can be interrupted.
        schedule: points (progress, factor) of the weight's factor, linear between them and constant outside, where
            progress is the fraction of the training steps that are done; empty for a factor of 1. Without a trainer,
            progress is 1.
        requires: gates: names of criteria of which each must be at least 1, or at least the value given by name. Where
            one is lower, this criterion counts 0; it is logged as it is. A gate that does not apply is open.
        normalize: "group" subtracts the mean of the completions of a prompt and divides by their standard deviation
            (0 where that is 0), "center" only subtracts the mean; None leaves values as they are.
        per_group: call the function once for each prompt, with its completions only; for functions that compare them.
            `isolate` then has no effect.
        memoize: keep values of this process, and do not call the function again for a completion with the same prompt,
            text, tokens and columns; for functions that depend on nothing else. What it logged is not logged again.
        overlap: call the function once for each prompt, as soon as its completions are sampled and while others are
            still sampled; a plain function runs in other threads then, several calls at a time. False calls it once for
            all completions. None: True for verifiers that grade in other processes (`math`, `gym`, `code`, `sql`) or by
            a server (`judge`), and for async functions, unless their signature names `log_metric` or `isolate` is
            False; False for plain functions.

    Raises:
        ConfigError: an empty or reserved name, a function that is not callable, or an option out of its range.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    isolate: bool = True
    timeout_seconds: float | None = None
    schedule: Sequence[tuple[float, float]] = ()
    requires: Mapping[str, float] | Sequence[str] = ()
    normalize: Literal["group", "center"] | None = None
    per_group: bool = False
    memoize: bool = False
    overlap: bool | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name == "total":
            raise ConfigError(f"name = {self.name!r} of a criterion: use a non-empty name other than 'total'.")
        of = f"of criterion {self.name!r}"
        if not callable(self.function):
            raise ConfigError(f"function = {self.function!r} {of}: pass a callable.")
        if hasattr(self.function, "state_dict"):
            raise ConfigError(
                f"function {of} is a module ({type(self.function).__name__}): pass a function that scores texts "
                "with it."
            )
        if isinstance(self.weight, bool) or not math.isfinite(self.weight):
            raise ConfigError(f"weight = {self.weight!r} {of}: use a finite number.")
        limit = self.timeout_seconds
        if limit is not None and (isinstance(limit, bool) or not 0 < limit <= threading.TIMEOUT_MAX):
            raise ConfigError(f"timeout_seconds = {limit!r} {of}: use a positive number of seconds, or None.")
        if self.normalize not in (None, "group", "center"):
            raise ConfigError(f"normalize = {show(self.normalize)} {of}: use group or center, or leave it out.")
        if self.per_group and self.memoize:
            raise ConfigError(f"memoize = True {of}, which compares completions (per_group): remove one of them.")
        self._check_schedule(of)
        requires: Any = self.requires
        listed = not isinstance(requires, str) and isinstance(requires, Mapping | Sequence)
        gates: dict[Any, Any] = dict(self.gates) if listed else {}
        if not listed or not all(isinstance(name, str) and is_number(value) for name, value in gates.items()):
            raise ConfigError(f"requires = {show(self.requires)} {of}: list names of criteria, or give each a number.")

    def _check_schedule(self, of: str) -> None:
        points: Any = self.schedule
        right = isinstance(points, list | tuple) and all(
            isinstance(p, list | tuple) and len(p) == 2 and all(map(is_number, p)) for p in points
        )
        if not right or not all(0 <= progress <= 1 for progress, _ in points):
            raise ConfigError(
                f"schedule = {show(points)} {of}: use points [progress, factor] with progress from 0 to 1, such as "
                "[[0, 1], [0.5, 0]]."
            )
        if any(a[0] >= b[0] for a, b in itertools.pairwise(points)):
            raise ConfigError(f"schedule = {show(points)} {of}: order the points by progress, without repeating one.")

    @property
    def gates(self) -> dict[str, float]:
        """Least value of each criterion that this one requires."""
        return dict(self.requires) if isinstance(self.requires, Mapping) else dict.fromkeys(self.requires, _GATE)

    @property
    def overlaps(self) -> bool:
        """True if the function is called once for each prompt, while others are sampled."""
        if self.overlap is not None:
            return self.overlap
        if inspect.iscoroutinefunction(self.function):
            # What compares the completions of a call, or logs a metric of them, is to see all of them.
            return self.per_group or (self.isolate and "log_metric" not in parameters_of(self.function))
        return self.isolate and getattr(self.function, "overlaps", False)

    @property
    def never_counts(self) -> bool:
        """True if the weight is 0 at all times."""
        return self.weight == 0 or (bool(self.schedule) and not any(factor for _, factor in self.schedule))

    def weight_at(self, progress: float) -> float:
        """Return the weight when this fraction of the training steps is done."""
        if not self.schedule:
            return self.weight
        # Between two points, of which the first or the last stands twice outside.
        after = bisect_right(self.schedule, progress, key=lambda point: point[0])
        (start, low), (end, high) = self.schedule[max(after - 1, 0)], self.schedule[min(after, len(self.schedule) - 1)]
        part = (progress - start) / (end - start) if end > start else 0.0
        return self.weight * (low + (high - low) * part)
