r"""Parser of mathematical answers: numbers, expressions, tuples, sets, intervals, matrices, relations, units, words.

The structure of an answer is kept: a set is not a tuple, a list of alternatives not one number. Expressions become
SymPy objects that are built node by node, never from text, with :mod:`burnish.rewards.powers` of any size. Whatever the
grammar does not cover raises `Unreadable`; :mod:`burnish.rewards.equality` compares the results.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from burnish.rewards import commands
from burnish.rewards.notation import FUNCTIONS, GREEK, Token, Unreadable, clean, is_prose, plain_words, tokenize
from burnish.rewards.powers import factorial, power
from burnish.rewards.values import (
    Choice,
    Clock,
    Items,
    Named,
    Numeral,
    Pair,
    Ratio,
    Region,
    Words,
    as_set,
    expression,
    is_unit,
    number,
    relate,
    sympy_module,
    unit,
    unit_symbol,
    variables,
)

__all__ = ["Parser", "read"]

_MAX_DEPTH = 60

_CHOICE = re.compile(r"(?:(?:option|choice) )?(?:\(([A-J])\)|([A-J])\)?)(?:[.:)]? +(.+))?", re.IGNORECASE)
_CLOCK = re.compile(r"(\d{1,2}) ?: ?([0-5]\d)(?: ?:00)?(?: ?([ap])\.? ?m\.?)?", re.IGNORECASE)
_BASE = re.compile(r"\(?([0-9A-F]+)\)?(?: ?_ ?\{? ?|,? ?\(?(?:in )?base )(\w+) ?\}?\)?")
_BASES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_EMPTY = {
    "no solution", "no solutions", "no real solution", "no real solutions", "empty set", "none", "no real roots",
    "there are no solutions", "there is no solution", "no such number exists", "has no solution", "has no solutions",
}  # fmt: skip
_REALS = {"all real numbers", "all reals", "all real x", "real numbers", "every real number"}
_WORDS = {"yes": "yes", "no": "no", "odd": "odd", "dne": "does not exist"}


def read(text: str) -> Any:
    """Parse an answer.

    Returns:
        A SymPy expression, or one of the classes of this module.

    Raises:
        Unreadable: not covered by the grammar.
    """
    text = clean(text)
    if not text:
        raise Unreadable("empty")
    bare = re.sub(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) ?\{ ?([^{}]*?) ?\}", r"\1", text).strip()
    if (special := _special(bare)) is not None:
        return special
    if is_prose(bare):
        return _words(plain_words(bare))
    # What stands in \text{...} as a whole may still be mathematics.
    tokens = tokenize(text if re.search(r"\\(?!text)|[{}]", bare) else bare)
    try:
        return _with_signs(tokens)
    except Unreadable:
        if re.fullmatch(r"[\w ,.'-]*[A-Za-z]{4}[\w ,.'-]*", bare):
            return _words(plain_words(bare))
        raise
    except (RecursionError, ValueError, OverflowError, ZeroDivisionError, TypeError, AttributeError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def _special(text: str) -> Any:
    words = plain_words(text)
    if words in _EMPTY or words in _REALS or words in _WORDS:
        return _words(words)
    if (choice := _CHOICE.fullmatch(text)) and (letter := choice[1] or choice[2]).isupper():
        rest = choice[3] or ""
        # Another letter in the rest means that several were chosen, or that all options were copied.
        if re.search(r"\b(?:or|and|not|maybe)\b|[(\s][A-J][).:]|[=+*/^<>]", rest) or (rest and not choice[1]):
            return None if not choice[1] else Words(words)
        return Choice(letter)
    if clock := _CLOCK.fullmatch(text):
        return Clock(int(clock[1]), int(clock[2]), f"{clock[3].lower()}m" if clock[3] else "")
    if (base := _BASE.fullmatch(text)) and (base[2].isdigit() or base[2].lower() in _BASES):
        number = int(base[2]) if base[2].isdigit() and len(base[2]) < 3 else 0
        number = number or (_BASES.index(str(base[2].lower())) if base[2].lower() in _BASES else 0)
        if 2 <= number <= 16 and all(int(digit, 16) < number for digit in base[1]):
            return Numeral(base[1].lstrip("0") or "0", number)
    return None


def _words(words: str) -> Any:
    if words in _EMPTY:
        return Items(())
    if words in _REALS:
        return Region(sympy_module().Reals)
    return Words(_WORDS.get(words, words))


def _with_signs(tokens: list[Token]) -> Any:
    r"""Parse once for each choice of signs of `\pm`; `\mp` is tied to the sign before it."""
    count = sum(token.text in ("pm", "mp") and token.kind == "command" for token in tokens)
    tied = any(token.text == "mp" and token.kind == "command" for token in tokens)
    if count == 0:
        return Parser(tokens, ()).whole()
    if count > 4:
        raise Unreadable("too many signs")
    choices = [(sign,) * count for sign in (1, -1)] if tied else list(itertools.product((1, -1), repeat=count))
    found: list[Any] = []
    for signs in choices:
        value = Parser(tokens, signs).whole()
        found += value.items if isinstance(value, Items) else [value]
    return Items(tuple(found))


_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in", "approx": "~"}
_NAME = re.compile(
    r"\\overline\{[A-Z]{2}\}|\\frac\{d[a-z]\}\{d[a-z]\}|(?:\\angle|\\triangle|m\\angle)?"
    r"(?:[A-Z]{1,4}|[A-Za-z]|\\[A-Za-z]+|\"[A-Za-z ]+\"|\|[A-Z]{2}\|)"
    r"(?:_(?:\{\w+\}|\w))?'*(?:\^\{-1\})?(?:\((?:[A-Za-z](?:,[A-Za-z])*|\"[A-Za-z ]+\")\))?"
)
_PRODUCT = {"*", "/", "cdot", "times"}
_SEPARATORS = {",", ";", "and", "or"}
_FACTOR_COMMANDS = GREEK | FUNCTIONS | commands.COMMANDS


class Parser:
    """Recursive descent over tokens.

    Args:
        tokens: of a cleaned text.
        signs: the sign taken by each plus-minus, in order.
    """

    def __init__(self, tokens: list[Token], signs: Sequence[int]) -> None:
        self.tokens = tokens
        self.at = 0
        self.signs = list(signs)
        self.depth = 0
        self.bars = 0
        self.bound: dict[str, Any] = {}
        self.sympy: Any = sympy_module()

    def peek(self, ahead: int = 0) -> str:
        """Return the spelling of a coming token, "" at the end; text and braces are quoted."""
        if self.at + ahead >= len(self.tokens):
            return ""
        kind, text, _ = self.tokens[self.at + ahead]
        return f'"{text}"' if kind == "text" else f"\\{text}" if kind == "command" and text in "{}|\\" else text

    def kind(self) -> str:
        """Return the kind of the next token, "" at the end."""
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """Consume the next token, which must be one of `wanted` if any are given."""
        found = self.peek()
        if not found or (wanted and found not in wanted):
            raise Unreadable(f"{found!r} instead of {wanted!r}")
        self.at += 1
        return found

    def whole(self) -> Any:
        """Parse all tokens."""
        value = self.statement()
        if self.at < len(self.tokens):
            raise Unreadable(f"{self.peek()!r} is left")
        return value

    def statement(self) -> Any:
        """Parse items separated by commas, "and" or "or"."""
        items, joints = [self.item()], set[str]()
        while self.peek() in _SEPARATORS:
            joint = self.take()
            joint = self.take() if joint in (",", ";") and self.peek() in ("and", "or") else joint
            joints.add(joint)
            items.append(self.item())
        if len(items) == 1:
            return items[0]
        if all(isinstance(item, Region) for item in items) and len({item.name for item in items}) == 1:
            joined = {"or": self.sympy.Union, "and": self.sympy.Intersection}
            if joints in ({"or"}, {"and"}):
                return Region(joined[joints.pop()](*(item.set for item in items)), items[0].name)
        return Items(tuple(part for item in items for part in (item.items if isinstance(item, Items) else (item,))))

    def item(self) -> Any:
        """Parse a value, or a chain of relations."""
        if (name := self.name_before_equals()) is not None:
            symbol = self.symbol(name) if re.fullmatch(r"[A-Za-z]|\\\w+|[A-Za-z]_\w+", name) else None
            return Named(name, self.chain([self.union()], []), symbol)
        start = self.at
        first = self.union()
        if self.at == start + 1 and self.tokens[start].kind == "number" and self.peek() == "=":
            # 5 = 5 calculates nothing; 5 = x names a value.
            self.take()
            return self.chain([first, self.name_only()], ["="])
        return self.chain([first], [])

    def name_only(self) -> Any:
        """Parse a value that holds letters."""
        value = expression(self.union())
        if not variables(value):
            raise Unreadable("a number equated to a number")
        return value

    def chain(self, values: list[Any], relations: list[str]) -> Any:
        """Parse the relations after a value."""
        while self.peek() in (*_RELATIONS, ":") and self.kind() in ("op", "command"):
            relations.append(self.take())
            values.append(self.union())
        if not relations:
            return values[0]
        if set(relations) == {":"}:
            return Ratio(tuple(expression(value) for value in values))
        return relate(values, [_RELATIONS.get(relation, "?") for relation in relations])

    def name_before_equals(self) -> str | None:
        """Consume `x =`, `f(x) =` or `AB =` and return the name."""
        for ahead in range(1, 12):
            if self.peek(ahead) == "=":
                shown = [t.text if t.kind in ("name", "op", "number") else self.peek(i)
                         if t.kind == "text" else f"\\{t.text}"
                         for i, t in enumerate(self.tokens[self.at : self.at + ahead])]  # fmt: skip
                if not _NAME.fullmatch("".join(shown)) or shown[0] == "\\pi":
                    return None
                self.at += ahead + 1
                return "".join(shown).replace("{", "").replace("}", "")
        return None

    def union(self) -> Any:
        r"""Parse sums joined by `\cup`, `\cap` and `\setminus`."""
        left = self.sum()
        while self.peek() in ("cup", "cap", "setminus"):
            make = {"cup": "Union", "cap": "Intersection", "setminus": "Complement"}[self.take()]
            left = Region(getattr(self.sympy, make)(as_set(left), as_set(self.sum())))
        return left

    def sum(self) -> Any:
        """Parse terms joined by + and -."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable("nested too deeply")
        total, first = None, True
        while first or self.peek() in ("+", "-", "pm", "mp"):
            sign = 1
            while self.peek() in ("+", "-", "pm", "mp"):
                sign *= self.sign(self.take())
            term = self.term()
            if first and sign == 1:
                total = term
            elif first and isinstance(term, Pair):
                total = Pair(tuple(sign * expression(item) for item in term.items))
            else:
                total = (0 if total is None else expression(total)) + sign * expression(term)
            first = False
        self.depth -= 1
        return total

    def sign(self, op: str) -> int:
        """Return the value of a sign."""
        if op in ("pm", "mp"):
            chosen = self.signs.pop(0)
            return chosen if op == "pm" else -chosen
        return -1 if op == "-" else 1

    def term(self) -> Any:
        """Parse factors joined by signs of multiplication, by / or by nothing."""
        value = self.factor()
        while True:
            op = self.peek()
            if op in _PRODUCT:
                self.take()
                negative = self.peek() == "-" and bool(self.take())
                other = expression(self.factor())
                other = -other if negative else other
                if op == "/" and other.is_zero:
                    raise Unreadable("division by 0")
                value = expression(value) / other if op == "/" else expression(value) * other
            elif self.starts_factor():
                prefix = is_unit(value)
                other = expression(self.factor())
                if self.tokens[self.at - 1].kind == "number" and not prefix and other.is_Rational:
                    raise Unreadable("two numbers in a row")
                value = expression(value) * other
            else:
                return value

    def starts_factor(self) -> bool:
        """Return whether the next token can begin a factor without a sign."""
        kind, text = self.kind(), self.peek()
        if kind == "command":
            return text in _FACTOR_COMMANDS and text != "infty"
        return kind in ("number", "name", "text") or text in ("(", "%", "{", "[") or (text == "|" and not self.bars)

    def factor(self) -> Any:
        """Parse a primary with its factorials, exponents and degree signs."""
        base = self.unit() if self.kind() == "text" else self.primary()
        while self.peek() in ("!", "^", "'"):
            op = self.take()
            if op == "!":
                double = self.peek() == "!" and bool(self.take())
                base = factorial(expression(base), double)
            elif op == "'":
                if not expression(base).is_Symbol:
                    raise Unreadable("a prime")
                base = self.symbol(base.name + "'")
            elif "circ" in (self.peek(), self.peek(1)) and self.peek() in ("{", "circ"):
                self.at += 3 if self.peek() == "{" else 1
                base = expression(base) * unit_symbol("degree")
            else:
                base = power(expression(base), expression(self.exponent()))
        return base

    def unit(self) -> Any:
        """Parse a unit, which follows a value unless it is a currency."""
        before = self.tokens[self.at - 1] if self.at else Token("op", "", False)
        text = self.take()[1:-1]
        if text not in ("dollar", "euro", "pound") and before.kind == "op" and before.text not in tuple(")]}%|!"):
            raise Unreadable(f"{text!r} is not a value")
        return unit(text)

    def exponent(self) -> Any:
        """Parse what follows ^."""
        if self.peek() in ("-", "+"):
            return self.sign(self.take()) * expression(self.exponent())
        value = self.braced() if self.peek() == "{" else self.primary()
        if self.peek() == "^":
            self.take()
            return power(value, self.exponent())
        return factorial(value, False) if self.peek() == "!" and self.take() else value

    def braced(self) -> Any:
        """Parse { ... }, or one token as LaTeX takes it, of which a number gives its first digit."""
        if self.peek() == "{":
            self.take()
            value = self.statement()
            self.take("}")
            return value
        if self.kind() == "number" and len(self.peek()) > 1 and self.peek().isdigit():
            digits = self.peek()
            self.tokens = self.tokens.copy()
            self.tokens[self.at] = Token("number", digits[1:], False)
            return self.sympy.Integer(int(digits[0]))
        return self.primary()

    def primary(self) -> Any:
        """Parse a number, a name, brackets or a command."""
        kind, text = self.kind(), self.peek()
        if kind == "number":
            return self.number()
        if kind == "name":
            return commands.letter(self, self.take())
        if text in commands.BRACKETS:
            return commands.bracket(self, self.take())
        if kind == "command":
            return commands.command(self, self.take())
        if text == "|":
            self.take()
            self.bars += 1
            value = expression(self.sum())
            self.take("|")
            self.bars -= 1
            return self.sympy.Abs(value)
        if text == "%":
            self.take()
            return unit_symbol("percent")
        raise Unreadable(f"{text!r} is not a value")

    def symbol(self, name: str) -> Any:
        """Return the real variable of that name."""
        return self.sympy.Symbol(name, real=True)

    def number(self) -> Any:
        r"""Parse a number: mixed (1 1/2, 1\frac{1}{2}) or with repeating decimals, too."""
        text = self.take()
        value = number(text)
        if self.peek() == "frac" and text.isdigit():
            start = self.at
            self.take()
            top = self.braced()
            bottom = self.braced()
            if top.is_Integer and bottom.is_Integer and 0 < top < bottom and self.peek() != "^":
                return value + top / bottom
            self.at = start
        elif self.kind() == "number" and self.peek(1) == "/" and text.isdigit() and self.peek().isdigit():
            top = number(self.take())
            self.take("/")
            if self.kind() != "number" or not self.peek().isdigit() or (bottom := number(self.take())) <= top:
                raise Unreadable("two numbers in a row")
            return value + top / bottom
        elif self.peek() in ("overline", "bar") and "." in text:
            self.take()
            self.take("{")
            digits = self.take()
            self.take("}")
            places = len(text.partition(".")[2])
            return value + number(digits) / (10**places * (10 ** len(digits) - 1))
        return value
