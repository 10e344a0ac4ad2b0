"""Rubrics: named, weighted criteria that score completions."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from burnish.data.columns import meant_columns, rename_tip
from burnish.errors import ConfigError, DataError, RewardError
from burnish.rewards.calls import Call, CallTimeout, accepted, parameters_of
from burnish.rewards.notes import Notes, as_list
from burnish.rewards.verifiers import AnswerVerifier
from burnish.types import Group, Score

__all__ = ["Criterion", "RewardFunction", "Rubric"]

RewardFunction: TypeAlias = Callable[..., Any]
"""TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or async."""

_Outcome: TypeAlias = float | Exception | None

_MOST_TIMEOUTS = 3
"""Completions of a call that may time out, each in a separate call, before the remaining ones are skipped."""

_OWN_ARGUMENTS = frozenset({"completion_ids", "completions", "log_extra", "log_metric", "prompts", "trainer_state"})
"""Arguments of every reward function, which are reserved as column names."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """Named, weighted reward function of a rubric.

    Args:
        name: name in metrics and errors, unique in the rubric; "total" is reserved.
        function: called by keyword with `prompts`, `completions`, `completion_ids` and every other column of the data
            set (including `completion`) as lists of one length, and with `trainer_state`, `log_extra(column, values)`,
            which adds a column to the transcripts, and `log_metric(name, value)`; without `**kwargs` it gets only the
            arguments that its signature names. Completions are strings, or
            `[{"role": "assistant", "content": text}]` if the prompt is a list of messages. It returns one value per
            completion: a number, None (does not apply), or an Exception (could not be graded). It may have an attribute
            `is_settled`, see `burnish.rewards.settled.SettledRule`.
        weight: factor in the total; finite. A criterion of weight 0 is logged, and its failures do not void the total.
        isolate: if the call raises, repeat it with one completion at a time, so that only the offending ones fail. Set
            False for functions that compare completions with each other; then all completions of the call fail.
        timeout_seconds: time limit of one call, None for no limit. After a time-out, completions are graded one at a
            time within the same limit, and those that time out are excluded from the loss; after three time-outs, so
            are the rest. Without `isolate`, all completions of the call are excluded. See
            `burnish.rewards.calls.Call` for what can be interrupted.

    Raises:
        ConfigError: an empty or reserved name, a function that is not callable, a weight that is not finite, or a
            time-out that is not positive.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    isolate: bool = True
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name == "total":
            raise ConfigError(f"name = {self.name!r} of a criterion: use a non-empty name other than 'total'.")
        if not callable(self.function):
            raise ConfigError(f"function = {self.function!r} of criterion {self.name!r}: pass a callable.")
        if hasattr(self.function, "state_dict"):
            raise ConfigError(
                f"function of criterion {self.name!r} is a module ({type(self.function).__name__}): pass a function "
                f"that scores texts with it."
            )
        if isinstance(self.weight, bool) or not math.isfinite(self.weight):
            raise ConfigError(f"weight = {self.weight!r} of criterion {self.name!r}: use a finite number.")
        limit = self.timeout_seconds
        if limit is not None and (isinstance(limit, bool) or not 0 < limit <= threading.TIMEOUT_MAX):
            raise ConfigError(
                f"timeout_seconds = {limit!r} of criterion {self.name!r}: use a positive number of seconds, or None."
            )


