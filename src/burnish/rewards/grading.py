"""Verdict on a mathematical answer: our own grammar first, math-verify for gold answers that it does not cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from burnish.rewards.answers import UNREADABLE_GOLD
from burnish.rewards.equality import same, same_expression
from burnish.rewards.mathematics import read
from burnish.rewards.notation import Unreadable, clean, tokenize
from burnish.rewards.values import giants, is_expression

__all__ = ["is_correct"]

_STATEMENT = frozenset(
    [
        "forall",
        "exists",
        "nexists",
        "in",
        "notin",
        "implies",
        "iff",
        "Rightarrow",
        "Leftrightarrow",
        "equiv",
        "pmod",
        "bmod",
        "mod",
        "mid",
        "nmid",
        "subset",
        "subseteq",
        "neg",
        "le",
        "ge",
        "ne",
        "approx",
        "<",
        ">",
        "=",
        ",",
        ";",
        "and",
        "or",
        "begin",
        "mathbb",
        "ldots",
        "cdots",
        "dots",
        "pm",
        "mp",
    ]
)
"""Tokens of what is more than one expression, which math-verify reads in part."""

_STRUCTURE = frozenset(
    [
        "int",
        "iint",
        "oint",
        "sum",
        "prod",
        "lim",
        "to",
        "max",
        "min",
        "sup",
        "inf",
        "!",
        ":",
        "partial",
        "nabla",
        "prime",
    ]
)


def is_correct(
    gold: str, answer: str, parse: Callable[[str], list[Any]], verify: Callable[[list[Any], list[Any]], bool]
) -> bool:
    """Return whether an answer is mathematically equal to the gold answer and has its structure.

    Args:
        gold: the gold answer.
        answer: text of a model.
        parse: parser of math-verify, for gold answers that our grammar does not cover.
        verify: its comparison of parsed answers.

    Raises:
        ValueError: neither grammar covers the gold answer.
    """
    ours, theirs = _read(gold), _read(answer)
    if isinstance(ours, Unreadable):
        if _has_giants(theirs):  # which math-verify would write out
            return False
        parsed = parse(gold)
        if not parsed:
            raise ValueError(f"the gold answer {gold!r} {UNREADABLE_GOLD}")
        spelling = _spelling(answer)
        if spelling and spelling == _spelling(gold):
            return True
        if _is_statement(gold) or _is_statement(answer) or _structure(gold) != _structure(answer):
            return False
        return _verified(parsed, parse(answer), verify)
    if isinstance(theirs, Unreadable):
        return False
    try:
        return same(ours, theirs)
    except Unreadable:
        return False


def _read(text: str) -> Any:
    """Parse a text; an `Unreadable` is returned, not raised."""
    try:
        return read(text)
    except Unreadable as error:
        return error


def _has_giants(value: Any) -> bool:
    """Return whether a parsed answer holds a number that is too large to write out."""
    if isinstance(value, tuple):
        return any(_has_giants(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if is_dataclass(value):
        return any(_has_giants(getattr(value, field.name)) for field in fields(value))
    return hasattr(value, "free_symbols") and bool(giants(value))


def _spelling(text: str) -> list[tuple[str, str]]:
    try:
        return [(token.kind, token.text) for token in tokenize(clean(text)) if token.text not in ("{", "}")]
    except Unreadable:
        return []


def _is_statement(text: str) -> bool:
    return any(word in _STATEMENT for _, word in _spelling(text))


def _structure(text: str) -> tuple[Counter[str], set[str]]:
    spelling = _spelling(text)
    words = {word for kind, word in spelling if kind == "text"}
    return Counter(word for _, word in spelling if word in _STRUCTURE), words


def _verified(gold: list[Any], answer: list[Any], verify: Callable[[list[Any], list[Any]], bool]) -> bool:
    """Return whether math-verify finds both equal, and they are so beyond the digits at which it compares numbers."""
    if not gold or not answer or not verify(gold, answer):
        return False
    numbers = all(is_expression(side[0]) and not side[0].free_symbols for side in (gold, answer))
    return not numbers or same_expression(gold[0], answer[0])
