"""The `math` verifier against labelled cases: no wrong answer accepted, few right ones rejected, nothing evaluated."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RewardError
from burnish.rewards import WorkerPool, math_answer
from burnish.rewards.grading import is_correct

pytest.importorskip("math_verify")

DATA = json.loads((Path(__file__).parent / "math_cases.json").read_text())
CASES: list[dict[str, Any]] = DATA["cases"]
KNOWN: dict[tuple[str, str], str] = {
    (r"(-\infty, -8) \cup (8, \infty)", "|x|>8"): "inequalities are solved only where they are linear",
    ("12", r"12\text{ (twelve)}"): "remarks in brackets",
    ("7", "7 (mod 10)"): "remarks in brackets",
    ("x>3", r"x>3 \text{ (i.e. } (3,\infty))"): "remarks in brackets",
    ("2", "two"): "numbers in words",
    (r"1 \text{ and } 2", "1 & 2"): "& separates the columns of a matrix",
    (
        r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
    ): "array as a matrix",
}
"""(gold, answer) of right answers that are rejected -> why."""

TIMEOUT_SECONDS = 3.0
WRAPPERS = (
    "${}$",
    r"\boxed{{{}}}",
    r"\({}\)",
    "**{}**",
    " {} ",
    r"$\displaystyle {}$",
    r"$\boxed{{{}}}$",
    "The answer is ${}$.",
)


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(num_workers=2)
    yield pool
    pool.close()


def graded(pool: WorkerPool, pairs: list[tuple[str, str]]) -> list[Any]:
    """Grade (gold, answer) pairs, answers in full, however empty."""
    verifier = math_answer(sources=("text",), pool=pool, timeout_seconds=TIMEOUT_SECONDS)
    return verifier(["p"] * len(pairs), [a for _, a in pairs], answer=[g for g, _ in pairs])


@pytest.fixture(scope="module")
def values(pool: WorkerPool) -> list[Any]:
    return graded(pool, [(case["gold"], case["answer"]) for case in CASES])


def test_cases_are_many_balanced_and_without_doubles() -> None:
    assert len(CASES) >= 1_000
    assert 0.4 < sum(case["equal"] for case in CASES) / len(CASES) < 0.6
    assert len({(case["gold"], case["answer"]) for case in CASES}) == len(CASES)
    assert len(DATA["conventions"]) > 10


def test_no_wrong_answer_is_accepted(values: list[Any]) -> None:
    assert [case for case, value in zip(CASES, values, strict=True) if value == 1.0 and not case["equal"]] == []


def test_right_answers_are_accepted_but_for_the_known_ones(values: list[Any]) -> None:
    rejected = {(c["gold"], c["answer"]) for c, value in zip(CASES, values, strict=True) if c["equal"] and value != 1.0}
    assert rejected == set(KNOWN)


def test_every_wrong_answer_scores_0_unless_it_cannot_be_computed(values: list[Any]) -> None:
    failed = [c["answer"] for c, value in zip(CASES, values, strict=True) if isinstance(value, Exception)]
    assert all("^" in answer or "!" in answer for answer in failed), failed
    assert len(failed) <= 4


def golds() -> list[str]:
    return list(dict.fromkeys(case["gold"] for case in CASES))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_gold_answer_equals_itself_however_it_is_wrapped(pool: WorkerPool, wrapper: str) -> None:
    wrapped = [(gold, wrapper.format(gold)) for gold in golds() if "$" not in gold or wrapper.strip() == "{}"]
    assert [pair for pair, value in zip(wrapped, graded(pool, wrapped), strict=True) if value != 1.0] == []


def test_wrappers_change_no_verdict(pool: WorkerPool, values: list[Any]) -> None:
    """Every seventh case, each in another wrapper."""
    picked = [
        (case, value, WRAPPERS[i % len(WRAPPERS)])
        for i, (case, value) in enumerate(zip(CASES, values, strict=True))
        if i % 7 == 0
        and isinstance(value, float)
        and not re.search(r"[$`*#]|boxed|[Aa]nswer|[Tt]hus|^\s*$", case["answer"])
    ]
    again = graded(pool, [(case["gold"], wrapper.format(case["answer"])) for case, _, wrapper in picked])
    assert [(c, w) for (c, value, w), now in zip(picked, again, strict=True) if now != value] == []


def test_a_changed_digit_is_never_equal(pool: WorkerPool) -> None:
    changed: list[tuple[str, str]] = []
    for gold in golds():
        if "floor" in gold:
            continue  # rounds its digits away
        # A leading or a trailing zero, an index or a factor of 0 or 1 may mean nothing; 3 to 8 always do.
        for digit in list(re.finditer(r"[3-8]", gold))[:2]:
            other = str(int(digit[0]) + 1)
            changed.append((gold, gold[: digit.start()] + other + gold[digit.end() :]))
    assert len(changed) > 80
    accepted = [pair for pair, value in zip(changed, graded(pool, changed), strict=True) if value == 1.0]
    assert accepted == []


def test_a_gold_answer_that_cannot_be_parsed_fails_its_completion(pool: WorkerPool) -> None:
    values = graded(pool, [("$", "5"), ("$$", "x"), ("5", "5")])
    assert all(isinstance(value, RewardError) and "cannot be read" in str(value) for value in values[:2])
    assert values[2] == 1.0


LONG = [
    "(" * 3_000, r"\frac{" * 600, "{" * 3_900, "1+" * 1_900 + "1", "9^" * 1_000 + "9", "**" * 2_000, "x " * 1_900,
    r"\sqrt" * 700, "|" * 3_000, "1,000," * 600, r"\boxed{" * 500, "is " * 1_300,
]  # fmt: skip


@pytest.mark.parametrize("text", LONG)
def test_long_answers_are_over_quickly(text: str) -> None:
    """In this process, without the pool that would end them."""
    start = time.process_time()
    assert not is_correct("5", text, lambda _: [], lambda *_: False)
    assert time.process_time() - start < 3


def test_answers_are_never_evaluated(pool: WorkerPool, tmp_path: Path) -> None:
    file = tmp_path / "touched"
    code = f"__import__('pathlib').Path({str(file)!r}).touch()"
    for gold in ("5", r"\int_0^1 f(x) dx", "x+1"):
        assert graded(pool, [(gold, code)])[0] != 1.0
    assert not file.exists()
