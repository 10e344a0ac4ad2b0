"""Rubrics: named, weighted criteria that score completions."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, cast

from burnish.data.columns import meant_columns, rename_tip
from burnish.errors import ConfigError, DataError, EngineError, RewardError
from burnish.rewards.batch import OWN_ARGUMENTS, Batch, Grading, LogMetric, Outcome, PerTurn, column_names, flatten
from burnish.rewards.calls import CallTimeout, parameters_of
from burnish.rewards.criterion import Criterion, RewardFunction
from burnish.rewards.verifiers import AnswerVerifier
from burnish.types import Completion, Group, Score

__all__ = ["Criterion", "RewardFunction", "Rubric", "Scoring"]


def _check_arguments(groups: Sequence[Group]) -> None:
    for group in groups:
        for name in sorted(OWN_ARGUMENTS & group.row.keys()):
            if group.row[name] is not None:
                raise DataError(
                    f"row {group.index} has a column {name!r}, which is reserved for an argument of reward functions: "
                    f"{rename_tip({name: f'given_{name}'})}, or drop it."
                )


class Rubric:
    r"""Named, weighted criteria: total = sum_i weight_i * term_i over the criteria that apply.

    A term is the criterion's value, 0 where one of its gates is closed, and normalised within the group where the
    criterion says so. A criterion that fails on a completion (an exception, NaN, not a number) adds a message to
    `Score.errors`; the total is then None, so that the completion is excluded from the loss instead of scoring 0. So is
    that of a completion whose gate failed.

    Args:
        criteria: at least one, with unique names.

    Raises:
        ConfigError: no criteria, two with one name, or a gate that is not another criterion.
    """

    def __init__(self, criteria: Sequence[Criterion]) -> None:
        if not criteria:
            raise ConfigError("criteria = []: a rubric needs at least one criterion.")
        names = [criterion.name for criterion in criteria]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"criteria share the name {twice[0]!r}: give each a different `name`.")
        for criterion in criteria:
            if bad := sorted(criterion.gates.keys() - (set(names) - {criterion.name})):
                raise ConfigError(
                    f"requires = {bad[0]!r} of criterion {criterion.name!r}: name another criterion of the rubric "
                    f"({', '.join(names)})."
                )
        self.criteria = tuple(criteria)
        self.known: dict[str, dict[str, float | None]] = {c.name: {} for c in criteria if c.memoize}
        """Values by completion of the criteria that are memoized."""

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

    def weights(self, trainer_state: Any = None) -> list[float]:
        """Return the weight of each criterion at the present step of a trainer; without one, at the end of training."""
        steps = getattr(trainer_state, "max_steps", 0)
        progress = min(trainer_state.global_step / steps, 1.0) if steps > 0 else 1.0
        return [criterion.weight_at(progress) for criterion in self.criteria]

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
        log_metric: LogMetric | None = None,
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
        return self.begin(groups, trainer_state=trainer_state, **shared).scores(log_metric)

    def begin(self, groups: Sequence[Group], *, trainer_state: Any = None, **shared: Any) -> Scoring:
        """Begin to score groups whose completions may be sampled later; `Scoring.scores` ends it.

        Args:
            groups: prompts, with or without completions.
            trainer_state: as of `score`.
            **shared: as of `score`.

        Raises:
            DataError: a column with a reserved name.
        """
        _check_arguments(groups)
        return Scoring(self, groups, {"trainer_state": trainer_state, **shared})

    def combine(
        self, groups: Sequence[Group], batch: Batch, outcomes: Mapping[str, list[Outcome]], trainer_state: Any
    ) -> list[list[Score]]:
        """Combine the outcomes of the criteria on a batch to scores, which are also written to the completions."""
        for name, values in outcomes.items():
            _raise_if_all_failed(name, values, batch.labels)
        terms = self._terms(outcomes, [len(group.completions) for group in groups])
        weights = self.weights(trainer_state)
        scored = [self._combine(batch.labels[i], i, outcomes, terms, weights) for i in range(len(batch.labels))]
        for criterion in self.criteria:
            if isinstance(criterion.function, AnswerVerifier):
                for score, completion in zip(scored, batch.completions, strict=True):
                    if (answer := criterion.function.extract(completion)) is not None:
                        score.answers[criterion.name] = answer
        for score, extra in zip(scored, batch.extras, strict=True):
            score.extra = extra
        completions = [completion for group in groups for completion in group.completions]
        for score, completion in zip(scored, completions, strict=True):
            if completion.episode is not None and completion.episode.error is not None:
                score.total, score.errors["environment"] = None, completion.episode.error
        flat = iter(scored)
        scores: list[list[Score]] = []
        for group in groups:
            for completion in group.completions:
                completion.score = next(flat)
            scores.append([cast("Score", completion.score) for completion in group.completions])
        return scores

    def _terms(self, outcomes: Mapping[str, Sequence[Outcome]], sizes: Sequence[int]) -> dict[str, list[float | None]]:
        """Return the terms of each criterion, behind its gates and normalised; `sizes` are those of the groups."""
        terms: dict[str, list[float | None]] = {}
        for criterion in self.criteria:
            # Plain numbers, without the turns of a PerTurn: a checkpoint holds them.
            values = [None if v is None or isinstance(v, Exception) else float(v) for v in outcomes[criterion.name]]
            for gate, least in criterion.gates.items():
                for i, passed in enumerate(outcomes[gate]):
                    if isinstance(passed, float) and passed < least and values[i] is not None:
                        values[i] = 0.0
            if criterion.normalize is not None:
                parts = [values[end - size : end] for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
                values = [value for part in parts for value in _normalised(part, criterion.normalize)]
            terms[criterion.name] = values
        return terms

    def _combine(
        self,
        label: str,
        i: int,
        outcomes: Mapping[str, Sequence[Outcome]],
        terms: Mapping[str, Sequence[float | None]],
        weights: Sequence[float],
    ) -> Score:
        score = Score(total=0.0, terms={name: values[i] for name, values in terms.items()})
        void = False
        for criterion in self.criteria:
            outcome = outcomes[criterion.name][i]
            if isinstance(outcome, Exception):
                score.errors[criterion.name] = _message(criterion.name, label, outcome)
            void = void or (
                not criterion.never_counts
                and any(isinstance(outcomes[name][i], Exception) for name in (criterion.name, *criterion.gates))
            )
            if isinstance(outcome, PerTurn):
                score.turns[criterion.name], outcome = outcome.turns, float(outcome)
            score.criteria[criterion.name] = None if isinstance(outcome, Exception) else outcome
        values = list(score.terms.values())
        if all(value is None for value in values) and not score.errors:
            score.errors["total"] = f"no criterion applies to {label}: every one returned None."
        if void or all(value is None for value in values):
            score.total = None
        else:
            try:
                total = math.fsum(w * value for w, value in zip(weights, values, strict=True) if value is not None)
            except (OverflowError, ValueError):  # infinite partial sums, or infinities of both signs
                total = math.inf
            score.total = total if math.isfinite(total) else None
            if score.total is None:
                score.errors["total"] = f"the weighted sum of {label} overflows: lower the values or `weight`."
        return score


class Scoring:
    """Scores of groups in the making: criteria that overlap with sampling start on each group as it is sampled.

    Args:
        rubric: the criteria.
        groups: prompts, whose completions may come later.
        shared: arguments of the functions beside the columns.
    """

    def __init__(self, rubric: Rubric, groups: Sequence[Group], shared: dict[str, Any]) -> None:
        self._rubric, self._groups, self._shared = rubric, groups, shared
        self._names = column_names(groups)
        # Those that overlap come first, so that they wait while the others run; of these, async functions.
        order = sorted(rubric.criteria, key=lambda c: (not c.overlaps, not inspect.iscoroutinefunction(c.function)))
        self._gradings = [(c, Grading(c, shared, rubric.known.get(c.name))) for c in order]
        self._sampled: dict[int, Batch] = {}

    def start(self, position: int, completions: Sequence[Completion]) -> None:
        """Start the criteria that overlap with sampling on a group; call it from one thread at a time.

        Args:
            position: number of the group.
            completions: those that the group will have.

        Raises:
            RewardError: the row has no prompt.
        """
        group = dataclasses.replace(self._groups[position], completions=list(completions))
        self._sampled[position] = batch = flatten([group], self._names)
        for criterion, grading in self._gradings:
            if criterion.overlaps:
                grading.start(batch, position)

    def scores(self, log_metric: LogMetric | None = None) -> list[list[Score]]:
        """Start what has not started, wait for all, and score the groups, which have their completions now.

        Args:
            log_metric: as of `Rubric.score`.

        Raises:
            RewardError: as of `Rubric.score`.
            EngineError: other completions were started than the groups have.
        """
        for position, group in enumerate(self._groups):
            if position not in self._sampled:
                self.start(position, group.completions)
        begun = [self._sampled[position] for position in range(len(self._groups))]
        batch = flatten(self._groups, self._names)
        if [ids for part in begun for ids in part.completion_ids] != batch.completion_ids:
            raise EngineError("the engine called on_done with other completions than it returned: correct the engine.")
        batch = dataclasses.replace(batch, extras=[extra for part in begun for extra in part.extras])
        for criterion, grading in self._gradings:
            if not criterion.overlaps:
                grading.start(batch)
        done = {criterion.name: grading.outcomes(log_metric) for criterion, grading in self._gradings}
        outcomes = {name: done[name] for name in self._rubric.names}
        return self._rubric.combine(self._groups, batch, outcomes, self._shared["trainer_state"])


def _normalised(values: Sequence[float | None], how: str) -> list[float | None]:
    present = [value for value in values if value is not None]
    if not present:
        return list(values)
    mean = math.fsum(present) / len(present)
    deviation = 1.0
    if how == "group":
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in present) / max(len(present) - 1, 1))
    return [None if value is None else (value - mean) / deviation if deviation else 0.0 for value in values]


def _function_name(function: RewardFunction) -> str:
    if isinstance(function, functools.partial):
        return _function_name(cast("functools.partial[Any]", function).func)
    return str(getattr(function, "__name__", type(function).__name__))


def _message(name: str, label: str, error: Exception) -> str:
    return f"criterion {name!r} failed on {label}: {type(error).__name__}: {error}"


def _raise_if_all_failed(name: str, values: list[Outcome], labels: list[str]) -> None:
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
