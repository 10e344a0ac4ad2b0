"""What burnish says to bad files, values, rows and checkpoints: an error of its own, soon, that names the thing."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nonsense.cases import Case, judge

MODULES = ("files", "fields", "tables", "data_files", "rows")
SAMPLE = 60
"""Cases of a module that the fast suite tries, evenly spread; broken checkpoints it has in test_checkpoints.py."""


def cases_of(module: str) -> list[Case]:
    family: Any = import_module(f"nonsense.{module}")
    return list(family.cases())


def outcomes(cases: list[Case], folder: Path) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by family and outcome, and what is wrong."""
    counts: Counter[tuple[str, str]] = Counter()
    problems: list[str] = []
    for number, case in enumerate(cases):
        own = folder / str(number)
        own.mkdir()
        verdict = judge(case, own)
        counts[case.family, verdict.outcome] += 1
        if verdict.problem is not None:
            problems.append(f"{case.family}: {case.name}: {verdict.outcome}: {verdict.problem}")
    return counts, problems


@pytest.mark.parametrize("module", MODULES)
def test_a_sample_of_bad_inputs(tmp_path: Path, module: str) -> None:
    cases = cases_of(module)
    _, problems = outcomes(list(islice(cases, 0, None, max(1, len(cases) // SAMPLE))), tmp_path)
    assert not problems, "\n".join(problems)


@pytest.mark.nonsense
def test_every_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At least 3,000; `make nonsense` prints the counts."""
    counts: Counter[tuple[str, str]] = Counter()
    problems: list[str] = []
    for module in (*MODULES, "checkpoints", "unsealed"):
        (folder := tmp_path / module).mkdir()
        found, wrong = outcomes(cases_of(module), folder)
        counts += found
        problems += wrong
    with capsys.disabled():
        print()
        for (family, outcome), count in sorted(counts.items()):
            print(f"{family:32} {outcome:10} {count:5}")
        print(f"{'together':43} {counts.total():5}")
    assert not problems, "\n".join(problems)
    assert counts.total() >= 3000