def _check_arguments(groups: Sequence[Group]) -> None:
    for group in groups:
        for name in sorted(_OWN_ARGUMENTS & group.row.keys()):
            if group.row[name] is not None:
                raise DataError(
                    f"row {group.index} has a column {name!r}, which is reserved for an argument of reward functions: "
                    f"{rename_tip({name: f'given_{name}'})}, or drop it."
                )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Arguments of one call, as parallel lists, with labels of the completions for messages."""

    labels: list[str]
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    extras: list[dict[str, Any]]
    """Columns that functions log for each completion."""

    def one(self, i: int) -> _Batch:
        columns = {name: [values[i]] for name, values in self.columns.items()}
        lists = ([self.labels[i]], [self.prompts[i]], [self.completions[i]], [self.completion_ids[i]])
        return _Batch(*lists, columns, [self.extras[i]])

    def arguments(self) -> dict[str, Any]:
        """Copy the lists, so that a function that modifies its arguments does not affect the next one."""
        lists = {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.completion_ids}
        return {name: list(values) for name, values in (self.columns | lists).items()}


class Rubric:
    r"""Named, weighted criteria: total = sum_i weight_i * value_i over the criteria that apply.

    A criterion that fails on a completion (an exception, NaN, not a number) adds a message to `Score.errors`; the total
    is then None, so that the completion is excluded from the loss instead of scoring 0.

    Args:
        criteria: at least one, with unique names.

    Raises:
        ConfigError: no criteria, or two with one name.
    """

    def __init__(self, criteria: Sequence[Criterion]) -> None:
        if not criteria:
            raise ConfigError("criteria = []: a rubric needs at least one criterion.")
        names = [criterion.name for criterion in criteria]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"criteria share the name {twice[0]!r}: give each a different `name`.")
        self.criteria = tuple(criteria)

    @classmethod
    def from_functions(
        cls, reward_funcs: RewardFunction | Sequence[RewardFunction], reward_weights: Sequence[float] | None = None
    ) -> Rubric:
        """Build a rubric from TRL's arguments.

        Args:
            reward_funcs: one function or several; criteria are named by `__name__`, with `_2` for a repeated name.
            reward_weights: one weight per function; None means 1.

        Raises:
            ConfigError: the two differ in length, or something is not a function.
        """
        functions = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        weights = [1.0] * len(functions) if reward_weights is None else list(reward_weights)
        if len(weights) != len(functions):
            raise ConfigError(
                f"reward_weights has {len(weights)} entries for {len(functions)} reward_funcs: give each one weight."
            )
        names: list[str] = []
        for function in functions:
            base = _function_name(function)
            number = 1 + sum(name == base or name.rpartition("_")[0] == base for name in names)
            names.append(base if number == 1 else f"{base}_{number}")
        return cls([Criterion(*parts) for parts in zip(names, functions, weights, strict=True)])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the criteria, in order."""
        return tuple(criterion.name for criterion in self.criteria)

    @property
    def logs_metrics(self) -> bool:
        """True if a function names `log_metric` as a parameter, so that metrics are not known in advance."""
        return any("log_metric" in parameters_of(criterion.function) for criterion in self.criteria)

    def check_columns(self, groups: Sequence[Group]) -> None:
        """Refuse columns with reserved names, and rows without the gold answers of a criterion.

        Raises:
            DataError: names row, column and fix.
        """
        _check_arguments(groups)
        for criterion in self.criteria:
            needed = criterion.function.gold_column if isinstance(criterion.function, AnswerVerifier) else None
            if needed is None or not groups or any(needed in group.row for group in groups):
                continue
            row = groups[0].row
            names = meant_columns(row, [(needed,)])
            raise DataError(
                f"row {groups[0].index} has the columns {sorted(map(str, row))} and no row has {needed!r}, which "
                f"criterion {criterion.name!r} grades by: {rename_tip(names) if names else 'add it'}."
            )

    def score(
        self,
        groups: Sequence[Group],
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], object] | None = None,
        **shared: Any,
    ) -> list[list[Score]]:
        """Score every completion of every group; scores are also written to `completion.score`.

        Args:
            groups: `row["prompt"]` and the other columns of `row` are passed to the functions.
            trainer_state: passed to the functions unchanged.
            log_metric: receives the metrics that functions log in calls that succeed; None drops them.
            **shared: further arguments, passed unchanged to the functions that accept them.

        Returns:
            One score per completion, in order.

        Raises:
            RewardError: a criterion failed on every completion (of more than one), or a row has no prompt.
            DataError: a column with a reserved name.
        """
        _check_arguments(groups)
        batch = _flatten(groups)
        shared = {"trainer_state": trainer_state, **shared}
        calls = _Calls(batch, shared, log_metric)
        outcomes = self._outcomes(calls) if batch.labels else {name: [] for name in self.names}
        for name, values in outcomes.items():
            _raise_if_all_failed(name, values, batch.labels)
        scored = [self._combine(batch.labels[i], i, outcomes) for i in range(len(batch.labels))]
        for criterion in self.criteria:
            if isinstance(criterion.function, AnswerVerifier):
                for score, completion in zip(scored, batch.completions, strict=True):
                    if (answer := criterion.function.extract(completion)) is not None:
                        score.answers[criterion.name] = answer
        for score, extra in zip(scored, batch.extras, strict=True):
            score.extra = extra
        flat = iter(scored)
        scores: list[list[Score]] = []
        for group in groups:
            for completion in group.completions:
                completion.score = next(flat)
            scores.append([cast("Score", completion.score) for completion in group.completions])
        return scores

    def _outcomes(self, calls: _Calls) -> dict[str, list[_Outcome]]:
        # Async functions start first, so that they wait while plain ones run.
        order = sorted(self.criteria, key=lambda criterion: not inspect.iscoroutinefunction(criterion.function))
        started = [(criterion, calls.start(criterion)) for criterion in order]
        done = {criterion.name: calls.finish(criterion, *call) for criterion, call in started}
        return {name: done[name] for name in self.names}

    def _combine(self, label: str, i: int, outcomes: dict[str, list[_Outcome]]) -> Score:
        score = Score(total=0.0)
        void = False
        for criterion in self.criteria:
            outcome = outcomes[criterion.name][i]
            if isinstance(outcome, Exception):
                score.errors[criterion.name] = _message(criterion.name, label, outcome)
                void = void or criterion.weight != 0
            score.criteria[criterion.name] = None if isinstance(outcome, Exception) else outcome
        values = [score.criteria[criterion.name] for criterion in self.criteria]
        if all(value is None for value in values) and not score.errors:
            score.errors["total"] = f"no criterion applies to {label}: every one returned None."
        if void or all(value is None for value in values):
            score.total = None
        else:
            parts = zip(self.criteria, values, strict=True)
            try:
                total = math.fsum(criterion.weight * value for criterion, value in parts if value is not None)
            except (OverflowError, ValueError):  # infinite partial sums, or infinities of both signs
                total = math.inf
            score.total = total if math.isfinite(total) else None
            if score.total is None:
                score.errors["total"] = f"the weighted sum of {label} overflows: lower the values or `weight`."
        return score


