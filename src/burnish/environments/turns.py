"""What environments over text share: where their first observation stands, and which part of a turn they act on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.data.formats import Message

__all__ = ["behind_prompt", "without_reasoning"]


def behind_prompt(row: Mapping[str, Any], shown: str) -> Sequence[Message]:
    """Return the prompt of a row, with a first observation behind it."""
    *before, last = row.get("prompt") or [{"role": "user", "content": ""}]
    if last["role"] != "user":
        return [*before, last, {"role": "user", "content": shown}]
    return [*before, {**last, "content": f"{last['content']}\n\n{shown}".lstrip()}]


def without_reasoning(text: str) -> str:
    """Return a turn without its reasoning, of which the template may have written the opening tag."""
    return re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL).rpartition("</think>")[2].strip()
