"""Verifier of the format of completions: tags, in order, with content."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.errors import ConfigError
from burnish.rewards.verifiers import completion_text

__all__ = ["FormatVerifier", "format_tags"]


@dataclass(frozen=True)
class FormatVerifier:
    """Reward function that grades the format of completions; made by `format_tags`."""

    tags: tuple[str, ...]
    prefix: str = ""
    allow_outside: bool = False
    until_closed: bool = False

    @property
    def __name__(self) -> str:
        return "format_tags"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """Grade completions."""
        return [self._score(self.prefix + completion_text(completion)) for completion in completions]

    @property
    def is_settled(self) -> Callable[..., bool] | None:
        """Predicate of `stop_settled`; None where a tag may always be repeated."""
        return self._is_settled if self.until_closed else None

    def _is_settled(self, text: str, **columns: Any) -> bool:
        text = self.prefix + text
        return f"</{self.tags[-1]}>" in text or all(_is_broken(text, tag) for tag in self.tags)

    def _score(self, text: str) -> float:
        closing = f"</{self.tags[-1]}>"
        if self.until_closed and closing in text:
            text = text[: text.index(closing) + len(closing)]
        spans = [_tag_span(text, tag) for tag in self.tags]
        found = [span for span in spans if span is not None]
        score = 0.5 * len(found) / len(self.tags)
        if len(found) < len(self.tags) or any(a[1] > b[0] for a, b in itertools.pairwise(found)):
            return score
        edges = [0, *(edge for span in found for edge in span), len(text)]
        outside = "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        return score + (0.5 if self.allow_outside or not outside.strip() else 0.25)


def format_tags(
    *,
    tags: Sequence[str] = ("think", "answer"),
    prefix: str = "",
    allow_outside: bool = False,
    until_closed: bool = False,
) -> FormatVerifier:
    """Create a reward for the format `<a>...</a> <b>...</b>`, in [0, 1], with partial credit.

    score = 1/2 * (fraction of tags that are well-formed) + 1/4 * [ordered] + 1/4 * [clean]. A tag is well-formed if it
    opens once and then closes once, around something other than white space; ordered: all tags are well-formed and each
    closes before the next opens; clean: ordered, with only white space outside the tags. Repeated tags score nothing,
    so writing every tag many times does not pay.

    Args:
        tags: distinct names, in order.
        prefix: start of the completion that the prompt already contains, such as "<think>"; prepended.
        allow_outside: accept text outside the tags: ordered completions are clean.
        until_closed: grade the text until the last tag is closed for the first time; what follows does not count.

    Raises:
        ConfigError: no tags, a repeated tag, or a tag that is not a plain name.
    """
    names = tuple(tags)
    if not names or isinstance(tags, str) or len(set(names)) != len(names):
        raise ConfigError(f"tags = {tags!r} of format_tags: use a list of distinct names such as ['think', 'answer'].")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"tags holds {name!r} in format_tags: use names without brackets, such as 'think'.")
    return FormatVerifier(names, prefix, allow_outside, until_closed)


def _tag_span(text: str, name: str) -> tuple[int, int] | None:
    opening, closing = f"<{name}>", f"</{name}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening), text.index(closing)
    return (start, end + len(closing)) if text[start + len(opening) : end].strip() else None


def _is_broken(text: str, name: str) -> bool:
    """Tell that no continuation makes a tag well-formed."""
    return text.count(f"<{name}>") > 1 or (f"</{name}>" in text and _tag_span(text, name) is None)
