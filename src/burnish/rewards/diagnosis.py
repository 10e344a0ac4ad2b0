"""Diagnosis of verifiers that find no answers: where completions give one, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.config.tips import toml_line
from burnish.rewards.answers import SOURCES, extract_answer
from burnish.rewards.rubric import Rubric
from burnish.rewards.verifiers import AnswerVerifier, completion_text

__all__ = ["AnswerCounts", "count_answers"]

_NAMES = {"block": "closed block of code", "boxed": r"\boxed{}", "last_number": "number", "text": "text"}


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """Number of completions from which one criterion can extract an answer.

    Attributes:
        criterion: name of the criterion.
        tag: name of its answer tag.
        sources: its sources of answers, in order.
        num_completions: completions examined.
        num_read: completions from which `sources` yield an answer.
        by_source: completions from which each of :data:`burnish.rewards.answers.SOURCES` alone yields one.
        num_unclosed: completions that open the tag and never close it.
    """

    criterion: str
    tag: str
    sources: tuple[str, ...]
    num_completions: int
    num_read: int
    by_source: Mapping[str, int]
    num_unclosed: int

    def message(self) -> str | None:
        """Suggest a fix if no completion gives an answer; None if one does."""
        if self.num_read or not self.num_completions:
            return None
        names = _NAMES | {"tag": f"<{self.tag}> tag"}
        wanted = " or ".join(names[source] for source in self.sources)
        total = self.num_completions
        found = f"criterion {self.criterion!r}: no {wanted} in any of {total} completions, so all score 0"
        if "tag" in self.sources and self.num_unclosed:
            return (
                f"{found}; {self.num_unclosed} of {total} open <{self.tag}> and never close it: raise "
                f"max_completion_length, and remove '</{self.tag}>' from stop (stop strings are cut from the text)."
            )
        # "text" yields an answer for every completion, so it is not a useful suggestion.
        others = [source for source in SOURCES if source not in (*self.sources, "text")]
        best = max(others, key=lambda source: self.by_source[source], default=None)
        if best is None or not self.by_source[best]:
            return f"{found}: ask for one in the prompt, show it in SFT first, or change `sources`."
        where = "hold a number" if best == "last_number" else f"have a {names[best]}"
        return f"{found}; {self.by_source[best]} of {total} {where}: set {toml_line('sources', (*self.sources, best))}."


def count_answers(rubric: Rubric, completions: Sequence[Any]) -> list[AnswerCounts]:
    """Count, for each answer verifier of a rubric, the completions from which an answer can be extracted, by source.

    Args:
        rubric: the criteria; those that do not extract answers (format, length, user functions) are skipped.
        completions: texts, or lists of messages.

    Returns:
        One record per verifier, in order.
    """
    texts = [completion_text(completion) for completion in completions]

    def count(tag: str, *sources: str) -> int:
        return sum(extract_answer(text, tag=tag, sources=sources) is not None for text in texts)

    verifiers = [(c.name, c.function) for c in rubric.criteria if isinstance(c.function, AnswerVerifier)]
    return [
        AnswerCounts(
            criterion=name,
            tag=verifier.tag,
            sources=verifier.sources,
            num_completions=len(texts),
            num_read=count(verifier.tag, *verifier.sources),
            by_source={source: count(verifier.tag, source) for source in SOURCES},
            num_unclosed=sum(text.rfind(f"<{verifier.tag}>") > text.rfind(f"</{verifier.tag}>") for text in texts),
        )
        for name, verifier in verifiers
    ]
