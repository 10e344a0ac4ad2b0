"""Suggestions for misnamed columns: which of a row's columns are probably meant, and how to rename them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from burnish.config.predicates import is_number
from burnish.config.tips import toml_line

__all__ = ["meant_columns", "rename_line", "rename_tip"]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_messages(value: Any) -> bool:
    messages = cast("list[Any]", value)
    return isinstance(value, list) and bool(messages) and all(isinstance(one, Mapping) for one in messages)


def _is_text_or_messages(value: Any) -> bool:
    return _is_text(value) or _is_messages(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_token_ids(value: Any) -> bool:
    return _is_list(value) and all(type(token) is int for token in value)


_COLUMNS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "answer": (
        lambda value: value is not None and value != "",
        ("solution", "ground truth", "gold", "gold answer", "final answer", "expected answer", "target", "label",
         "response", "output", "completion"),
    ),
    "chosen": (
        _is_text_or_messages,
        ("accepted", "preferred", "positive", "better", "best", "winner", "win", "good", "response chosen",
         "chosen response", "answer chosen"),
    ),
    "chosen_ids": (_is_token_ids, ("chosen input ids", "chosen tokens")),
    "completion": (
        _is_text_or_messages,
        ("response", "answer", "output", "solution", "reply", "target", "assistant", "generation"),
    ),
    "completion_ids": (_is_token_ids, ("completion input ids", "response ids", "completion tokens")),
    "completions": (_is_list, ("responses", "answers", "outputs", "candidates", "ranking", "steps")),
    "difficulty": (is_number, ("level", "hardness", "complexity")),
    "input_ids": (_is_token_ids, ("token ids", "tokens", "ids")),
    "label": (
        lambda value: isinstance(value, bool) or (type(value) is int and value in (0, 1)),
        ("desirable", "is good", "is desirable", "good", "liked", "thumbs up", "preference"),
    ),
    "labels": (_is_list, ("step labels", "ratings", "is right", "correct")),
    "messages": (_is_messages, ("conversation", "dialogue", "dialog", "chat", "turns")),
    "prompt": (
        _is_text_or_messages,
        ("question", "instruction", "query", "problem", "task", "input", "request", "user", "text"),
    ),
    "prompt_ids": (_is_token_ids, ("prompt input ids", "prompt tokens")),
    "rejected": (
        _is_text_or_messages,
        ("dispreferred", "negative", "worse", "worst", "loser", "lose", "bad", "response rejected",
         "rejected response", "answer rejected"),
    ),
    "rejected_ids": (_is_token_ids, ("rejected input ids", "rejected tokens")),
    "text": (_is_text, ("content", "body", "document", "article", "passage", "story", "code")),
    "weight": (is_number, ("sampling weight", "probability", "frequency")),
}  # fmt: skip
"""Column that stages use -> predicate of its values, and common other names for it, most likely first."""

_CLOSE = 0.75
"""Similarity above which a name is a misspelling of another."""


def meant_columns(
    row: Mapping[str, Any], families: Iterable[Sequence[str]], *, also: Iterable[str] = ()
) -> dict[str, str]:
    """Guess by name and value type which columns of a row hold what a stage needs.

    Args:
        row: columns by name.
        families: sets of columns; the stage needs all columns of one set.
        also: optional columns.

    Returns:
        Present name -> needed name, for the set that fits best; empty if no set can be completed.
    """
    best: dict[str, str] = {}
    most = 0.0
    for family in families:
        names, score = _assigned(row, family)
        if score > most:
            best, most = names, score
    if best:
        for name in also:
            best |= _assigned({old: value for old, value in row.items() if old not in best}, [name])[0]
    return best


def _assigned(row: Mapping[str, Any], family: Sequence[str]) -> tuple[dict[str, str], float]:
    """Assign a column to each missing name; returns them with their mean score, or nothing and 0 if one is left."""
    free = {name: value for name, value in row.items() if value is not None and name not in family}
    names: dict[str, str] = {}
    total = 0.0
    for needed in family:
        if row.get(needed) is not None:
            total += 1.0
            continue
        likely = max(free, key=lambda name: _fit(name, free[name], needed), default="")
        score = _fit(likely, free.get(likely), needed)
        if not score:
            return {}, 0.0
        names[likely] = needed
        total += score
        del free[likely]
    return names, total / len(family)


def _fit(name: str, value: Any, needed: str) -> float:
    """Score from 0 to 1 how plausibly a column holds the values that `needed` names."""
    fits, aliases = _COLUMNS.get(needed, (bool, ()))
    if not fits(value):
        return 0.0
    words = _words(name)
    if words in aliases:
        return 0.99 - 0.01 * aliases.index(words)
    similarity = difflib.SequenceMatcher(None, words, _words(needed)).ratio()
    return similarity if similarity >= _CLOSE else 0.0


def _words(name: Any) -> str:
    return " ".join(re.split(r"[\W_]+", str(name)[:100].casefold())).strip()


def rename_line(names: Mapping[str, str]) -> str:
    """Return the TOML line of a source that renames columns."""
    return toml_line("columns", names)


def rename_tip(names: Mapping[str, str]) -> str:
    """Explain how to rename columns in a run file and in Python."""
    return f"rename columns (in a source: `{rename_line(names)}`; of a data set: `rename_columns({dict(names)!r})`)"
