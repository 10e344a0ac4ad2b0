"""Verifiers: factories of reward functions that grade answers and format, and a check of gold answers."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from burnish.errors import ConfigError, RewardError
from burnish.rewards.answers import (
    SOURCES,
    answer_text,
    extract_answer,
    first_answer,
    parse_number,
    render_answer,
)
from burnish.rewards.failures import check_failures, judged
from burnish.rewards.pool import WorkerPool, default_pool

if TYPE_CHECKING:
    from burnish.rewards.rubric import RewardFunction, Rubric

__all__ = [
    "AnswerVerifier",
    "GoldFailure",
    "Grader",
    "Row",
    "check_gold",
    "completion_text",
    "each_answer",
    "exact_answer",
    "gold_of",
    "gym_answer",
    "math_answer",
    "numeric_answer",
    "require",
    "soft_overlong",
]

Row: TypeAlias = Mapping[str, Any]
Grader: TypeAlias = Callable[[Sequence[tuple[str, Row]]], "list[float | Exception]"]
"""Function that grades (answer, row) pairs; each result is a value or an exception."""

_INTEGER = re.compile(r"[+-]?\d+")


def completion_text(completion: Any) -> str:
    """Return the text of a completion: a string, or the content of the assistant's last message.

    What a tool or an environment has said is never graded.
    """
    if isinstance(completion, str):
        return completion
    contents = [message["content"] for message in completion if message["role"] == "assistant"]
    return str(contents[-1] or "") if contents else ""


@dataclass(frozen=True)
class AnswerVerifier:
    """Reward function that extracts one answer from each completion and grades it against its row.

    A completion without an answer scores 0; a row whose `gold_column` is None gives None; an exception of the grader
    fails only its own completion.

    Args:
        kind: name in messages.
        grade: function that grades (answer, row) pairs.
        gold: function that returns the gold answers of a row as texts, of which any is accepted.
        gold_column: required column.
        sources: sources of answers, see :func:`burnish.rewards.extract_answer`.
        tag: name of the tag for the source "tag".
        until_closed: read a text until an answer is closed for the first time, so that what follows does not count;
            `sources` are then "tag", "boxed" or both, of which the first to close counts.
        overlaps: `grade` is thread-safe and waits for other processes, so that completions may be sampled meanwhile.

    Raises:
        ConfigError: an unknown source, a tag that is not a plain name, or `until_closed` with another source.
    """

    kind: str
    grade: Grader
    gold: Callable[[Row], list[str]]
    gold_column: str
    sources: tuple[str, ...] = ("tag",)
    tag: str = "answer"
    until_closed: bool = False
    overlaps: bool = False

    def __post_init__(self) -> None:
        if not self.sources or any(source not in SOURCES for source in self.sources):
            raise ConfigError(
                f"sources = {list(self.sources)!r} of {self.kind}: use names out of {', '.join(SOURCES)}."
            )
        if not re.fullmatch(r"[\w-]+", self.tag):
            raise ConfigError(f"tag = {self.tag!r} of {self.kind}: use letters, digits, '_' and '-', without brackets.")
        if self.until_closed and (open_ended := [s for s in self.sources if s not in ("tag", "boxed")]):
            raise ConfigError(
                f"until_closed = True of {self.kind} with the source {open_ended[0]!r}, which is never closed: use "
                "tag, boxed or both."
            )

    @property
    def __name__(self) -> str:
        return self.kind

    def extract(self, completion: Any) -> str | None:
        """Extract the answer of a completion, or None."""
        extracted = first_answer if self.until_closed else extract_answer
        return extracted(completion_text(completion), tag=self.tag, sources=self.sources)

    @property
    def is_settled(self) -> Callable[..., bool] | None:
        """Predicate of `stop_settled`; None where the last answer counts, since another may always follow."""
        return self._is_settled if self.until_closed else None

    def _is_settled(self, text: str, **columns: Any) -> bool:
        return columns.get(self.gold_column, "") is None or self.extract(text) is not None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | Exception | None]:
        """Grade completions; `columns` are lists of their length."""
        lists = {
            name: values
            for name, values in columns.items()
            if isinstance(values, list) and len(values) == len(completions)
        }
        if self.gold_column not in lists:
            raise RewardError(f"{self.kind} needs the column {self.gold_column!r}; the rows have: {', '.join(lists)}.")
        results: list[float | Exception | None] = [0.0] * len(completions)
        pending: list[int] = []
        pairs: list[tuple[str, Row]] = []
        for i, completion in enumerate(completions):
            row = {name: values[i] for name, values in lists.items()}
            if row[self.gold_column] is None:
                results[i] = None
                continue
            answer = self.extract(completion)
            if answer is not None:
                pending.append(i)
                pairs.append((answer, row))
        for i, value in zip(pending, self.grade(pairs), strict=True):
            results[i] = value
        return results


def each_answer(grade_one: Callable[[str, Row], float]) -> Grader:
    """Return a grader of pairs that contains the exceptions of a grader of one."""

    def grade(pairs: Sequence[tuple[str, Row]]) -> list[float | Exception]:
        values: list[float | Exception] = []
        for answer, row in pairs:
            try:
                values.append(grade_one(answer, row))
            except Exception as error:
                values.append(error)
        return values

    return grade


def gold_of(column: str) -> Callable[[Row], list[str]]:
    """Return the function of the gold answers in a column: one value, or a list of accepted ones."""

    def gold(row: Row) -> list[str]:
        value = row[column]
        values = cast("list[Any]", value) if isinstance(value, list | tuple) else [value]
        texts = [answer_text(v).strip() for v in values]
        if not texts or not all(texts):
            raise RewardError(f"the gold answer in column {column!r} is empty: {value!r}")
        return texts

    return gold


def _positive(kind: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name} = {value!r} of {kind}: use a positive number.")


def exact_answer(
    *,
    column: str = "answer",
    sources: Sequence[str] = ("tag",),
    tag: str = "answer",
    ignore_case: bool = False,
    until_closed: bool = False,
) -> AnswerVerifier:
    """Create a verifier of exact answers: 1 if the answer equals a gold answer up to white space, else 0.

    Args:
        column: column of the gold answer: a string, a number, or a list of accepted answers.
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        ignore_case: ignore case.
        until_closed: grade the first answer to be closed instead of the last.

    Raises:
        ConfigError: an invalid option.
    """
    gold = gold_of(column)

    def norm(text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if ignore_case else text

    def grade_one(answer: str, row: Row) -> float:
        return float(norm(answer) in {norm(text) for text in gold(row)})

    return AnswerVerifier("exact_answer", each_answer(grade_one), gold, column, tuple(sources), tag, until_closed)


def numeric_answer(
    *,
    column: str = "answer",
    sources: Sequence[str] = ("tag",),
    tag: str = "answer",
    absolute_tolerance: float = 0.0,
    relative_tolerance: float = 0.0,
    until_closed: bool = False,
) -> AnswerVerifier:
    r"""Create a verifier of numbers: 1 if |answer - gold| <= max(absolute, relative * |gold|), exactly, else 0.

    Numbers are parsed by :func:`burnish.rewards.parse_number` (1,234 = 1234, 1/2 = 0.5 = `\frac{1}{2}`; units are
    dropped). An answer that is not one number scores 0; a gold answer that is not a number fails the criterion.

    Args:
        column: column of the gold answer: a number, its text, or a list of accepted answers.
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        absolute_tolerance: in the unit of the answer, at least 0.
        relative_tolerance: as a fraction of the gold answer, at least 0.
        until_closed: grade the first answer to be closed instead of the last.

    Raises:
        ConfigError: an invalid option.
    """
    for name, value in (("absolute_tolerance", absolute_tolerance), ("relative_tolerance", relative_tolerance)):
        if not value >= 0 or value == float("inf"):
            raise ConfigError(f"{name} = {value!r} of numeric_answer: use a finite number of at least 0.")
    gold = gold_of(column)
    absolute, relative = Fraction(str(absolute_tolerance)), Fraction(str(relative_tolerance))

    def grade_one(answer: str, row: Row) -> float:
        golds = [(text, parse_number(text)) for text in gold(row)]
        if bad := [text for text, number in golds if number is None]:
            raise RewardError(f"the gold answer {bad[0]!r} in column {column!r} is not a number")
        number = parse_number(answer)
        if number is None:
            return 0.0
        return float(any(g is not None and abs(number - g) <= max(absolute, relative * abs(g)) for _, g in golds))

    return AnswerVerifier("numeric_answer", each_answer(grade_one), gold, column, tuple(sources), tag, until_closed)


def math_answer(
    *,
    column: str = "answer",
    sources: Sequence[str] = ("tag", "boxed"),
    tag: str = "answer",
    timeout_seconds: float = 5.0,
    until_closed: bool = False,
    failures: str = "zero",
    pool: WorkerPool | None = None,
) -> AnswerVerifier:
    r"""Create a verifier of mathematics: 1 if the answer equals the gold answer exactly and has its structure, else 0.

    Both are parsed by :func:`burnish.rewards.mathematics.read`; gold answers outside its grammar by math-verify.
    Equal texts, equal numbers and unequal integers are decided at once; everything else runs in a worker process that
    is killed after `timeout_seconds`. An answer that cannot be parsed scores 0; a gold answer that cannot be parsed
    fails the completion.

    Args:
        column: column of the gold answer, LaTeX or plain (with or without `$...$` or `\boxed{...}`), or a list of
            accepted answers.
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        timeout_seconds: time limit of one answer, without time in the queue.
        until_closed: grade the first answer to be closed instead of the last.
        failures: "zero" scores an answer 0 that crashes the grader or takes too long; "exclude" excludes it from the
            loss.
        pool: worker processes; None for the shared pool.

    Raises:
        ConfigError: an invalid option, or math-verify is not installed.
    """
    require("math_verify", "math", "math_answer")
    _positive("math_answer", "timeout_seconds", timeout_seconds)
    check_failures("math_answer", failures)
    gold = gold_of(column)

    def grade(pairs: Sequence[tuple[str, Row]]) -> list[float | Exception]:
        jobs = [(i, text, answer) for i, (answer, row) in enumerate(pairs) for text in gold(row)]
        quick = [_quick_math(text, answer) for _, text, answer in jobs]
        won = {i for (i, _, _), value in zip(jobs, quick, strict=True) if value == 1.0}
        slow = [job for job, value in zip(jobs, quick, strict=True) if value is None and job[0] not in won]
        values: list[float | Exception] = [float(i in won) for i in range(len(pairs))]
        calls = [{"gold": text, "answer": answer} for _, text, answer in slow]
        results = (pool or default_pool()).map("math", calls, timeout_seconds=timeout_seconds) if calls else []
        for (i, _, _), result in zip(slow, results, strict=True):
            if values[i] != 1.0 and (value := judged(result, failures)) != 0.0:
                values[i] = value
        return values

    return AnswerVerifier("math_answer", grade, gold, column, tuple(sources), tag, until_closed, overlaps=True)


def _quick_math(gold: str, answer: str) -> float | None:
    """Grade without math-verify; None if it is needed."""
    if gold == answer:
        return 1.0
    ours, theirs = parse_number(gold, units=False), parse_number(answer, units=False)
    if ours is not None and ours == theirs:
        return 1.0
    return 0.0 if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer) else None


def gym_answer(
    *,
    sources: Sequence[str] = ("tag",),
    tag: str = "answer",
    binary: bool = False,
    timeout_seconds: float = 10.0,
    until_closed: bool = False,
    failures: str = "zero",
    pool: WorkerPool | None = None,
) -> AnswerVerifier:
    """Create a verifier with the scores of reasoning-gym tasks, in [0, 1], including partial credit.

    Columns: `gym_task` (name of the task; None gives None), `gym_entry` (the entry as JSON) and optionally `gym_config`
    (options of the task as JSON, for the few tasks whose grading depends on them). Tasks run in worker processes that
    are killed with all that they started. Where a task would evaluate an answer as code, the answer is parsed as data
    instead (lists, formulas of common functions); a grader that evaluates text anyway fails the completion.

    Args:
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        binary: round scores below 1 down to 0.
        timeout_seconds: time limit of one answer, without time in the queue.
        until_closed: grade the first answer to be closed instead of the last.
        failures: "zero" scores an answer 0 that crashes the grader or takes too long; "exclude" excludes it from the
            loss.
        pool: worker processes; None for the shared pool.

    Raises:
        ConfigError: an invalid option, or reasoning-gym is not installed.
    """
    require("reasoning_gym", "envs", "gym_answer")
    _positive("gym_answer", "timeout_seconds", timeout_seconds)
    check_failures("gym_answer", failures)

    def gold(row: Row) -> list[str]:
        answer = json.loads(row["gym_entry"])["answer"]
        return [] if answer is None else [str(answer)]  # some tasks do not have a unique answer

    def grade(pairs: Sequence[tuple[str, Row]]) -> list[float | Exception]:
        calls = [
            {
                "task": row["gym_task"],
                "config": row.get("gym_config") or "{}",
                "entry": row["gym_entry"],
                "answer": answer,
            }
            for answer, row in pairs
        ]
        values = (pool or default_pool()).map("gym", calls, timeout_seconds=timeout_seconds) if calls else []
        values = [judged(value, failures) for value in values]
        return [v if isinstance(v, Exception) or not binary else float(v >= 1.0) for v in values]

    return AnswerVerifier("gym_answer", grade, gold, "gym_task", tuple(sources), tag, until_closed, overlaps=True)


def require(module: str, extra: str, kind: str) -> None:
    """Raise ConfigError where a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{kind} needs the package {module.replace('_', '-')}: pip install 'burnish[{extra}]'.")


