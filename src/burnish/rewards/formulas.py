"""Parsers of lists and formulas written by a model, which never evaluate them as code.

Graders use them in place of `eval` and of SymPy's `parse_expr`, which evaluates its text.
"""

from __future__ import annotations

import ast
import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["read_formula", "read_integer", "read_literal", "stop_sympy_evaluating"]

_MAX_LITERAL_CHARACTERS = 20_000
_MAX_FORMULA_CHARACTERS = 5_000
_MAX_BITS = 20_000
_MAX_FACTORIAL = 1_000

_FUNCTIONS = frozenset({
    "Abs", "Integral", "Rational", "acos", "acosh", "acot", "acoth", "acsc", "asec", "asin", "asinh", "atan", "atanh",
    "cbrt", "cos", "cosh", "cot", "coth", "csc", "csch", "exp", "factorial", "ln", "log", "sec", "sech",
    "sin", "sinh", "sqrt", "tan", "tanh",
})  # fmt: skip
_CONSTANTS = frozenset({"E", "I", "pi"})
_SIGNS: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Mult: operator.mul,
    ast.Sub: operator.sub,
}
_BITWISE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.RShift: operator.rshift,
}


def read_literal(text: str) -> Any:
    """Parse Python literals: lists, tuples, sets, dicts, strings and numbers, such as `[[0, 1], [1, 0]]`.

    Raises:
        ValueError: anything else, or more than 20,000 characters.
        SyntaxError: not Python.
    """
    _check_length(text, _MAX_LITERAL_CHARACTERS)
    return ast.literal_eval(text.strip())


def read_integer(text: str) -> int:
    """Evaluate an integer expression, in decimal or hexadecimal, with + - * // % & | ^ ~ << >>.

    Raises:
        ValueError: anything else, or numbers of more than 20,000 bits.
        SyntaxError: not Python.
    """
    _check_length(text, _MAX_FORMULA_CHARACTERS)
    return _integer(ast.parse(text.strip(), mode="eval").body)


def _integer(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp):
        value = _integer(node.operand)
        return ~value if isinstance(node.op, ast.Invert) else _lookup(_SIGNS, node.op)(value)
    if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Div):
        left, right = _integer(node.left), _integer(node.right)
        if isinstance(node.op, ast.LShift):
            return _bounded(left << _bounded(right, limit=_MAX_BITS.bit_length()))
        return _bounded(_lookup(_ARITHMETIC | _BITWISE, node.op)(left, right))
    raise ValueError(f"not an integer expression: {type(node).__name__}")


def read_formula(text: str, local_dict: Mapping[str, Any] | None = None) -> Any:
    """Parse a formula of numbers, symbols, + - * / // % **, common functions, pi, E and I as a SymPy expression.

    It performs the operations of SymPy's `parse_expr`, so the expression is the same.

    Args:
        text: at most 5,000 characters.
        local_dict: values of names; other names become symbols, unless SymPy uses them for something else.

    Raises:
        ValueError: anything else (attributes, strings, other calls), or numbers of more than 20,000 bits.
        SyntaxError: not Python.
    """
    _check_length(text, _MAX_FORMULA_CHARACTERS)
    text = text.strip()
    lines = text.encode().split(b"\n")
    names = local_dict or {}
    return _Formula(lines, names).build(ast.parse(text, mode="eval").body)


def stop_sympy_evaluating() -> None:
    """Replace SymPy's `parse_expr` by :func:`read_formula`, also for modules that are imported later.

    `sympify`, and with it `Number("...")` and operators between expressions and strings, would evaluate them.
    """

    def parse_expr(s: str, local_dict: Mapping[str, Any] | None = None, *_: Any, **__: Any) -> Any:
        try:
            return read_formula(s, local_dict)
        except ValueError as error:
            raise SyntaxError(str(error)) from error  # what `sympify` expects

    for name in ("sympy", "sympy.parsing", "sympy.parsing.sympy_parser"):
        module: Any = importlib.import_module(name)
        module.parse_expr = parse_expr


class _Formula:
    def __init__(self, lines: list[bytes], names: Mapping[str, Any]) -> None:
        self.lines = lines
        self.names = names
        # Imported by name, since the package ships no types and only workers need it.
        self.sympy: Any = importlib.import_module("sympy")

    def build(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return self.sympy.Integer(_bounded(node.value))
        if isinstance(node, ast.Constant) and type(node.value) is float:
            # From its decimal digits, since a binary float would round it.
            return self.sympy.Float(self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode())
        if isinstance(node, ast.Name):
            return self.symbol(node.id)
        if isinstance(node, ast.UnaryOp):
            return _lookup(_SIGNS, node.op)(self.build(node.operand))
        if isinstance(node, ast.BinOp):
            left, right = self.build(node.left), self.build(node.right)
            if isinstance(node.op, ast.Pow):
                return self.bounded(self.power(left, right))
            return self.bounded(_lookup(_ARITHMETIC, node.op)(left, right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self.call(node.func.id, [self.build(argument) for argument in node.args])
        raise ValueError(f"not part of a formula: {type(node).__name__}")

    def symbol(self, name: str) -> Any:
        if name in self.names:
            return self.names[name]
        if name in _CONSTANTS:
            return getattr(self.sympy, name)
        if hasattr(self.sympy, name):
            raise ValueError(f"{name!r} is not a symbol")
        return self.sympy.Symbol(name)

    def bounded(self, value: Any) -> Any:
        if value.is_Rational:
            _bounded(value.p)
            _bounded(value.q)
        return value

    def power(self, base: Any, exponent: Any) -> Any:
        if base.is_Rational and exponent.is_number:
            size = max(abs(base.p), base.q).bit_length() * abs(exponent)
            if not size.is_comparable or size > _MAX_BITS:
                raise ValueError("a power of too many digits")
        return base**exponent

    def call(self, name: str, arguments: list[Any]) -> Any:
        name = "Abs" if name == "abs" else name
        if name not in _FUNCTIONS or name in self.names:
            raise ValueError(f"{name!r} is not a function of formulas")
        if name == "factorial" and any(a.is_number and not abs(a) <= _MAX_FACTORIAL for a in arguments):
            raise ValueError("a factorial of too many digits")
        return getattr(self.sympy, name)(*arguments)


def _lookup(table: Mapping[Any, Callable[..., Any]], symbol: ast.AST) -> Callable[..., Any]:
    if type(symbol) not in table:
        raise ValueError(f"not an operator of formulas: {type(symbol).__name__}")
    return table[type(symbol)]


def _bounded(value: int, limit: int = _MAX_BITS) -> int:
    if int(value).bit_length() > limit:
        raise ValueError("a number of too many digits")
    return value


def _check_length(text: str, limit: int) -> None:
    if len(text) > limit:
        raise ValueError(f"{len(text)} characters are more than {limit}")
