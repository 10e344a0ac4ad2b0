"""Incremental decoding of completions, and detection of stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.data.tokens import decode_text

__all__ = ["GrowingText", "StopMatcher"]

_REPLACEMENT = "\ufffd"


class GrowingText:
    """Text of a completion that grows.

    Each push re-decodes only the last few tokens: those whose text is not complete, since a character's bytes may span
    several tokens, and those before them, since a token's text may depend on its neighbour.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = self._complete = 0
        self.text = ""

    def push(self, *tokens: int) -> str:
        """Add tokens; return what follows `text` up to a character that is not complete."""
        self._tokens += tokens
        known = decode_text(self._tokenizer, self._tokens[self._context : self._complete])
        text = decode_text(self._tokenizer, self._tokens[self._context :])[len(known) :]
        if text.endswith(_REPLACEMENT) or not text:
            return text.rstrip(_REPLACEMENT)
        self.text += text
        self._context, self._complete = self._complete, len(self._tokens)
        return ""


class StopMatcher:
    """Finder of the first stop string in the text of a completion."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._reach = max(len(s) for s in stop) - 1
        self._growing = GrowingText(tokenizer)

    def push(self, token: int) -> str | None:
        """Add a token; return the text before the first stop string, or None while there is none."""
        start = max(0, len(self._growing.text) - self._reach)
        rest = self._growing.push(token)
        seen = self._growing.text + rest
        found = [index for s in self._stop if (index := seen.find(s, start)) >= 0]
        return seen[: min(found)] if found else None
