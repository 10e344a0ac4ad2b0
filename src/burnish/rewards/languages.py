"""Language of a text, by py3langid."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from burnish.errors import ConfigError, RewardError
from burnish.rewards.criterion import RewardFunction
from burnish.rewards.verifiers import completion_text, require

__all__ = ["language_is", "language_of"]


@cache
def _identifier() -> Any:
    require("py3langid", "text", "language")
    langid: Any = importlib.import_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def language_of(text: str) -> str:
    """Return the language that a text is most likely in, as a code of ISO 639-1 such as "en".

    Raises:
        ConfigError: py3langid is not installed.
    """
    return str(_identifier().classify(text)[0])


def language_is(*, language: str | None = None, column: str | None = None) -> RewardFunction:
    """Create a reward of 1 for a completion in a language, else 0; short texts are often taken for another.

    Args:
        language: code of ISO 639-1.
        column: column of the code, in place of `language`; a row without one gives None.

    Raises:
        ConfigError: no language, two, an unknown one, or py3langid is not installed.
    """
    known = set(map(str, _identifier().labels))
    if (language is None) == (column is None):
        raise ConfigError(f"language = {language!r} and column = {column!r} of language: give one of them.")
    if language is not None and language not in known:
        raise ConfigError(f"language = {language!r} of language: use one of {', '.join(sorted(known))}.")

    def grade(text: str, wanted: Any) -> float | Exception | None:
        if wanted is None:
            return None
        if wanted not in known:
            return RewardError(f"the language {wanted!r} in column {column!r} is not one of {', '.join(sorted(known))}")
        return float(bool(text.strip()) and language_of(text) == wanted)

    def language_is(completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
        if column is not None and column not in columns:
            raise RewardError(f"language needs the column {column!r}; the rows have: {', '.join(columns)}.")
        wanted = [language] * len(completions) if column is None else columns[column]
        return [grade(completion_text(text), code) for text, code in zip(completions, wanted, strict=True)]

    return language_is
