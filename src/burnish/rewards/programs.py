"""Verifiers that execute what a model wrote, in the sandbox: Python by tests, SQL by its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from burnish.errors import ConfigError, RewardError
from burnish.rewards.failures import check_failures
from burnish.rewards.sandbox.levels import check_isolation
from burnish.rewards.sandbox.runner import Sandbox, default_sandbox
from burnish.rewards.sandbox.sql import SQL_PROGRAM, is_ordered
from burnish.rewards.sandbox.zygotes import Limits, Run
from burnish.rewards.verifiers import AnswerVerifier, Grader, Row

__all__ = ["code_answer", "sql_answer"]

_FAILED = {
    "crash": "crashed",
    "memory": "took too much memory",
    "output": "wrote too much",
    "timeout": "took too long",
}


def code_answer(
    *,
    column: str = "tests",
    setup_column: str = "",
    solution_column: str = "",
    sources: Sequence[str] = ("block",),
    tag: str = "answer",
    partial_credit: bool = False,
    same_process: bool = False,
    timeout_seconds: float = 10.0,
    memory_mib: int = 1024,
    failures: str = "zero",
    isolation: str = "auto",
    sandbox: Sandbox | None = None,
) -> AnswerVerifier:
    """Create a verifier of Python programs: 1 if the answer passes the tests of its row, else 0.

    Tests are code such as `assert f(1) == 2` (a text or a list of them), or inputs and expected outputs of a whole
    program (`{"inputs": [...], "outputs": [...]}` or a list of `{"input": ..., "output": ...}`; lines are compared
    without white space at their ends). A column may hold either as JSON. Tests of code run in another process than the
    answer, which is called through proxies: arguments and results are copied. Import in the setup what tests need; of
    the answer's names, those of builtins and of the standard library's modules are ignored.

    Args:
        column: column of the tests.
        setup_column: column with code to run before the tests; "" for none.
        solution_column: column with a reference solution, for `check_gold`; "" for none.
        sources: sources of the program, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        partial_credit: score the fraction of tests passed.
        same_process: run tests of code in the process of the answer, as tests need that pass it objects of classes of
            their own. An answer can then forge its result.
        timeout_seconds: time limit of all tests of code of an answer, and of each input.
        memory_mib: memory limit of all processes of an answer together, in MiB.
        failures: "zero" scores an answer 0 that crashes, takes too long or too much memory, or writes too much;
            "exclude" excludes it from the loss.
        isolation: "auto", "bubblewrap", "namespaces" or "landlock"; "none" runs answers with all rights of the trainer.
        sandbox: sandbox to run in; None for the shared one with that isolation.

    Raises:
        ConfigError: an invalid option.
    """
    options = _Options("code_answer", timeout_seconds, memory_mib, failures, isolation, sandbox)

    def grade_one(answer: str, row: Row) -> float:
        setup = str(row.get(setup_column) or "") if setup_column else ""
        results = options.results(answer, _tests(row[column], column), setup, same_process, not partial_credit)
        return sum(results) / len(results) if partial_credit else float(all(results))

    def gold(row: Row) -> list[str]:
        return [str(row[solution_column])] if solution_column and row.get(solution_column) else []

    return AnswerVerifier("code_answer", options.grader(grade_one), gold, column, tuple(sources), tag, overlaps=True)


def sql_answer(
    *,
    column: str = "query",
    setup_column: str = "schema",
    sources: Sequence[str] = ("block",),
    tag: str = "answer",
    timeout_seconds: float = 10.0,
    memory_mib: int = 1024,
    failures: str = "zero",
    isolation: str = "auto",
    sandbox: Sandbox | None = None,
) -> AnswerVerifier:
    """Create a verifier of SQL: 1 if the answer's query returns the rows of the gold query on SQLite, else 0.

    Each query runs on a database of its own, in memory. Rows are compared as a multiset, or in order if the gold query
    ends in ORDER BY; numbers to 10 digits; names of columns do not count.

    Args:
        column: column of the gold query.
        setup_column: column with the statements that create the database.
        sources: sources of the query, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        timeout_seconds: time limit of both queries together.
        memory_mib: memory limit in MiB.
        failures: "zero" scores an answer 0 that crashes or takes too long; "exclude" excludes it from the loss.
        isolation: "auto", "bubblewrap", "namespaces" or "landlock"; "none" runs answers with all rights of the trainer.
        sandbox: sandbox to run in; None for the shared one with that isolation.

    Raises:
        ConfigError: an invalid option.
    """
    options = _Options("sql_answer", timeout_seconds, memory_mib, failures, isolation, sandbox)

    def grade_one(answer: str, row: Row) -> float:
        query = str(row[column])
        job = {"setup": str(row.get(setup_column) or ""), "gold": query, "answer": answer, "ordered": is_ordered(query)}
        run = options.box.run(SQL_PROGRAM, json.dumps(job), limits=options.limits)
        if not run.stdout.startswith("gold\n"):
            reason = run.stderr.strip().rpartition("\n")[2] or run.end
            raise RewardError(f"the gold query in column {column!r} failed: {reason}")
        return float(options.checked(run).stdout == "gold\nequal\n")

    return AnswerVerifier(
        "sql_answer",
        options.grader(grade_one),
        lambda row: [str(row[column])],
        column,
        tuple(sources),
        tag,
        overlaps=True,
    )


@dataclass(frozen=True)
class _Options:
    """Options that verifiers with a sandbox share."""

    kind: str
    timeout_seconds: float
    memory_mib: int
    failures: str
    isolation: str
    sandbox: Sandbox | None

    def __post_init__(self) -> None:
        check_failures(self.kind, self.failures)
        check_isolation(self.isolation)
        for name in ("timeout_seconds", "memory_mib"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} = {value!r} of {self.kind}: use a finite positive number.")

    @property
    def box(self) -> Sandbox:
        return self.sandbox or default_sandbox(self.isolation)

    @property
    def limits(self) -> Limits:
        cpu = max(1, round(self.timeout_seconds))
        return Limits(wall_seconds=self.timeout_seconds, cpu_seconds=cpu, memory_bytes=self.memory_mib << 20)

    def results(
        self, answer: str, tests: list[str] | list[tuple[str, str]], setup: str, same_process: bool, stops: bool
    ) -> list[int]:
        """Run tests, and return 1 or 0 for each; `stops` allows to skip the rest after a failure."""
        if isinstance(tests[0], str):
            codes = cast("list[str]", tests)
            run = self.box.judge(answer, codes, setup=setup, inside=same_process, limits=self.limits)
            if run.end == "setup":
                raise RewardError(f"the tests cannot be set up: {run.note}")
            return self.checked(run).results or [0] * len(tests)
        results = [0] * len(tests)
        for i, (given, expected) in enumerate(tests):
            run = self.checked(self.box.run(answer, given, limits=self.limits))
            results[i] = int(run.end == "ok" and _lines(run.stdout) == _lines(expected))
            if stops and not results[i]:
                break
        return results

    def checked(self, run: Run) -> Run:
        if run.end in _FAILED and self.failures == "exclude":
            raise RewardError(f"the answer {_FAILED[run.end]} ({run.end})")
        return run

    def grader(self, grade_one: Callable[[str, Row], float]) -> Grader:
        def grade(pairs: Sequence[tuple[str, Row]]) -> list[float | Exception]:
            if not pairs:
                return []
            self.box.level  # noqa: B018 - one error that names the fix, instead of one for each answer
            return self.box.map(lambda pair: grade_one(*pair), pairs)

        return grade


def _tests(value: Any, column: str) -> list[str] | list[tuple[str, str]]:
    """Read a column of tests: code, or pairs of input and output."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if isinstance(value, dict):
        table = cast("dict[str, Any]", value)
        inputs, outputs = table.get("inputs"), table.get("outputs")
        if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs):
            value = [{"input": given, "output": output} for given, output in zip(inputs, outputs, strict=True)]
    items = cast("list[Any]", value) if isinstance(value, list | tuple) else []
    if items and all(isinstance(item, str) and item.strip() for item in items):
        return [str(item) for item in items]
    pairs = [item for item in items if isinstance(item, dict) and {"input", "output"} <= item.keys()]
    if not items or len(pairs) != len(items):
        raise RewardError(
            f"the column {column!r} holds no tests: {value!r:.200}; it needs code, a list of code, or a list of "
            "tables with `input` and `output`"
        )
    return [(_text(pair["input"]), _text(pair["output"])) for pair in pairs]


def _text(value: Any) -> str:
    return "\n".join(map(str, cast("list[Any]", value))) if isinstance(value, list) else str(value)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
