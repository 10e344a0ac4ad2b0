"""Removal of training rows whose prompt is also an evaluation prompt."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from burnish.data.formats import hint, messages_of
from burnish.data.instructions import instruction_row
from burnish.errors import DataError

__all__ = ["DisjointCounts", "disjoint"]

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DisjointCounts:
    """Counts of `disjoint`: rows kept, rows dropped because evaluation has them, and repeats dropped."""

    num_kept: int
    num_in_evaluation: int
    num_repeated: int


def disjoint(
    train: Iterable[Mapping[str, Any]], evaluation: Iterable[Mapping[str, Any]], *, keep_repeats: bool = False
) -> tuple[list[Row], DisjointCounts]:
    """Keep training rows whose prompt is not among the evaluation rows, each prompt once.

    Prompts are compared without system messages and with white space normalised, so that one problem under two system
    prompts counts as the same.

    Args:
        train: rows to filter; their order is kept.
        evaluation: rows to hold out.
        keep_repeats: keep training rows that repeat an earlier one. Procedural tasks repeat their easy problems most,
            so dropping repeats makes the training set harder than the evaluation set.

    Returns:
        The rows kept, and the counts.

    Raises:
        DataError: a row without a prompt, or no row left.
    """
    # A prompt without a question is left to an environment, which asks another one each time.
    held = {key for key in map(_prompt_key, evaluation, itertools.count()) if any(text for _, text in key)}
    seen: set[tuple[tuple[str, str], ...]] = set()
    kept: list[Row] = []
    num_held = num_repeated = 0
    for index, row in enumerate(train):
        key = _prompt_key(row, index)
        if key in held:
            num_held += 1
        elif key in seen and not keep_repeats:
            num_repeated += 1
        else:
            seen.add(key)
            kept.append(dict(row))
    if not kept:
        raise DataError("every training prompt is also an evaluation prompt: use another seed, or more training rows.")
    return kept, DisjointCounts(len(kept), num_held, num_repeated)


_ASKING = ("prompt", "messages", "conversations", "text")


def _prompt_key(row: Mapping[str, Any], index: int) -> tuple[tuple[str, str], ...]:
    """Return the question of a row: its prompt, else the messages before the first answer, else the text."""
    row = instruction_row(row, index, as_messages=False)
    value: Any = next((row[name] for name in _ASKING if row.get(name) is not None), None)
    if value is None:
        fix = hint(row, [(name,) for name in _ASKING])
        raise DataError(
            f"row {index} has the columns {sorted(row)}; comparing prompts needs {' or '.join(_ASKING)}: {fix}."
        )
    if isinstance(value, str):
        return (("user", _squeezed(value)),)
    key: list[tuple[str, str]] = []
    for message in messages_of(value):
        if message["role"] == "assistant" and row.get("prompt") is None:
            break
        if message["role"] != "system":
            key.append((message["role"], _squeezed(message.get("content"))))
    return tuple(key)


def _squeezed(content: Any) -> str:
    return " ".join((content if isinstance(content, str) else json.dumps(content, sort_keys=True)).split())
