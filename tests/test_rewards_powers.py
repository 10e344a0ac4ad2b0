r"""Numbers too large to write out: equal to themselves in other forms, different from others, and never written out."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("sympy")

from burnish.rewards.grading import is_correct
from burnish.rewards.mathematics import read
from burnish.rewards.powers import power, substituted

TOWER = "9^{9^{9^9}}"
BIG = r"2^{10^{12}}"

EQUAL = [
    (TOWER, TOWER),
    (TOWER, "9^{9^{9^{9}}}"),
    (TOWER, "3^{2 \\cdot 9^{9^9}}"),
    (TOWER, "(3^2)^{9^{9^9}}"),
    ("9^9^9^9", TOWER),
    ("2^{2^{2^{2^{2^{2^2}}}}}", "2^{2^{2^{2^{2^{4}}}}}"),
    ("10^{10^{100}}", "10^{10^{100}}"),
    ("10^{10^{10}}", r"2^{10^{10}} \cdot 5^{10^{10}}"),
    (BIG, r"4^{5 \cdot 10^{11}}"),
    (BIG, r"2 \cdot 2^{10^{12} - 1}"),
    (BIG, r"\frac{2^{10^{12} + 3}}{8}"),
    (BIG, r"(2^{10^6})^{10^6}"),
    (BIG, r"(2^{10^{11}})^{10}"),
    (BIG, r"2^{6 \cdot 10^{11}} \cdot 2^{4 \cdot 10^{11}}"),
    (r"2^{6 \cdot 10^{11}}", r"2^{3 \cdot 10^{11}} \cdot 2^{3 \cdot 10^{11}}"),
    (r"2^{3 \cdot 10^{11}}", r"(2\sqrt2)^{2 \cdot 10^{11}}"),
    (BIG, r"\sqrt{2^{2 \cdot 10^{12}}}"),
    (BIG, r"\sqrt[3]{8^{10^{12}}}"),
    (BIG, r"\sqrt{2}^{2 \cdot 10^{12}}"),
    (BIG, r"(-2)^{10^{12}}"),
    (BIG, r"2^{10^{12}} + 0"),
    (r"2^{-10^{12}}", r"\frac{1}{2^{10^{12}}}"),
    (r"2^{-10^{12}}", r"(1/2)^{10^{12}}"),
    (r"(2/3)^{10^9}", r"\frac{2^{10^9}}{3^{10^9}}"),
    (r"2^{10^9 + 1/2}", r"2^{10^9} \sqrt{2}"),
    (r"-2^{10^{12}+1}", r"(-2)^{10^{12}+1}"),
    (r"1^{10^{12}}", "1"),
    (r"0^{10^{12}}", "0"),
    (r"(-1)^{10^{12}+1}", "-1"),
    (r"2^{10^{12}} + 2^{10^{12}}", r"2^{10^{12}+1}"),
    (r"2^{10^{12}} - 1", r"-(1 - 2^{10^{12}})"),
    (r"(2^{10^{12}} - 1)(2^{10^{12}} + 1)", r"4^{10^{12}} - 1"),
    (r"\frac{3^{10^9}-1}{2}", r"\frac12 (3^{10^9}-1)"),
    (r"2^{300000}", r"(2^{100000})^3"),
    (r"1024^{100000}", "2^{1000000}"),
    (r"e^{10^9}", r"(e^{10^8})^{10}"),
    (r"\pi^{10^9}", r"\pi \cdot \pi^{10^9-1}"),
    (r"2^{\pi \cdot 10^9}", r"2^{10^9 \pi}"),
    (r"(1+\sqrt2)^{10^9}", r"(1+\sqrt2)^{10^9-2} (1+\sqrt2)^2"),
    (r"(10^9)!", r"(10^9)!"),
    (r"(10^9)!", r"10^9 \cdot (10^9-1)!"),
    (r"\frac{(10^9)!}{(10^9-2)!}", r"10^9 (10^9 - 1)"),
    (r"\frac{6000!}{5999!}", "6000"),
    (r"((10^9)!)!", r"((10^9)!)!"),
    (r"(10^9)! \cdot (10^8)!", r"(10^8)! \cdot (10^9)!"),
    (r"(10^9)!^2", r"(10^9)! \cdot (10^9)!"),
    (r"(((5!)!)!)!", r"((120!)!)!"),
    (r"(10^9)!!", r"(10^9)!!"),
    (r"2^{(10^9)!}", r"2^{(10^9)!}"),
    (r"2^{5000!}", r"2^{5000!}"),
    (r"\binom{10^9}{10^8}", r"\binom{10^9}{10^8}"),
    (r"\binom{10^9}{10^8}", r"\binom{10^9}{9 \cdot 10^8}"),
    (r"\binom{10^9}{10^8}", r"\frac{(10^9)!}{(10^8)! (9 \cdot 10^8)!}"),
    (r"\binom{10^9}{2}", r"\frac{10^9 (10^9-1)}{2}"),
    (r"\binom{10^8}{10^9}", "0"),
    (r"x^{10^{12}}", r"x \cdot x^{10^{12} - 1}"),
    (r"(2x)^{10^{12}}", r"2^{10^{12}} x^{10^{12}}"),
    (r"2^{10^{12} x}", r"4^{5 \cdot 10^{11} x}"),
    (r"x = 9^{9^{9^9}}", TOWER),
    (r"(9^{9^{9^9}}, 2^{10^{12}})", r"(9^{9^{9^9}}, 4^{5 \cdot 10^{11}})"),
    (r"\{1, 2^{10^{12}}\}", r"\{4^{5 \cdot 10^{11}}, 1\}"),
    (r"[0, 2^{10^{12}}]", r"[0, 2^{10^{12}}]"),
    (r"x < 2^{10^{12}}", r"(-\infty, 2^{10^{12}})"),
    (r"\sum_{k=1}^{3} 2^{10^{12} k}", r"2^{10^{12}} + 2^{2 \cdot 10^{12}} + 2^{3 \cdot 10^{12}}"),
    (r"1" + "0" * 2_000, "10^{2000}"),
    (r"1e9000", "10^{9000}"),
]  # fmt: skip
DIFFERENT = [
    (TOWER, "9^{9^{9^8}}"),
    (TOWER, "9^{9^9}"),
    (TOWER, "8^{9^{9^9}}"),
    (TOWER, "9^{9^{9^9}} + 1"),
    (TOWER, "-9^{9^{9^9}}"),
    (TOWER, "9"),
    (TOWER, "0"),
    (TOWER, r"\infty"),
    (TOWER, r"\frac{1}{9^{9^{9^9}}}"),
    ("2y", TOWER),
    ("5", TOWER),
    ("0", r"9^{-9^{9^9}}"),
    ("1", r"2^{10^{-12}}"),
    (BIG, r"2^{10^{12} + 1}"),
    (BIG, r"2^{10^{13}}"),
    (BIG, r"3^{10^{12}}"),
    (BIG, r"2^{-10^{12}}"),
    (BIG, r"-2^{10^{12}}"),
    (BIG, r"(-2)^{10^{12}+1}"),
    (BIG, r"x^{10^{12}}"),
    (BIG, r"2^{10^{12} + 1/2}"),
    (r"2^{10^{12}} - 1", r"2^{10^{12}}"),
    (r"e^{10^9}", r"\pi^{10^9}"),
    (r"(10^9)!", r"(10^9 + 1)!"),
    (r"(10^9)!", r"(10^9)! - 1"),
    (r"(10^9)!", r"(10^8)!"),
    (r"(10^9)!", r"(10^9)!!"),
    (r"((10^9)!)!", r"(10^9)!"),
    (r"\binom{10^9}{10^8}", r"\binom{10^9}{10^8+1}"),
    (r"\binom{10^9}{10^8}", r"\binom{10^9+1}{10^8}"),
    (r"x^{10^{12}}", r"x^{10^{12}+1}"),
    (r"(2x)^{10^{12}}", r"2 x^{10^{12}}"),
    (r"2^{10^{12}x}", r"2^{10^{12}y}"),
    (r"\lfloor 9^{-9^{9^9}} \rfloor", r"1"),
    (r"x < 2^{10^{12}}", r"x < 2^{10^{13}}"),
    (r"2^{10^{12}} < 5", r"x < 5"),
    (r"(9^{9^{9^9}}, 1)", r"(1, 9^{9^{9^9}})"),
    (r"\int_0^1 f(x) dx", TOWER),
    (r"\int_0^1 f(x) dx", r"(1, \{9^{9^{9^9}}, x\})"),
    (r"\hbar", TOWER),
    (r"\hbar", r"(1, \{9^{9^{9^9}}, x\})"),
    (r"\lfloor 2^{10^{12}} / 100 \rfloor", "0"),
    ("6", r"2 \cdot 3 = 2^{10^{12}}"),
    ("5", r"\sum_{k=1}^{3} 9^{9^{9^k}}"),
    ("5", r"\sum_{k=0}^{\infty} 2^{-10^{12} k}"),
    ("5", r"\prod_{k=1}^{9} (10^{10^k})!"),
    ("5", r"\sum_{k=1}^{2} \binom{10^9 k}{10^8 k}"),
    ("5", r"(x + 9^{9^9})^{9^{9^9}}"),
    ("5", r"(5 \text{ cm})^{10^{12}}"),
    ("5", r"((((9^{9999})^{9999})^{9999})^{9999})^{9999}"),
    ("5", r"f(2)^{10^{12}}"),
    ("5", r"\sin(9^{9^{9^9}})"),
    ("5", r"\log_{10} (10^{10^{10}})"),
    ("5", r"2^{10^{12}i}"),
    ("5", "2^{" * 50 + "9" + "}" * 50),
    ("5", "(" * 40 + "9" + "!)" * 40),
    ("5", r"2^{199999} " * 300),
]  # fmt: skip


def graded(gold: str, answer: str) -> tuple[bool, float]:
    """Grade in this process, without the pool that would end it, and without math-verify."""

    def parse(text: str) -> list[Any]:
        return [read("1")] if text == gold else pytest.fail(f"math-verify got {text!r}")

    start = time.process_time()
    return is_correct(gold, answer, parse, lambda *_: pytest.fail("math-verify")), time.process_time() - start


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_numbers_of_any_size(gold: str, answer: str) -> None:
    for pair in ((gold, answer), (answer, gold)):
        verdict, seconds = graded(*pair)
        assert verdict
        assert seconds < 1


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_numbers_of_any_size(gold: str, answer: str) -> None:
    verdict, seconds = graded(gold, answer)
    assert not verdict
    assert seconds < 1


def test_what_can_be_written_out_is() -> None:
    assert read("2^{100000}") == 2**100_000
    assert read("4999!").is_Integer
    assert read(r"\binom{5000}{2500}").is_Integer
    assert read(r"\binom{1/2}{2}") == read("-1/8")
    assert read("6000!").free_symbols
    assert read("2^{300000}").free_symbols


def test_substitution_is_that_of_sympy_but_for_large_powers() -> None:
    """An exponent at which SymPy would write out a number of 10^11 digits."""
    value = read(r"\frac{x^3 + \sqrt{x}}{x!} - \binom{x}{2} + 3^x")
    [x] = value.free_symbols
    assert substituted(value, {x: read("29/23")}) == value.xreplace({x: read("29/23")})
    large = read(r"2^{10^{12} x}")
    [x] = large.free_symbols
    assert substituted(large, {x: read("1/2")}) == power(read("2"), read(r"5 \cdot 10^{11}"))
