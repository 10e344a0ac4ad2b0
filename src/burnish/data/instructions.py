"""Alpaca rows: instructions and answers, converted to prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from burnish.errors import DataError

__all__ = ["ADDS", "ANSWERS", "instruction_columns", "instruction_row"]

_ASKS = ("instruction", "question")
ADDS = ("input", "context")
"""Columns with the input of an instruction."""

ANSWERS = ("output", "response", "answer")
_ELSEWHERE = ("history", "system")
"""Columns of some data sets of this format that neither the prompt nor the completion can hold."""

_TAKEN = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "chosen", "rejected")
"""Columns that identify a row as another format."""


def instruction_columns(row: Any) -> tuple[str, ...]:
    """Return the columns to use, the answer last; empty if a row is not of this format, or is ambiguous.

    Args:
        row: columns by name: `instruction` or `question`, with or without `input` or `context`, and `output`,
            `response` or `answer`, all strings.
    """
    if not isinstance(row, Mapping):
        return ()
    row = cast("Mapping[str, Any]", row)
    if any(row.get(name) is not None for name in _TAKEN):
        return ()
    asks, adds = ([name for name in names if row.get(name)] for names in (_ASKS, ADDS))
    answers = [name for name in ANSWERS if row.get(name) is not None]
    columns = (*asks, *adds, *answers)
    one_of_each = len(asks) == 1 and len(adds) <= 1 and len(answers) == 1
    return columns if one_of_each and all(isinstance(row[name], str) for name in columns) else ()


def instruction_row(row: Mapping[str, Any], index: int, *, as_messages: bool) -> Mapping[str, Any]:
    """Add a `prompt` and a `completion` to a row of this format; return other rows unchanged.

    The prompt is the instruction and, after a blank line, its input. All columns are kept: rewards may grade by
    `answer`.

    Args:
        row: columns by name.
        index: index of the row.
        as_messages: make a conversation of user and assistant instead of two strings.

    Raises:
        DataError: earlier turns or a system message beside the instruction.
    """
    columns = instruction_columns(row)
    if not columns:
        return row
    lost = next((name for name in _ELSEWHERE if row.get(name)), None)
    if lost is not None:
        raise DataError(
            f"row {index} has {lost} beside {' and '.join(columns)}, which would be left out: write the row as "
            "messages, or drop the column."
        )
    prompt, completion = "\n\n".join(row[name] for name in columns[:-1]), row[columns[-1]]
    if not as_messages:
        return {**row, "prompt": prompt, "completion": completion}
    return {
        **row,
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }
