"""Values of mathematical answers, and the bounded operations that build them."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from burnish.rewards.notation import Unreadable

__all__ = [
    "GIANT",
    "Choice",
    "Clock",
    "Equation",
    "Grid",
    "Inequality",
    "Items",
    "Named",
    "Numeral",
    "Pair",
    "Ratio",
    "Region",
    "Words",
    "as_set",
    "expression",
    "giants",
    "is_expression",
    "is_unit",
    "number",
    "relate",
    "sympy_module",
    "unit",
    "unit_symbol",
    "units_of",
    "variables",
]

GIANT = "giant "
"""What the name of a symbol begins with that stands for a number too large to write out; see `powers`."""
_MAX_DECIMAL_EXPONENT = 10_000


@dataclass(frozen=True)
class Items:
    r"""Unordered answers: `\{1, 2\}`, "1, 2", "1 and 2", "\pm 1"."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """Ordered elements in brackets: a tuple, a point, an open interval of two, a vector."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Region:
    """Set of reals; `name` is the variable of the inequality that described it."""

    set: Any
    name: str = ""


@dataclass(frozen=True)
class Grid:
    """Matrix, as rows."""

    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Named:
    """A value with a name: x = 5, f(x) = x^2."""

    name: str
    value: Any
    symbol: Any = None


@dataclass(frozen=True)
class Equation:
    """left = right, as left - right."""

    difference: Any


@dataclass(frozen=True)
class Inequality:
    """Expression that is negative; or, unless strict, at most 0."""

    negative: Any
    strict: bool


@dataclass(frozen=True)
class Ratio:
    """a : b : c."""

    terms: tuple[Any, ...]


@dataclass(frozen=True)
class Clock:
    """Time of day, or a ratio that looks like one; `half` is "am", "pm" or ""."""

    hours: int
    minutes: int
    half: str


@dataclass(frozen=True)
class Choice:
    """Letter of a multiple choice question."""

    letter: str


@dataclass(frozen=True)
class Numeral:
    """Digits in a base that is written."""

    digits: str
    base: int


@dataclass(frozen=True)
class Words:
    """Answer in words."""

    text: str


@functools.cache
def sympy_module() -> Any:
    """Return SymPy."""
    # Imported by name, since the package ships no types and only workers need it.
    return importlib.import_module("sympy")


def is_expression(value: Any) -> bool:
    """Return whether a value is a SymPy expression."""
    return isinstance(value, sympy_module().Expr)


_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "inche": "inch", "in": "inch", "feet": "foot", "ft": "foot", "yd": "yard", "kilogram": "kg",
    "gram": "g", "liter": "L", "litre": "L", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h",
    "mi": "mile",
    "dollar": "dollar", "usd": "dollar", "buck": "dollar", "cent": "cent", "degree": "degree", "deg": "degree",
    "percent": "percent",
    "per cent": "percent", "lb": "pound", "unit": "unit",
}  # fmt: skip
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = frozenset(
    [
        "not",
        "is",
        "are",
        "was",
        "maybe",
        "but",
        "wrong",
        "incorrect",
        "false",
        "true",
        "to",
        "than",
        "plus",
        "minus",
        "times",
        "over",
        "no",
        "never",
        "if",
        "for",
        "where",
        "with",
        "then",
        "or",
        "and",
        "equals",
        "equal",
        "let",
        "because",
        "since",
        "which",
        "we",
        "i",
        "you",
        "it",
        "this",
        "that",
        "solution",
        "answer",
        "possibly",
        "probably",
        "approximately",
        "about",
        "least",
        "most",
        "at",
        "between",
        "squared",
        "cubed",
        "factorial",
        "choose",
        "mod",
        "more",
        "less",
        "either",
        "both",
        "neither",
    ]
)


def unit_symbol(name: str) -> Any:
    """Return the symbol of a unit, which multiplies its number."""
    return sympy_module().Symbol(f"unit {name}", positive=True)


def unit(text: str) -> Any:
    """Read a unit or a scale: cm, "square meters", m/s, cm^2, "miles per hour", "million", "red apples".

    Raises:
        Unreadable: words that are not a unit.
    """
    text = re.sub(r"\bpercentage points?\b|\bper cent\b", "percent", text.strip().strip(".,()"))
    product, sign, exponent = sympy_module().Integer(1), 1, 1
    named: list[str] = []
    for word in [*re.findall(r"[A-Za-z]+|/|\^ ?\{?-?\d\}?|\S", text), ""]:
        if word in ("square", "sq", "cubic", "cu"):
            exponent = 2 if word[0] == "s" else 3
        elif word in ("per", "/", "") or word[0] == "^":
            if named:
                raised = int(re.sub(r"[^-\d]", "", word)) if word[:1] == "^" else exponent
                product *= unit_symbol(" ".join(named)) ** (sign * raised)
                named, exponent = [], 1
            sign = -1 if word in ("per", "/") else sign
        elif word.lower() in _SCALES and not named:
            product *= 10 ** _SCALES[word.lower()]
        elif not word.isalpha() or word.lower() in _NOT_UNITS or word in ("A", "B", "C", "D", "E"):
            raise Unreadable(f"{word!r} is not a unit")
        else:
            single = word if len(word) < 4 else word.lower().removesuffix("s")
            named.append(_UNITS.get(single, single))
    return product


def is_unit(value: Any) -> bool:
    """Return whether a value consists of units alone."""
    return is_expression(value) and bool(value.free_symbols) and units_of(value) == value.free_symbols