def _function_name(function: RewardFunction) -> str:
    if isinstance(function, functools.partial):
        return _function_name(cast("functools.partial[Any]", function).func)
    return str(getattr(function, "__name__", type(function).__name__))


def _flatten(groups: Sequence[Group]) -> _Batch:
    rows = [(group, i) for group in groups for i in range(len(group.completions))]
    for group, _ in rows:
        if "prompt" not in group.row:
            raise RewardError(
                f"the row of prompt {group.index} has no column 'prompt' (it has: {', '.join(map(str, group.row))}): "
                f"rewards receive the prompt as the data set gives it."
            )
    names = dict.fromkeys(name for group in groups for name in group.row if name not in {"prompt", *_OWN_ARGUMENTS})
    texts = [(group.row["prompt"], group.completions[i].text) for group, i in rows]
    return _Batch(
        labels=[f"prompt {group.index}, completion {i}" for group, i in rows],
        prompts=[prompt for prompt, _ in texts],
        completions=[t if isinstance(prompt, str) else [{"role": "assistant", "content": t}] for prompt, t in texts],
        completion_ids=[group.completions[i].token_ids for group, i in rows],
        columns={name: [group.row.get(name) for group, _ in rows] for name in names},
        extras=[{} for _ in rows],
    )


@dataclass(frozen=True, slots=True)
class _Calls:
    """Calls of criteria on the completions of a batch."""

    batch: _Batch
    shared: dict[str, Any]
    log_metric: Callable[[str, float], object] | None

    def start(self, criterion: Criterion) -> tuple[Call, Notes]:
        size = len(self.batch.labels)
        call, notes = Call(criterion.name, size, criterion.timeout_seconds), Notes(size)
        loggers = {"log_extra": notes.log_extra, "log_metric": notes.log_metric}
        arguments = self.batch.arguments() | self.shared | loggers
        call.start(criterion.function, accepted(criterion.function, arguments))
        return call, notes

    def finish(self, criterion: Criterion, call: Call, notes: Notes) -> list[_Outcome]:
        size = len(self.batch.labels)
        try:
            result = call.result()
        except Exception as error:
            if size == 1 or not criterion.isolate:
                return [error] * size
            return self._one_by_one(criterion)
        values = as_list(result)
        if values is None:
            return [TypeError(f"it returned {type(result).__name__}, not a list of {size} numbers")] * size
        if len(values) != size:
            # Not truncated, padded or broadcast: values could end up with the wrong completions.
            return [ValueError(f"it returned {len(values)} values for {size} completions")] * size
        notes.settle(criterion.name, self.batch.extras, self.log_metric)
        return [_as_number(value) for value in values]

    def _one_by_one(self, criterion: Criterion) -> list[_Outcome]:
        """Grade each completion in a separate call; after several time-outs, skip the rest."""
        size = len(self.batch.labels)
        singles = [_Calls(self.batch.one(i), self.shared, self.log_metric) for i in range(size)]
        started: list[tuple[Call, Notes] | None] = []
        for single in singles:
            late = sum(call is not None and call[0].timed_out for call in started)
            started.append(single.start(criterion) if late < _MOST_TIMEOUTS else None)
        untried = CallTimeout(f"not tried, since {_MOST_TIMEOUTS} completions of this call took too long")
        return [
            untried if call is None else single.finish(criterion, *call)[0]
            for call, single in zip(started, singles, strict=True)
        ]


def _as_number(value: Any) -> _Outcome:
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


def _message(name: str, label: str, error: Exception) -> str:
    return f"criterion {name!r} failed on {label}: {type(error).__name__}: {error}"


def _raise_if_all_failed(name: str, values: list[_Outcome], labels: list[str]) -> None:
    first = values[0] if values else None
    if len(values) < 2 or not isinstance(first, Exception) or not all(isinstance(v, Exception) for v in values):
        return
    if any(isinstance(v, CallTimeout) for v in values):  # a service that is busy now may answer at the next step
        return
    frames = "".join(traceback.format_tb(first.__traceback__)[-2:])
    raise RewardError(
        f"{_message(name, labels[0], first)}. It failed on all {len(values)} completions of the call, so the function "
        f"or its columns are wrong.{chr(10) + frames if frames else ''}"
    ) from first
