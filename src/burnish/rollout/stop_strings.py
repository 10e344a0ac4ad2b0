"""Incremental detection of stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.data.tokens import decode_text

__all__ = ["StopMatcher"]

_REPLACEMENT = "\ufffd"


class StopMatcher:
    """Incremental decoder of one completion that finds the first stop string in its text.

    Each new token re-decodes only the last few: those whose text is not settled, since a character's bytes may span
    several tokens, and those before them, since a token's text may depend on its neighbour.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._reach = max(len(s) for s in stop) - 1
        self._tokens: list[int] = []
        self._context = self._settled = 0
        self._text = ""

    def push(self, token: int) -> str | None:
        """Add a token; return the text before the first stop string, or None while there is none."""
        self._tokens.append(token)
        known = decode_text(self._tokenizer, self._tokens[self._context : self._settled])
        text = decode_text(self._tokenizer, self._tokens[self._context :])[len(known) :]
        start = max(0, len(self._text) - self._reach)
        seen = self._text + text.rstrip(_REPLACEMENT)
        if not text.endswith(_REPLACEMENT) and text:
            self._text += text
            self._context, self._settled = self._settled, len(self._tokens)
        found = [index for s in self._stop if (index := seen.find(s, start)) >= 0]
        return seen[: min(found)] if found else None
