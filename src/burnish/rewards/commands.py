r"""LaTeX commands, functions, brackets and letters, as parts of the parser of :mod:`burnish.rewards.mathematics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from burnish.rewards.notation import FUNCTIONS, GREEK, Unreadable
from burnish.rewards.powers import binomial, power, substituted
from burnish.rewards.values import (
    Grid,
    Items,
    Pair,
    Region,
    expression,
    interval,
    sympy_module,
    unit_symbol,
)

if TYPE_CHECKING:
    from burnish.rewards.mathematics import Parser

__all__ = ["BRACKETS", "COMMANDS", "bracket", "command", "function", "letter", "matrix", "root", "series"]

BRACKETS = {
    "(": ")]",
    "[": "])[",
    "]": "[]",
    "{": "}",
    "\\{": "\\}",
    "langle": "rangle",
    "lfloor": "rfloor",
    "lceil": "rceil",
}
"""Opening bracket -> the brackets that may close it; ]a, b[ is an open interval."""

COMMANDS = frozenset(
    [
        "pi",
        "frac",
        "sqrt",
        "binom",
        "infty",
        "lfloor",
        "lceil",
        "langle",
        "sum",
        "prod",
        "begin",
        "floor",
        "ceil",
        "abs",
        "vec",
        "overline",
        "hat",
        "bar",
        "mathbf",
        "mathbb",
        "emptyset",
    ]
)
"""Commands that begin a value, besides functions and Greek letters."""

_APPLIED = "fghFGHPQ"
_MAX_TERMS = 1_000
_MAX_SERIES_EXPONENT = 1_000
"""Largest integer in an exponent of a series without end, whose closed form SymPy finds."""
_INVERSE = {
    "sin": "asin",
    "cos": "acos",
    "tan": "atan",
    "cot": "acot",
    "sinh": "asinh",
    "cosh": "acosh",
    "tanh": "atanh",
}
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "ln": "log"}


def letter(parser: Parser, name: str) -> Any:
    """Build a variable with its subscript, e, i, or a function of brackets, f(x)."""
    sympy = sympy_module()
    if parser.peek() == "_":
        parser.take()
        parts = [parser.take()]
        while parts[0] == "{" and parts[-1] != "}":
            parts.append(parser.take())
        return parser.symbol(f"{name}_{''.join(parts).strip('{}')}")
    if name in parser.bound:
        return parser.bound[name]
    if name in _APPLIED and parser.peek() == "(":
        argument = bracket(parser, parser.take())
        arguments = argument.items if isinstance(argument, Pair) else (argument,)
        return sympy.Function(name)(*(expression(item) for item in arguments))
    return {"e": sympy.E, "i": sympy.I}.get(name) or parser.symbol(name)


def bracket(parser: Parser, opening: str) -> Any:
    """Parse from an opening bracket to its end: a group, tuple, interval, set, vector, floor or ceiling."""
    if opening == "\\{" and parser.peek() == "\\}":
        parser.take()
        return Items(())
    if opening == "\\{" and (built := _set_builder(parser)) is not None:
        return built
    bars, parser.bars = parser.bars, 0
    items = [parser.item()]
    while parser.peek() in (",", ";"):
        parser.take()
        items.append(parser.item())
    closing = parser.take()
    parser.bars = bars
    if closing not in BRACKETS[opening] and closing != BRACKETS[opening]:
        raise Unreadable(f"{opening} closed by {closing}")
    sympy = sympy_module()
    if opening == "\\{" or (opening == "{" and len(items) > 1):
        return Items(tuple(part for item in items for part in (item.items if isinstance(item, Items) else (item,))))
    if opening in ("lfloor", "lceil"):
        return (sympy.floor if opening == "lfloor" else sympy.ceiling)(expression(*items))
    if opening == "]" or "[" in (opening, closing) or closing == "]":
        if len(items) == 1 and opening + closing == "[]":
            return items[0]
        low, high = items
        low_open, high_open = opening != "[", closing != "]"
        return Region(interval(low, high, low_open, high_open))
    if len(items) == 1 and opening != "langle":
        return items[0]
    return Pair(tuple(items))


def _set_builder(parser: Parser) -> Any:
    r"""Parse `x \mid x > 2 \}` and `x \in \mathbb{R} : x > 2 \}`; None for a list of elements."""
    real = [parser.peek(i) for i in range(1, 6)] == ["in", "mathbb", "{", "R", "}"]
    if parser.kind() != "name" or parser.peek(6 if real else 1) not in ("|", "mid", ":"):
        return None
    name = parser.take()
    parser.at += 6 if real else 1
    region = parser.statement()
    parser.take("\\}")
    if not isinstance(region, Region) or region.name != name:
        raise Unreadable("a set of something else than reals")
    return Region(region.set)


def command(parser: Parser, name: str) -> Any:
    """Parse what a command takes and build its value."""
    sympy = sympy_module()
    if name in FUNCTIONS:
        return function(parser, name)
    if name in GREEK:
        return letter(parser, f"\\{name}")
    if name in ("frac", "binom"):
        first, second = expression(parser.braced()), expression(parser.braced())
        if name == "binom":
            return binomial(first, second)
        if second.is_zero:
            raise Unreadable("division by 0")
        return first / second
    if name == "sqrt":
        return root(parser)
    if name in ("sum", "prod"):
        return series(parser, name)
    if name in ("floor", "ceil", "abs"):
        return {"floor": sympy.floor, "ceil": sympy.ceiling, "abs": sympy.Abs}[name](expression(parser.primary()))
    if name in ("vec", "overline", "hat", "bar", "mathbf"):
        return (
            parser.symbol(f"{name} {expression(parser.braced()).sort_key()}") if name != "mathbf" else parser.braced()
        )
    if name == "mathbb":
        if [parser.take() for _ in range(3 if parser.peek() == "{" else 1)] in (["{", "R", "}"], ["R"]):
            return Region(sympy.Reals)
        raise Unreadable("another set than the reals")
    if name == "begin":
        return matrix(parser)
    simple = {"pi": sympy.pi, "infty": sympy.oo, "emptyset": Items(())}
    if name not in simple:
        raise Unreadable(f"\\{name}")
    return simple[name]


def root(parser: Parser) -> Any:
    r"""Parse what follows `\sqrt`."""
    sympy = sympy_module()
    degree = sympy.Integer(2)
    if parser.peek() == "[":
        parser.take()
        degree = expression(parser.sum())
        parser.take("]")
    radicand = expression(parser.braced())
    if not degree.is_Integer or not 0 < degree < 1_000:
        raise Unreadable("a root")
    return power(radicand, 1 / degree)


def function(parser: Parser, name: str) -> Any:
    """Parse exponent, base and argument of a function and apply it."""
    sympy = sympy_module()
    exponent, base = None, None
    while parser.peek() in ("^", "_"):
        if parser.take() == "^":
            exponent = expression(parser.exponent())
        else:
            base = expression(parser.braced())
    argument = expression(_argument(parser))
    named, name = name, _ALIASES.get(name, name)
    argument = argument.subs(unit_symbol("degree"), sympy.pi / 180)
    if exponent == -1:
        name, exponent = _INVERSE.get(name, ""), None
        if not name:
            raise Unreadable("an inverse function")
    if argument.is_zero and name == "log":
        raise Unreadable("the logarithm of 0")
    if base is not None and name != "log":
        raise Unreadable("a subscript")
    if name == "exp":
        value = power(sympy.E, argument)
    elif base is None and named in ("log", "lg"):
        value = sympy.log(argument) / sympy.log(10)
    else:
        value = getattr(sympy, name)(argument) / (1 if base is None else sympy.log(base))
    return value if exponent is None else power(value, exponent)


def _argument(parser: Parser) -> Any:
    r"""Parse the argument of a function: what stands in brackets, or the product that follows, as in `\sin 2x`."""
    if parser.peek() in ("(", "[", "{"):
        return parser.braced() if parser.peek() == "{" else bracket(parser, parser.take())
    sign = -1 if parser.peek() == "-" and parser.take() else 1
    value = sign * expression(parser.factor())
    while (
        parser.starts_factor() and parser.peek() not in FUNCTIONS and parser.peek() != "(" and parser.kind() != "text"
    ):
        value = value * expression(parser.factor())
    if parser.peek() == "/" and parser.peek(1).isdigit():
        parser.take()
        value = value / expression(parser.factor())
    return value


def series(parser: Parser, name: str) -> Any:
    """Parse a sum or a product with bounds, and evaluate it."""
    sympy = sympy_module()
    parser.take("_")
    parser.take("{")
    index = parser.take()
    parser.take("=")
    low = expression(parser.sum())
    parser.take("}")
    parser.take("^")
    high = expression(parser.exponent())
    bound = sympy.Dummy(index, integer=True)
    if low.is_number and high.is_number and (not high.is_infinite and high - low > _MAX_TERMS):
        raise Unreadable("a long sum")
    parser.bound[index] = bound
    body = expression(parser.term())
    del parser.bound[index]
    if low.is_Integer and high.is_Integer and low <= high:
        terms = [substituted(body, {bound: sympy.Integer(k)}) for k in range(int(low), int(high) + 1)]
        return (sympy.Add if name == "sum" else sympy.Mul)(*terms)
    if any(abs(n) > _MAX_SERIES_EXPONENT for p in body.atoms(sympy.Pow) for n in p.exp.atoms(sympy.Integer)):
        raise Unreadable("a series of large powers")
    series = (sympy.Sum if name == "sum" else sympy.Product)(body, (bound, low, high)).doit()
    if series.has(sympy.Sum, sympy.Product, sympy.Piecewise):
        raise Unreadable("a series without a closed form")
    return series


def matrix(parser: Parser) -> Any:
    """Parse an environment of rows; a vmatrix is a determinant."""
    shape = _environment(parser)
    rows: list[tuple[Any, ...]] = []
    row: list[Any] = []
    while True:
        if parser.peek() not in ("&", "\\\\", "end"):
            row.append(expression(parser.sum()))
        separator = parser.take("&", "\\\\", "end")
        if separator != "&" and row:
            rows.append(tuple(row))
            row = []
        if separator == "end":
            break
    if _environment(parser) != shape or shape not in ("pmatrix", "bmatrix", "vmatrix", "matrix", "Bmatrix"):
        raise Unreadable(shape)
    if not rows or len({len(one) for one in rows}) != 1 or len(rows) * len(rows[0]) > 100:
        raise Unreadable("not a matrix")
    if shape == "vmatrix":
        return sympy_module().Matrix([list(one) for one in rows]).det()
    return Grid(tuple(rows))


def _environment(parser: Parser) -> str:
    parser.take("{")
    letters: list[str] = []
    while parser.peek() != "}":
        letters.append(parser.take().strip('"'))
    parser.take("}")
    return "".join(letters)
