"""Answers in texts, and numbers as exact fractions."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from burnish.errors import ConfigError
from burnish.rewards import Criterion, Rubric, count_answers, exact_answer, format_tags, numeric_answer
from burnish.rewards.answers import SOURCES, answer_text, extract_answer, parse_number, render_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>5</answer>", "5"),
        ("<think>x</think>\n<answer>\n two\nlines \n</answer>\n", "two\nlines"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer></answer>", "2"),  # the inner pair is the well-formed one
        ("<answer>1</answer><answer>2", "1"),  # cut off: the last one that closed
        ("<answer>  </answer>", None),
        ("<Answer>5</Answer>", None),
        ("</answer>5<answer>", None),
        ("the answer is 5", None),
    ],
)
def test_tag_source_is_strict(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        ("boxed{1}", None),
    ],
)
def test_boxed_source_balances_braces(text: str, expected: str | None) -> None:
    assert extract_answer(text, sources=["boxed"]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from 10 to -3.5.", "-3.5"),
        ("it costs $1,234.50", "1,234.50"),
        ("10-7", "7"),  # a difference, not minus seven
        ("a \N{MINUS SIGN}2", "-2"),
        ("it is 3/4.", "3/4"),
        ("none", None),
    ],
)
def test_last_number_source(text: str, expected: str | None) -> None:
    assert extract_answer(text, sources=["last_number"]) == expected


def test_sources_are_tried_in_order() -> None:
    text = r"\boxed{1} and <answer>2</answer>"
    assert extract_answer(text, sources=["tag", "boxed"]) == "2"
    assert extract_answer(text, sources=["boxed", "tag"]) == "1"
    assert extract_answer("only 3", sources=["tag", "boxed", "last_number"]) == "3"
    assert extract_answer("  all of it ", sources=["text"]) == "all of it"
    with pytest.raises(ConfigError, match="'tags'"):
        extract_answer("x", sources=["tags"])


@pytest.mark.parametrize("source", SOURCES)
def test_rendered_answers_are_found_again(source: str) -> None:
    assert extract_answer(render_answer("42", tag="final", sources=[source]), tag="final", sources=[source]) == "42"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", Fraction(72)),
        (" +4 ", Fraction(4)),
        ("-3", Fraction(-3)),
        ("\N{MINUS SIGN}3", Fraction(-3)),
        ("-$5", Fraction(-5)),
        ("1,234", Fraction(1234)),
        ("1 234 567", Fraction(1234567)),
        ("1\N{NARROW NO-BREAK SPACE}234", Fraction(1234)),
        ("$1,000.50", Fraction(2001, 2)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("-3/4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"$-\dfrac{1}{2}$", Fraction(-1, 2)),
        (r"\boxed{7}", Fraction(7)),
        ("1e3", Fraction(1000)),
        ("2e-2", Fraction(1, 50)),
        (r"2 \times 10^{3}", Fraction(2000)),
        ("50%", Fraction(50)),
        (r"50\%", Fraction(50)),
        ("12 km", Fraction(12)),
        (r"5\text{ cm}", Fraction(5)),
        ("5 m/s^2", Fraction(5)),
        ("3 red apples", Fraction(3)),
        (r"\frac12", Fraction(1, 2)),
        (r"\dfrac 1 2", Fraction(1, 2)),
        (r"-\tfrac{3}4", Fraction(-3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("10^{-3}", Fraction(1, 1000)),
        ("-10^2", Fraction(-100)),
        (r"2 \cdot 10^{-3}", Fraction(1, 500)),
    ],
)
def test_numbers(text: str, expected: Fraction) -> None:
    assert parse_number(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "12,34",
        "1.2.3",
        "1 2",
        "3/0",
        r"\frac{1}{0}",
        r"\frac10",
        r"1\frac{-1}{2}",
        "10^{9999}",
        "12 or 13",
        "12 and more",
        "1e999999",
        "1" * 300,
        "--3",
        "5,",
    ],
)
def test_not_one_number(text: str) -> None:
    assert parse_number(text) is None


def test_units_can_be_refused() -> None:
    assert parse_number("5 pi", units=False) is None
    assert parse_number("5", units=False) == 5


def test_gold_answers_as_text() -> None:
    assert [answer_text(value) for value in (3, 3.0, 2.5, "3.0")] == ["3", "3", "2.5", "3.0"]


PIECES = [
    r"\boxed{", r"\boxed ", r"\boxed{1}", "{", "}", "{}", "<answer>", "</answer>", "<answer>1</answer>", "<answer", "<",
    "1", "1,", "1,111", "1 111 ", "1.", "1/", "-", "- 1", ".", " ", "\n", "$", "\\", r"\frac{1}", "a", "1e",
    "\N{MINUS SIGN}",
]  # fmt: skip


def _seconds(scan: Callable[[str], Any], text: str) -> float:
    times: list[float] = []
    for _ in range(2):
        start = time.process_time()
        scan(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("piece", PIECES)
def test_scanning_in_the_trainer_takes_linear_time(piece: str) -> None:
    """Eight times the text takes about 8 times as long; a scan in quadratic time takes 64 times as long."""
    columns: Any = {"prompts": ["p"], "answer": ["1"]}
    rubric = Rubric([Criterion("numeric", numeric_answer())])
    scans: dict[str, Callable[[str], Any]] = {
        "numeric": lambda text: numeric_answer(sources=["text"])(completions=[text], **columns),
        "exact": lambda text: exact_answer(sources=["text"], ignore_case=True)(completions=[text], **columns),
        "format": lambda text: format_tags()([text]),
        "diagnosis": lambda text: count_answers(rubric, [text]),
        **{source: lambda text, source=source: extract_answer(text, sources=[source]) for source in SOURCES},
    }
    for name, scan in scans.items():
        for prefix, suffix in (("", ""), ("<answer>", "</answer>"), (r"\boxed{", "}")):
            short, long = (prefix + piece * (length // len(piece)) + suffix for length in (10_000, 80_000))
            # The added time drowns the noise of scans that are over at once.
            assert _seconds(scan, long) < 24 * _seconds(scan, short) + 0.01, (name, prefix)