def units_of(value: Any) -> set[Any]:
    """Return the symbols of units in an expression."""
    return {symbol for symbol in value.free_symbols if symbol.name.startswith("unit ")}


def giants(value: Any) -> set[Any]:
    """Return the symbols of numbers too large to write out, in an expression or a set."""
    return {symbol for symbol in value.free_symbols if symbol.name.startswith(GIANT)}


def variables(value: Any) -> set[Any]:
    """Return the letters and units in an expression."""
    return value.free_symbols - giants(value)


def expression(value: Any) -> Any:
    """Return a value that must be an expression.

    Raises:
        Unreadable: another value.
    """
    if not is_expression(value):
        raise Unreadable(f"{type(value).__name__} inside an expression")
    return value


def number(text: str) -> Any:
    """Convert digits, with a decimal point and an exponent, to an exact rational.

    Raises:
        Unreadable: an exponent above 10,000.
    """
    mantissa, _, exponent = text.lower().partition("e")
    if abs(int(exponent or 0)) > _MAX_DECIMAL_EXPONENT:
        raise Unreadable(f"the exponent of {text[:40]}")
    value = Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
    return sympy_module().Rational(value.numerator, value.denominator)


def as_set(value: Any) -> Any:
    """Convert intervals, sets of numbers and regions to a SymPy set of reals.

    Raises:
        Unreadable: anything else.
    """
    sympy = sympy_module()
    if isinstance(value, Region):
        return sympy.Interval(-sympy.oo, sympy.oo) if value.set == sympy.Reals else value.set
    if isinstance(value, Items):
        return sympy.FiniteSet(*(expression(item) for item in value.items))
    if isinstance(value, Pair) and len(value.items) == 2:
        return interval(*value.items, True, True)
    raise Unreadable(f"{type(value).__name__} is not a set of reals")


def interval(low: Any, high: Any, low_open: bool, high_open: bool) -> Any:
    """Build an interval whose ends are real or infinite."""
    sympy = sympy_module()
    low, high = expression(low), expression(high)
    if any(end.is_extended_real is not True for end in (low, high)) or (
        low.is_number and high.is_number and not low <= high
    ):
        raise Unreadable("not an interval")
    return sympy.Interval(low, high, low_open, high_open)


def relate(values: list[Any], relations: list[str]) -> Any:
    """Build the value of a chain of relations.

    Raises:
        Unreadable: a mixture without a meaning, or a chain that contradicts itself.
    """
    if "~" in relations:
        return _approximated(values, relations)
    if set(relations) == {"="}:
        return _equated(values)
    if relations == ["in"]:
        return Region(as_set(values[1]), str(expression(values[0])))
    if not set(relations) <= {"<", ">", "<=", ">=", "!="}:
        raise Unreadable(f"relations {relations}")
    parts = [_compared(a, relation, b) for a, relation, b in zip(values, relations, values[1:], strict=False)]
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Region) and part.name == parts[0].name for part in parts):
        return Region(sympy_module().Intersection(*(part.set for part in parts)), parts[0].name)
    return Items(tuple(parts))


def _approximated(values: list[Any], relations: list[str]) -> Any:
    """Return the exact value before an approximation that is within 1% of it."""
    if relations[-1] != "~" or "~" in relations[:-1]:
        raise Unreadable("several approximations")
    exact = relate(values[:-1], relations[:-1]) if len(values) > 2 else expression(values[0])
    last = exact.value if isinstance(exact, Named) else exact
    near = expression(values[-1])
    gap = sympy_module().Abs(expression(last) - near).evalf(15)
    if not gap.is_comparable or gap > 0.01 * abs(near.evalf(15)):
        raise Unreadable("an approximation that is not one")
    return exact


def _equated(values: list[Any]) -> Any:
    first, last = values[0], values[-1]
    if isinstance(first, Pair) and all(is_expression(item) and item.is_Symbol for item in first.items):
        return Named(str(first.items), last)
    differences = [expression(a) - expression(b) for a, b in itertools.pairwise(values)]
    if len(values) == 2 and last.is_Symbol and variables(last) and not variables(first):
        return Named(last.name, first, last)
    if not any(variables(value) for value in values):
        # A calculation: steps that disagree leave several values.
        return Items(tuple(values))
    if len(differences) > 1:
        raise Unreadable("a chain of equations")
    return Equation(differences[0])


def _compared(left: Any, relation: str, right: Any) -> Any:
    """Turn one inequality into a region where it is linear in one variable, else into a normal form."""
    sympy = sympy_module()
    if relation in (">", ">="):
        left, right, relation = right, left, relation.replace(">", "<")
    negative = expression(left) - expression(right)
    letters = variables(negative)
    if len(letters) == 1:
        [x] = letters
        slope = sympy.diff(negative, x)
        if slope.is_number and slope.is_real and not slope.is_zero:
            end = -negative.subs(x, 0) / slope
            ends = (end, sympy.oo) if slope < 0 else (-sympy.oo, end)
            if relation == "!=":
                return Region(sympy.Complement(sympy.Reals, sympy.FiniteSet(end)), x.name)
            return Region(sympy.Interval(*ends, relation == "<", relation == "<"), x.name)
    elif not letters or relation == "!=":
        raise Unreadable("a relation between numbers")
    if any(value.has(sympy.oo, -sympy.oo) for value in (left, right)):
        raise Unreadable("a relation to infinity")
    return Inequality(negative, relation == "<")