def soft_overlong(*, max_completion_length: int, cache: int) -> RewardFunction:
    """Create a soft penalty of long completions, in [-1, 0]; section 3.4 of DAPO (2503.14476).

    The penalty is 0 up to max - cache tokens, then falls linearly to -1 at max: (max - cache - length) / cache.

    Args:
        max_completion_length: tokens at which the penalty reaches -1.
        cache: length of the ramp in tokens, in 1 .. max_completion_length.

    Raises:
        ConfigError: an invalid length.
    """
    if max_completion_length < 1:
        raise ConfigError(f"max_completion_length = {max_completion_length!r} of soft_overlong: use at least 1.")
    if not 1 <= cache <= max_completion_length:
        raise ConfigError(f"cache = {cache!r} of soft_overlong: use 1 to max_completion_length.")

    def soft_overlong(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        start = max_completion_length - cache
        return [-min(1.0, max(0, len(ids) - start) / cache) for ids in completion_ids]

    return soft_overlong


@dataclass(frozen=True, slots=True)
class GoldFailure:
    """Row whose gold answer does not score 1, which is a broken task.

    Attributes:
        index: index of the row.
        criterion: name of the criterion.
        answer: the gold answer; None if it could not be extracted.
        value: its score; None if grading failed.
        reason: explanation.
    """

    index: int
    criterion: str
    answer: str | None
    value: float | None
    reason: str


def check_gold(rubric: Rubric, rows: Sequence[Mapping[str, Any]]) -> list[GoldFailure]:
    """Grade the gold answers of each row with every answer verifier of a rubric.

    Criteria that are not answer verifiers (format, length, user functions), rows whose gold column is None, and tasks
    without a gold answer are skipped.

    Args:
        rubric: the criteria.
        rows: one mapping of columns per row.

    Returns:
        The failures, ordered by criterion, then row.
    """
    verifiers = [(c.name, c.function) for c in rubric.criteria if isinstance(c.function, AnswerVerifier)]
    return [failure for name, verifier in verifiers for failure in _check_verifier(name, verifier, rows)]


def _check_verifier(name: str, verifier: AnswerVerifier, rows: Sequence[Row]) -> list[GoldFailure]:
    failures: list[GoldFailure] = []
    graded: list[tuple[int, str]] = []
    pairs: list[tuple[str, Row]] = []
    for index, row in enumerate(rows):
        try:
            if row[verifier.gold_column] is None:
                continue
            for answer in verifier.gold(row):
                text = render_answer(answer, tag=verifier.tag, sources=verifier.sources)
                extracted = verifier.extract(text)
                if extracted is None:
                    failures.append(GoldFailure(index, name, answer, 0.0, f"no answer can be read from {text!r}"))
                    continue
                graded.append((index, answer))
                pairs.append((extracted, row))
        except Exception as error:
            failures.append(GoldFailure(index, name, None, None, f"{type(error).__name__}: {error}"))
    for (index, answer), value in zip(graded, verifier.grade(pairs), strict=True):
        if isinstance(value, Exception):
            failures.append(GoldFailure(index, name, answer, None, f"{type(value).__name__}: {value}"))
        elif value < 1.0:
            failures.append(GoldFailure(index, name, answer, value, f"the gold answer scores {value:g}, not 1"))
    return sorted(failures, key=lambda failure: failure.index)
