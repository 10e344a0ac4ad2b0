"""Verifiers, each against values worked out by hand; and tasks that grade their own gold answers."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import (
    Criterion,
    Rubric,
    WorkerPool,
    check_gold,
    exact_answer,
    format_tags,
    gym_answer,
    math_answer,
    numeric_answer,
    soft_overlong,
)

GOLD, HANGS = r"\int_0^2 y dy", r"\int_0^{9^{9^{9^9}}} y dy"
"""Beyond our own grammar, which bounds its work; math-verify writes the number out."""


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(num_workers=1)
    yield pool
    pool.close()


def tagged(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


def one(verifier: Any, text: str, **row: Any) -> Any:
    [value] = verifier(prompts=["p"], completions=[text], **{name: [v] for name, v in row.items()})
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" \n<think>\na\nb</think>\n\n<answer>b</answer>\n", 1.0),
        ("Sure! <think>a</think><answer>b</answer>", 0.75),
        ("<think>a</think> so <answer>b</answer>", 0.75),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("<think>a<answer>b</answer></think>", 0.5),  # nested
        ("<think>a<answer></think>b</answer>", 0.5),  # crossed
        ("<think>a</think><think>a</think><answer>b</answer>", 0.25),  # repeated
        ("<think>a</think><answer>b", 0.25),  # cut off
        ("<think>a</think><answer> \n</answer>", 0.25),  # empty
        ("</think>a<think><answer>b</answer>", 0.25),  # backwards
        ("<think><think>a</think></think><answer>b</answer>" * 3, 0.0),
        ("", 0.0),
        ("b", 0.0),
    ],
)
def test_format_gives_partial_credit(text: str, expected: float) -> None:
    assert one(format_tags(), text) == expected


def test_format_options() -> None:
    assert one(format_tags(prefix="<think>"), "a</think><answer>b</answer>") == 1.0
    assert one(format_tags(prefix="<think>"), "<think>a</think><answer>b</answer>") == 0.25
    assert one(format_tags(allow_outside=True), "<think>a</think> so <answer>b</answer>") == 1.0
    assert one(format_tags(allow_outside=True), "<answer>b</answer><think>a</think>") == 0.5
    assert one(format_tags(tags=["a", "b", "c"]), "<a>1</a>") == pytest.approx(1 / 6)
    for tags in ([], "think", ["a", "a"], ["<a>"]):
        with pytest.raises(ConfigError, match="format_tags"):
            format_tags(tags=tags)


def test_conversational_and_plain_completions_mix() -> None:
    chat = [{"role": "assistant", "content": tagged("5")}]
    values = exact_answer()(prompts=["p", [], "p"], completions=[tagged("5"), chat, "5"], answer=["5", 5, "5"])
    assert values == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Paris", "Paris", 1.0),
        (" New \n York ", "New York", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris, France", "Paris", 0.0),
        ("b", ["a", "b"], 1.0),
        ("3", 3.0, 1.0),
    ],
)
def test_exact(answer: str, gold: Any, expected: float) -> None:
    assert one(exact_answer(), tagged(answer), answer=gold) == expected


def test_exact_options() -> None:
    assert one(exact_answer(ignore_case=True), tagged("PARIS"), answer="Paris") == 1.0
    assert one(exact_answer(column="gold", sources=["boxed"]), r"\boxed{a}", gold="a") == 1.0
    assert one(exact_answer(tag="final"), "<final>a</final>", answer="a") == 1.0
    assert one(exact_answer(), tagged("a"), answer=None) is None  # does not apply


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("1,234", 1234, 1.0),
        ("\N{MINUS SIGN}7", "-7", 1.0),
        ("7", "-7", 0.0),
        (r"\frac{1}{2}", 0.5, 1.0),
        ("$18.00", "18", 1.0),
        ("18 dollars", "18", 1.0),
        ("0.333", "1/3", 0.0),
        ("18 or 19", "18", 0.0),
        ("eighteen", "18", 0.0),
    ],
)
def test_numeric_is_exact(answer: str, gold: Any, expected: float) -> None:
    assert one(numeric_answer(), tagged(answer), answer=gold) == expected


def test_numeric_tolerances_include_their_bound() -> None:
    assert one(numeric_answer(absolute_tolerance=0.1), tagged("1.1"), answer="1") == 1.0
    assert one(numeric_answer(absolute_tolerance=0.1), tagged("1.1001"), answer="1") == 0.0
    assert one(numeric_answer(relative_tolerance=0.01), tagged("-202"), answer="-200") == 1.0
    assert one(numeric_answer(relative_tolerance=0.01), tagged("-202.1"), answer="-200") == 0.0
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="absolute_tolerance"):
            numeric_answer(absolute_tolerance=bad)


def test_a_gold_answer_that_is_no_number_fails_its_own_row() -> None:
    values = numeric_answer()(prompts=["p"] * 2, completions=[tagged("5")] * 2, answer=["five", "5"])
    assert isinstance(values[0], RewardError)
    assert "'five'" in str(values[0])
    assert values[1] == 1.0


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RewardError, match="needs the column 'answer'; the rows have: solution"):
        one(exact_answer(), "x", solution="a")


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("1,234", "1234", 1.0),
        (r"\frac{1}{2}", "$0.5$", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("x^2+2x+1", "(x+2)^2", 0.0),
        ("x^2", "2", 0.0),
        (r"\{1,2\}", r"\{2,1\}", 1.0),
        ("(1,2)", "(2,1)", 0.0),
        (r"\frac{\pi}{2}", "pi/2", 1.0),
        ("2*sqrt(2)", r"\sqrt{8}", 1.0),
        ("5", r"5 \text{ cm}", 1.0),
        ("5", "5 pi", 0.0),
        ("-3", "\N{MINUS SIGN}3", 1.0),
        ("5", "x = 5", 1.0),
        (["7", r"\sqrt{4}"], "2", 1.0),
    ],
)
def test_math(pool: WorkerPool, gold: Any, answer: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert one(math_answer(pool=pool), tagged(answer), answer=gold) == expected


def test_math_reads_tags_then_boxes(pool: WorkerPool) -> None:
    verifier = math_answer(pool=pool)
    assert one(verifier, r"thus \boxed{5}", answer="5") == 1.0
    assert one(verifier, "5", answer="5") == 0.0


def test_a_hanging_answer_fails_alone_and_in_any_thread(pool: WorkerPool) -> None:
    rubric = Rubric([Criterion("math", math_answer(pool=pool, timeout_seconds=6, failures="exclude"))])
    results: list[Any] = []

    def grade() -> None:
        completions = [tagged("y"), tagged(HANGS), tagged(GOLD)]
        results.extend(rubric.criteria[0].function(prompts=["p"] * 3, completions=completions, answer=[GOLD] * 3))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert results[0] == 0.0
    assert isinstance(results[1], TimeoutError)
    assert "6 s of work" in str(results[1])
    assert results[2] == 1.0  # a new process took over


def test_a_hanging_answer_scores_zero_unless_told_otherwise(pool: WorkerPool) -> None:
    pytest.importorskip("math_verify")
    assert one(math_answer(pool=pool, timeout_seconds=1), tagged(HANGS), answer=GOLD) == 0.0
    with pytest.raises(ConfigError, match="failures = 'none' of math_answer: use zero or exclude"):
        math_answer(failures="none")


def test_the_quick_path_needs_no_process() -> None:
    pool = WorkerPool(num_workers=1)
    pool.map = None  # type: ignore[assignment, method-assign]
    verifier = math_answer(pool=pool)
    golds, answers = ["x+1", "0.50", "7"], ["x+1", "1/2", "8"]
    assert verifier(["p"] * 3, [tagged(a) for a in answers], answer=golds) == [1.0, 1.0, 0.0]


def test_a_worker_reports_errors_and_survives(pool: WorkerPool) -> None:
    calls = [{"gold": "$", "answer": "y"}, {"gold": "2y", "answer": "y+y"}]
    error, value = pool.map("math", calls, timeout_seconds=5)
    assert isinstance(error, RewardError)
    assert "cannot be read as mathematics" in str(error)
    assert value == 1.0
    [error] = pool.map("nothing", [{}], timeout_seconds=5)
    assert "KeyError" in str(error)


def test_equal_calls_run_once_and_workers_run_side_by_side() -> None:
    pool = WorkerPool(num_workers=2)
    calls = [{"gold": GOLD, "answer": answer} for answer in (HANGS, GOLD, HANGS)]
    results = pool.map("math", calls, timeout_seconds=6)
    pool.close()
    assert results[1] == 1.0
    assert results[0] is results[2]
    assert isinstance(results[0], TimeoutError)
    with pytest.raises(ConfigError, match="num_workers = 0"):
        WorkerPool(num_workers=0)


TASKS = [
    "basic_arithmetic",
    "chain_sum",
    "countdown",
    "gcd",
    "leg_counting",
    "n_queens",
    "rearc",
    "spell_backward",
    "zebra_puzzles",
]


def gym_rows(tasks: list[str]) -> list[dict[str, Any]]:
    factory = pytest.importorskip("reasoning_gym.factory")
    pytest.importorskip("reasoning_gym")
    entries = [(task, factory.create_dataset(task, size=1, seed=5)[0]) for task in tasks]
    return [{"prompt": e["question"], "gym_task": task, "gym_entry": json.dumps(e)} for task, e in entries]


def test_gym_tasks_grade_their_own_gold_answers(pool: WorkerPool) -> None:
    rows = gym_rows(TASKS)
    verifier = gym_answer(pool=pool)
    assert check_gold(Rubric([Criterion("gym", verifier)]), rows) == []
    columns = {name: [row[name] for row in rows] for name in ("gym_task", "gym_entry")}
    wrong = verifier(prompts=TASKS, completions=[tagged("-12345")] * len(rows), **columns)
    assert all(isinstance(value, float) and value < 1 for value in wrong)


def test_gym_partial_credit_and_binary(pool: WorkerPool) -> None:
    entry = json.dumps({"question": "q", "answer": "12", "metadata": {}})
    row = {"gym_task": "gcd", "gym_entry": entry}
    assert one(gym_answer(pool=pool), tagged("0012"), **row) == 0.5  # the gold answer in a longer text
    assert one(gym_answer(pool=pool, binary=True), tagged("0012"), **row) == 0.0
    assert one(gym_answer(pool=pool, binary=True), tagged("12"), **row) == 1.0
    assert one(gym_answer(pool=pool), tagged("12"), gym_task=None, gym_entry=None) is None
    assert "not registered" in str(one(gym_answer(pool=pool), tagged("12"), gym_task="nope", gym_entry=entry))


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"burnish\[math\]"):
        math_answer()
    with pytest.raises(ConfigError, match=r"burnish\[envs\]"):
        gym_answer()


def test_check_gold_finds_broken_tasks() -> None:
    rubric = Rubric([Criterion("number", numeric_answer()), Criterion("format", format_tags())])
    rows = [{"answer": "5"}, {"answer": "five"}, {"answer": None}, {"answer": ""}, {}, {"answer": "<answer>5"}]
    failures = check_gold(rubric, rows)
    assert [(f.index, f.criterion, f.value) for f in failures] == [(i, "number", None) for i in (1, 3, 4)] + [
        (5, "number", None)
    ]
    assert "'five'" in failures[0].reason


def test_soft_overlong_is_a_ramp() -> None:
    ids = [[0] * n for n in (0, 6, 8, 10, 50)]
    assert soft_overlong(max_completion_length=10, cache=4)(completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ConfigError, match="cache = 11"):
        soft_overlong(max_completion_length=10, cache=11)


@pytest.mark.parametrize("bad", [{"sources": []}, {"sources": ["tags"]}, {"tag": "<answer>"}])
def test_bad_extraction_options(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exact_answer"):
        exact_answer(**bad)
