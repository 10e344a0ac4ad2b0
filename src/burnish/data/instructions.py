"""Rows of instructions and answers, as Alpaca's data set has them, read as prompts and completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from burnish.errors import DataError

__all__ = ["ADDS", "ANSWERS", "instruction_columns", "instruction_row"]

_ASKS = ("instruction", "question")
ADDS = ("input", "context")
"""Columns that hold what an instruction is about."""

ANSWERS = ("output", "response", "answer")
_ELSEWHERE = ("history", "system")
"""Columns that some data sets of this format have, and that a prompt and its completion have no place for."""

_TAKEN = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "chosen", "rejected")
"""Columns that say by themselves what a row is."""


def instruction_columns(row: Any) -> tuple[str, ...]:
    """The columns that are read, the answer last; none where a row is not of this format or could be read in two ways.

    Args:
        row: columns by name: `instruction` or `question`, with or without `input` or `context`, and `output`,
            `response` or `answer`, all of them texts.
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
    """A row of this format with a `prompt` and a `completion`; others as they are.

    The prompt is the instruction, and below a blank line what it is about. Nothing else is added, and no column is
    lost: rewards may grade by `answer`.

    Args:
        row: columns by name.
        index: the row's position.
        as_messages: make it a conversation of a user and an assistant instead of two texts.

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
