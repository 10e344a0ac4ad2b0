"""Guesses of the next tokens of a completion from what its group has already sampled.

Completions of one prompt repeat each other, and the prompt. A guess that follows an earlier occurrence of the last few
tokens (prompt lookup, 2304.04487) costs nothing to make; the engine then computes several tokens of a row in one
forward and draws each with its own random number. A draw that differs from its guess ends the row's step, so the tokens
are those that would have been drawn one at a time: a guess is accepted with the probability that the policy gives it,
which is what rejection sampling (2211.17192) gives a deterministic guess.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST_GUESSES", "DraftSource", "DraftWidth"]

_GRAMS = (4, 2)
"""Lengths of the endings that are looked up, longest first."""
_WIDTHS = (1, 2, 3, 4, 6, 8)
"""Tokens of a row in one forward: one that is known to be next, and guesses."""
MOST_GUESSES = _WIDTHS[-1] - 1
"""Most guesses of a row in one forward."""
_PRIOR = 8.0
"""Weight of the initial acceptance rate, in guesses."""


class DraftSource:
    """Text of one group, indexed by its n-grams.

    Args:
        prompt_ids: the prompt.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._prompt = list(prompt_ids)
        self._texts: list[list[int]] = []
        self._next: dict[tuple[int, ...], tuple[int, int]] = {}
        """The text and the place of the token that followed an n-gram last."""
        self.add_text()
        for place in range(1, len(self._prompt)):
            self._note(0, place)

    def add_text(self) -> int:
        """Begin a completion; return its number."""
        self._texts.append(list(self._prompt))
        return len(self._texts) - 1

    def push(self, text: int, token: int) -> None:
        """Append a token to a completion."""
        self._texts[text].append(token)
        self._note(text, len(self._texts[text]) - 1)

    def guess(self, text: int, length: int) -> list[int]:
        """Guess up to `length` next tokens of a completion; the list is empty where its ending is new."""
        tokens = self._texts[text]
        for gram in _GRAMS:
            found = self._next.get(tuple(tokens[-gram:])) if len(tokens) >= gram else None
            if found is not None:
                other, place = found
                return self._texts[other][place : place + length]
        return []

    def _note(self, text: int, place: int) -> None:
        tokens = self._texts[text]
        for gram in _GRAMS:
            if place >= gram:
                self._next[tuple(tokens[place - gram : place])] = text, place


class DraftWidth:
    """Choose how many tokens of a row to compute in one forward.

    A forward of T tokens is taken to cost `fixed + T`, and a row of width W to yield (1 - a^W) / (1 - a) tokens at
    acceptance rate a. Clocks are not used: the choice, and with it rounding, must not differ between runs.

    Args:
        fixed: cost of a forward's weights and overhead, in tokens.
    """

    def __init__(self, fixed: float) -> None:
        self._fixed = fixed
        self._accepted, self._guessed = 0.5 * _PRIOR, _PRIOR

    def add(self, accepted: int, guessed: int) -> None:
        """Count the guesses of a row up to the first that was wrong."""
        self._accepted += accepted
        self._guessed += guessed

    def choose(self, rows: int, guessing: int) -> int:
        """Return W, the width with the most tokens per cost, where `guessing` of the rows have a guess."""
        rate = self._accepted / self._guessed

        def gain(width: int) -> float:
            drawn = rows - guessing + guessing * sum(rate**i for i in range(width))
            return drawn / (self._fixed + rows * width)

        return max(_WIDTHS, key=gain)
