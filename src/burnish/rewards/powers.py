r"""Powers, factorials and binomial coefficients of any size: exact, or products of giants.

A giant is a positive symbol that stands for a number too large to write out, such as 3^(1000^2). What holds of symbols
whatever their values holds of these numbers too, so answers that are equal as expressions of giants are equal. Equal
numbers meet in the same giants: bases are split into primes and exponents into digits of 1000, so that 2^(10^12),
4^(5 10^11) and 2 * 2^(10^12 - 1) are one expression. Where that is not enough, equal numbers count as different.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

from burnish.rewards.notation import Unreadable
from burnish.rewards.values import GIANT, giants, sympy_module, variables

__all__ = ["binomial", "collected", "factorial", "power", "substituted"]

_MAX_BITS = 200_000
_MAX_FACTORIAL = 5_000
_MAX_EXPONENT = 10_000
_STEP = 1_000
"""Base of the digits of exponents, and distance of the factorials that others are expressed by."""
_MAX_STEPPED_BITS = 600
"""Exponents and factorials of larger numbers are not expressed by others."""
_SMALL_PRIMES_BELOW = 1_000
_POWER = re.compile(GIANT + r"([0-9a-f]+|E|pi)\^(-?[0-9a-f]+)")


def power(base: Any, exponent: Any) -> Any:
    """Raise to a power; odd roots of negative numbers are real.

    Raises:
        Unreadable: a power of 0 that is not defined, or an exponent without a size.
    """
    sympy = sympy_module()
    if base.is_zero and exponent.is_negative:
        raise Unreadable("division by 0")
    if base.is_zero and exponent.is_positive:
        return sympy.Integer(0)
    is_root = exponent.is_Rational and exponent.q % 2 == 1 and exponent.q > 1
    if any(variables(value) or value.atoms(sympy.core.function.AppliedUndef) for value in (base, exponent)):
        if exponent.is_Rational and abs(exponent) > _MAX_EXPONENT:
            return _power_of_letters(base, exponent)
        # A letter may be negative.
        if is_root and not base.is_nonnegative:
            return sympy.sign(base) ** exponent.p * sympy.Abs(base) ** exponent
        return base**exponent
    if not _is_writable(base, exponent):
        return _product_of_giants(base, exponent)
    if is_root and base.is_Rational and base < 0:
        return (-1) ** exponent.p * (-base) ** exponent
    return base**exponent


def _power_of_letters(base: Any, exponent: Any) -> Any:
    """Raise an expression with letters to a large power: SymPy would write out that of a number in it."""
    letters = variables(base)
    number, rest = base.as_independent(*letters, as_Add=False)
    if not letters or not (exponent.is_Integer or number == 1):
        raise Unreadable("a large exponent")
    return power(number, exponent) * rest**exponent


def _is_writable(base: Any, exponent: Any) -> bool:
    """Return whether a power of numbers has few digits."""
    if giants(base) or giants(exponent):
        return False
    if base.is_Rational and exponent.is_Rational:
        bits = max(abs(base.p), base.q).bit_length() * max(abs(exponent.p) // exponent.q, 1)
        return bits <= _MAX_BITS and exponent.q <= _MAX_EXPONENT
    size = abs(exponent) if exponent.is_Rational else sympy_module().Abs(exponent).evalf(5)
    if not size.is_comparable or size.is_infinite:
        raise Unreadable("an exponent without a size")
    return bool(size <= _MAX_EXPONENT)


def collected(value: Any) -> Any:
    """Return a product with the powers of each base joined, as far as they are giants."""
    return _product_of_giants(value, sympy_module().Integer(1))


def _product_of_giants(base: Any, exponent: Any) -> Any:
    """Return a power of a number as a product of powers of primes, of other bases, and of giants."""
    sympy = sympy_module()
    if base.is_negative and exponent.is_Rational and exponent.q % 2 == 1:
        return (-1) ** exponent.p * _product_of_giants(-base, exponent)
    if not base.is_positive or not exponent.is_real:
        return _giant("power", base, exponent, positive=None)
    totals: dict[Any, Any] = {}
    for atom, count in _atoms(base):
        totals[atom] = totals.get(atom, 0) + count
    return sympy.Mul(*(_raised(atom, count * exponent) for atom, count in totals.items()))


def _atoms(base: Any) -> list[tuple[Any, Any]]:
    """Split a positive number into bases, small primes where possible, with their rational exponents."""
    sympy = sympy_module()
    if base.is_Rational:
        return [*_primes(int(base.p), 1), *_primes(int(base.q), -1)]
    if base.is_Mul and all(factor.is_positive for factor in base.args):
        return [atom for factor in base.args for atom in _atoms(factor)]
    inner, exponent = base.as_base_exp()
    if exponent != 1 and exponent.is_Rational and inner.is_positive:
        return [(atom, count * exponent) for atom, count in _atoms(inner)]
    if base.is_Symbol and (known := _POWER.fullmatch(base.name)):
        atom = getattr(sympy, known[1]) if known[1] in ("E", "pi") else sympy.Integer(int(known[1], 16))
        return [(atom, sympy.Integer(int(known[2], 16)))]
    return [(base, sympy.Integer(1))]


def _primes(number: int, sign: int) -> list[tuple[Any, Any]]:
    """Split a positive integer into small primes and a rest, which is no power if it is not large."""
    sympy = sympy_module()
    found: list[tuple[Any, Any]] = []
    for prime in sympy.primerange(_SMALL_PRIMES_BELOW):
        if number % prime == 0:
            count = sympy.multiplicity(prime, number)
            number //= prime**count
            found.append((sympy.Integer(prime), sympy.Integer(sign * count)))
    if number > 1:
        root, count = (number.bit_length() <= 64 and sympy.perfect_power(number)) or (number, 1)
        found.append((sympy.Integer(root), sympy.Integer(sign * count)))
    return found


def _raised(atom: Any, exponent: Any) -> Any:
    """Return a power of one base, whose exponent is rational or an expression of numbers and giants."""
    sympy = sympy_module()
    product = sympy.Integer(1)
    for term in sympy.Add.make_args(exponent):
        count, rest = term.as_coeff_Mul()
        if rest == 1:
            product *= _stepped(atom, sympy.Rational(count))
        elif count.is_Integer and abs(count) <= _STEP // 2:
            product *= _giant("power", atom, rest) ** count
        else:
            product *= _giant("power", atom, term)
    return product


def _stepped(atom: Any, exponent: Any) -> Any:
    """Return a power with a rational exponent, by the digits of its integer part between -500 and 499."""
    sympy = sympy_module()
    whole = int(sympy.floor(exponent + sympy.Rational(1, 2)))
    rest = exponent - whole
    is_large = atom.is_Integer and int(atom).bit_length() * _STEP > _MAX_BITS
    if is_large or whole.bit_length() > _MAX_STEPPED_BITS or rest.q > _MAX_EXPONENT:
        return _giant("power", atom, exponent)
    digit = (whole + _STEP // 2) % _STEP - _STEP // 2
    product, place = atom ** (digit + rest), 1
    while whole := (whole - digit) // _STEP:
        place *= _STEP
        digit = (whole + _STEP // 2) % _STEP - _STEP // 2
        product *= _giant("power", atom, sympy.Integer(place)) ** digit
    return product


def factorial(value: Any, double: bool) -> Any:
    """Apply ! or !!.

    Raises:
        Unreadable: of a number that has none, or a large one that is not an integer.
    """
    sympy = sympy_module()
    kind = "factorial2" if double else "factorial"
    if giants(value) and not variables(value):
        return _giant(kind, value)
    if not value.is_number or (value.is_Integer and 0 <= value <= _MAX_FACTORIAL):
        return getattr(sympy, kind)(value)
    if value.is_Integer and value > 0:
        number = int(value)
        near = (number + _STEP // 2) // _STEP * _STEP
        if double or number.bit_length() > _MAX_STEPPED_BITS:
            return _giant(kind, value)
        base = sympy.factorial(near) if near <= _MAX_FACTORIAL else _giant(kind, sympy.Integer(near))
        between = sympy.Integer(math.prod(range(min(number, near) + 1, max(number, near) + 1)))
        return base * between if near <= number else base / between
    if value.is_Integer or not value.is_comparable or abs(value) > _MAX_FACTORIAL:
        raise Unreadable("a factorial")
    return getattr(sympy, kind)(value)


def binomial(n: Any, k: Any) -> Any:
    """Return the number of ways to choose k of n.

    Raises:
        Unreadable: of large numbers that are not integers of at least 0.
    """
    sympy = sympy_module()
    if not (n.is_Integer and k.is_Integer and n >= 0 and k >= 0):
        numbers = [value for value in (n, k) if value.is_number]
        if giants(n) or giants(k) or not all(v.is_comparable and abs(v) <= _MAX_FACTORIAL for v in numbers):
            raise Unreadable("a binomial coefficient")
        return sympy.binomial(n, k)
    least = min(int(k), int(n - k))
    if least < 0:
        return sympy.Integer(0)
    if int(n).bit_length() * least <= _MAX_BITS // 10:
        return sympy.Integer(math.comb(int(n), least))
    return factorial(n, False) / (factorial(k, False) * factorial(n - k, False))


def substituted(value: Any, at: dict[Any, Any]) -> Any:
    """Replace symbols by numbers, with powers and factorials that stay bounded.

    Raises:
        Unreadable: a power or a factorial that is not defined there.
    """
    sympy = sympy_module()
    if value in at:
        return at[value]
    if at.keys().isdisjoint(value.free_symbols):
        return value
    arguments = [substituted(argument, at) for argument in value.args]
    bounded: dict[Any, Callable[..., Any]] = {
        sympy.Pow: power,
        sympy.binomial: binomial,
        sympy.factorial: lambda n: factorial(n, False),
        sympy.factorial2: lambda n: factorial(n, True),
    }
    build = bounded.get(value.func) or value.func
    return build(*arguments)


def _giant(kind: str, *values: Any, positive: bool | None = True) -> Any:
    """Return the symbol of an operation on numbers; `_POWER` reads that of a power back."""
    texts = [_short(value) for value in values]
    if kind == "power" and all(texts):
        name = "^".join(texts)
    else:
        # Not as text, in which Python writes no integers of thousands of digits.
        name = f"#{hashlib.sha256(' '.join([kind, *map(_key, values)]).encode()).hexdigest()}"
    return sympy_module().Symbol(GIANT + name, positive=positive)


def _short(value: Any) -> str:
    """Return the name of a constant or an integer that is not too large, else ""."""
    if value.is_Integer and int(value).bit_length() <= 2 * _MAX_STEPPED_BITS:
        return f"{int(value):x}"
    return str(value) if value in (sympy_module().E, sympy_module().pi) else ""


def _key(value: Any) -> str:
    if value.is_Rational:
        return f"{int(value.p):x}/{int(value.q):x}"
    return f"{type(value).__name__}({','.join(map(_key, value.args))})" if value.args else str(value)
