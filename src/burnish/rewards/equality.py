"""Equality of parsed mathematical answers, exact, and with the structure that the gold answer has.

Rationals are compared as rationals. Other numbers are compared at a precision beyond every digit that occurs in either
of them, relative to their size, and expressions with variables at several rational points: an identity in its variables
holds at all of them, anything else at almost none (Schwartz-Zippel).

Numbers too large to write out are expressions of such variables, too: the giants of :mod:`burnish.rewards.powers`. At
the points, other giants may come up, such as (29/23)^(10^12), and are compared in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from burnish.rewards.notation import Unreadable
from burnish.rewards.powers import collected, substituted
from burnish.rewards.values import (
    Choice,
    Clock,
    Equation,
    Grid,
    Inequality,
    Items,
    Named,
    Numeral,
    Pair,
    Ratio,
    Region,
    Words,
    as_set,
    giants,
    is_expression,
    sympy_module,
    unit_symbol,
    units_of,
)

__all__ = [
    "KINDS",
    "same",
    "same_clock",
    "same_expression",
    "same_grid",
    "same_items",
    "same_named",
    "same_quantity",
    "same_ratio",
    "same_region",
]

_SPARE_DIGITS = 60
_MAX_DIGITS = 20_000
_MAX_ITEMS = 60
_NUMERATORS = (29, 7, 41, 13, 37, 19, 5, 31, 11, 43, 17, 23)
_DENOMINATORS = (23, 26, 19, 31, 21, 27)


def same(gold: Any, answer: Any) -> bool:
    """Return whether two parsed answers are equal; see :func:`burnish.rewards.mathematics.read`.

    Raises:
        Unreadable: too much to compare.
    """
    gold, answer = _single(gold), _single(answer)
    for kind, same_kind in KINDS:
        if isinstance(gold, kind) or isinstance(answer, kind):
            return same_kind(gold, answer)
    if is_expression(gold) and is_expression(answer):
        return same_quantity(gold, answer)
    if type(gold) is not type(answer):
        return False
    match gold:
        case Pair(items):
            return len(items) == len(answer.items) and all(map(same, items, answer.items))
        case Equation(difference):
            return _proportional(difference, answer.difference, positive=False)
        case Inequality(negative, strict):
            return strict == answer.strict and _proportional(negative, answer.negative, positive=True)
        case Choice() | Numeral() | Words():
            return bool(gold == answer)
        case _:
            return False


def _single(value: Any) -> Any:
    """Return the one answer of a list that repeats it."""
    if isinstance(value, Items):
        items = _distinct(value.items)
        return items[0] if len(items) == 1 and not isinstance(items[0], Items) else Items(tuple(items))
    return value


def _distinct(items: Sequence[Any]) -> list[Any]:
    if len(items) > _MAX_ITEMS:
        raise Unreadable("too many answers")
    found: list[Any] = []
    for item in items:
        if not any(same(item, other) for other in found):
            found.append(item)
    return found


def same_named(gold: Any, answer: Any) -> bool:
    """Compare where one side has a name: it may be missing, but two must agree."""
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name == answer.name:
            return same(gold.value, answer.value)
        equations = [_equation(gold), _equation(answer)]
        return None not in equations and same(*equations)
    named, other = (gold, answer) if isinstance(gold, Named) else (answer, gold)
    if isinstance(other, Equation):
        equation = _equation(named)
        return equation is not None and same(equation, other)
    return same(named.value, other) if named is answer else same(other, named.value)


def _equation(named: Named) -> Equation | None:
    if named.symbol is None or not is_expression(named.value):
        return None
    return Equation(named.symbol - named.value)


def same_items(gold: Any, answer: Any) -> bool:
    """Compare unordered answers, and assignments with a point."""
    named = _assigned(gold), _assigned(answer)
    for assigned, other in (named, (gold, answer)), (named[::-1], (answer, gold)):
        # x = 1, y = 2 is the point (1, 2), in the order of the names.
        if assigned[0] is not None and isinstance(other[1], Pair):
            return same(Pair(tuple(assigned[0][name] for name in sorted(assigned[0]))), other[1])
    if not (isinstance(gold, Items) and isinstance(answer, Items)):
        return False
    if len(gold.items) != len(answer.items) or (named[0] is None) != (named[1] is None):
        return False
    left = list(answer.items)
    for item in gold.items:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _assigned(value: Any) -> dict[str, Any] | None:
    """Return the values of a list of variables of different names."""
    if not isinstance(value, Items) or len(value.items) < 2 or not all(isinstance(one, Named) for one in value.items):
        return None
    names = {one.name: one.value for one in value.items}
    return names if len(names) == len(value.items) else None


def same_region(gold: Any, answer: Any) -> bool:
    """Compare sets of reals."""
    names = {value.name for value in (gold, answer) if isinstance(value, Region) and value.name}
    if len(names) > 1:
        return False
    try:
        ours, theirs = as_set(gold), as_set(answer)
    except Unreadable:
        return False
    if ours == theirs:
        return True
    pieces = [s.args if s.func is sympy_module().Union else (s,) for s in (ours, theirs)]
    if len(pieces[0]) != len(pieces[1]) or not all(p.is_Interval for part in pieces for p in part):
        return False
    parts = [sorted(part, key=lambda p: float(p.start)) for part in pieces] if len(pieces[0]) > 1 else pieces
    return all(
        a.args[2:] == b.args[2:] and same_expression(a.start, b.start) and same_expression(a.end, b.end)
        for a, b in zip(*parts, strict=True)
    )


def same_clock(gold: Any, answer: Any) -> bool:
    """Compare times, of which one may lack its half of the day."""
    if isinstance(gold, Clock) and isinstance(answer, Clock):
        halves = {value.half for value in (gold, answer)} - {""}
        return (gold.hours, gold.minutes) == (answer.hours, answer.minutes) and len(halves) < 2
    clock, other = (gold, answer) if isinstance(gold, Clock) else (answer, gold)
    number = sympy_module().Integer
    return not clock.half and same_ratio(Ratio((number(clock.hours), number(clock.minutes))), other)


def same_ratio(gold: Any, answer: Any) -> bool:
    """Compare ratios, and quotients with a ratio of two."""
    terms = [
        value.terms if isinstance(value, Ratio) else (value, sympy_module().Integer(1)) for value in (gold, answer)
    ]
    if len(terms[0]) != len(terms[1]) or not all(is_expression(term) for side in terms for term in side):
        return False
    ours, theirs = terms
    return not ours[-1].is_zero and not theirs[-1].is_zero and all(
        same_expression(a / ours[-1], b / theirs[-1]) for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


def same_grid(gold: Any, answer: Any) -> bool:
    """Compare matrices, and vectors with columns."""
    # A vector is also written as the column of a matrix.
    rows = [
        tuple((item,) for item in value.items)
        if isinstance(value, Pair)
        else value.rows
        if isinstance(value, Grid)
        else ()
        for value in (gold, answer)
    ]
    if [len(row) for row in rows[0]] != [len(row) for row in rows[1]]:
        return False
    return all(same(a, b) for one, two in zip(*rows, strict=True) for a, b in zip(one, two, strict=True))


def same_quantity(gold: Any, answer: Any) -> bool:
    """Compare with units: one that is missing on one side is ignored, others must agree."""
    units = units_of(gold), units_of(answer)
    if bool(units[0]) == bool(units[1]):
        return same_expression(gold, answer)
    value, other = (gold, answer) if units[0] else (answer, gold)
    percent, degree = unit_symbol("percent"), unit_symbol("degree")
    sympy = sympy_module()
    factors = {percent: sympy.Rational(1, 100), degree: sympy.pi / 180}
    converted = value.subs({symbol: factors.get(symbol, 1) for symbol in units_of(value)})
    if same_expression(converted, other):
        return True
    if percent in units_of(value) and not (other.is_number and other.is_real and abs(other) > 1):
        return False  # 0.5 is 50%, never 0.5%
    return same_expression(value.subs(dict.fromkeys(units_of(value), 1)), other)


def same_expression(gold: Any, answer: Any) -> bool:
    """Return whether two SymPy expressions are equal for all real values of their variables.

    Variables under roots and in logarithms on both sides are taken to be positive.

    Raises:
        Unreadable: too many digits, or nothing that can be evaluated.
    """
    if gold == answer:
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        return _same_number(gold, answer)
    sympy = sympy_module()
    if giants(gold) or giants(answer):
        if gold.has(sympy.floor, sympy.ceiling) or answer.has(sympy.floor, sympy.ceiling):
            return False  # equal at all points is then not equal
        if not answer.is_zero and collected(gold / answer) == 1:
            return True
    if any(symbol.name.startswith("unit ") for symbol in gold.free_symbols ^ answer.free_symbols):
        return False
    has_sizes = gold.has(sympy.Abs) or answer.has(sympy.Abs)
    roots = not has_sizes and _needs_positive(gold) and _needs_positive(answer)
    points = list(_points((gold, answer), symbols, positive=roots))
    return bool(points) and all(_same_number(*at) for at in points)


def _needs_positive(value: Any) -> bool:
    sympy = sympy_module()
    positive = value.xreplace({s: sympy.Symbol(s.name, positive=True) for s in value.free_symbols})
    powers = (p for p in positive.atoms(sympy.Pow) if p.exp.is_Rational and not p.exp.is_Integer)
    return any(p.base.free_symbols for p in powers) or any(log.free_symbols for log in positive.atoms(sympy.log))


def _points(values: tuple[Any, Any], symbols: Sequence[Any], *, positive: bool) -> Iterable[tuple[Any, Any]]:
    """Evaluate both expressions at rational points between -2 and 2, as far as they are defined there."""
    sympy = sympy_module()
    found: list[tuple[Any, Any]] = []
    for trial in range(6):
        at = {}
        for i, symbol in enumerate(symbols):
            size = sympy.Rational(_NUMERATORS[(5 * trial + i) % len(_NUMERATORS)], _DENOMINATORS[(trial + i) % 6])
            negative = not positive and not symbol.is_positive and (trial + i) % 3 == 0
            at[symbol] = -size if negative else size
        try:
            point = substituted(values[0], at), substituted(values[1], at)
        except Unreadable:  # not defined there
            continue
        if not any(value.has(sympy.nan, sympy.zoo) for value in point):
            found.append(point)
    real = [point for point in found if all(value.is_real is not False for value in point)]
    return real if positive and real else found


def _same_number(a: Any, b: Any) -> bool:
    sympy = sympy_module()
    if a == b:
        return True
    endless = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)
    if (a.is_Rational and b.is_Rational) or a.has(*endless) or b.has(*endless):
        return False
    if giants(a) or giants(b):
        return same_expression(a, b)
    if a.atoms(sympy.core.function.AppliedUndef) or b.atoms(sympy.core.function.AppliedUndef):
        return bool(sympy.expand(a - b) == 0)
    rationals = a.atoms(sympy.Rational) | b.atoms(sympy.Rational)
    digits = _SPARE_DIGITS + sum(r.p.bit_length() + r.q.bit_length() for r in rationals) * 302 // 1000
    if digits > _MAX_DIGITS:
        raise Unreadable("too many digits")
    ours, theirs = (value.evalf(digits, maxn=3 * digits) for value in (a, b))
    if not (ours.is_comparable or ours.is_complex) or ours.free_symbols or theirs.free_symbols:
        return False
    if a.is_zero or b.is_zero:
        # What cancels to 0 has no digit that counts.
        return all(part == 0 or part._prec == 1 for value in (ours, theirs) for part in value.as_real_imag())
    gap, size = sympy.Abs(ours - theirs), max(sympy.Abs(ours), sympy.Abs(theirs))
    return bool(gap <= size * sympy.Integer(10) ** (20 - digits))


def _proportional(ours: Any, theirs: Any, *, positive: bool) -> bool:
    """Return whether the ratio of two expressions is one constant, which is positive if so asked."""
    if ours.free_symbols != theirs.free_symbols or not ours.free_symbols:
        return False
    sympy = sympy_module()
    points = list(_points((ours, theirs), sorted(ours.free_symbols, key=str), positive=False))
    kept = [(a, b) for a, b in points if not a.is_zero and not b.is_zero]
    if len(kept) < 2 or len(kept) != len(points):
        return False
    a, b = kept[0]
    if positive and not sympy.re((a / b).evalf(15)) > 0:
        return False
    return all(_same_number(a * d, b * c) for c, d in kept[1:])


KINDS: tuple[tuple[type, Callable[[Any, Any], bool]], ...] = (
    (Named, same_named),
    (Region, same_region),
    (Clock, same_clock),
    (Ratio, same_ratio),
    (Items, same_items),
    (Grid, same_grid),
)
"""Kinds of answers that also compare with other kinds, in this order."""
