"""Verifiable instructions of a text, of the kinds of IFEval (2311.07911): lengths, words, case, marks, form.

A row lists the instructions that its prompt gives, by the data set's own identifiers and arguments. Each check is a
function of the text and its arguments; `CHECKS` has them all.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from burnish.errors import ConfigError, RewardError, show
from burnish.rewards.criterion import RewardFunction
from burnish.rewards.languages import language_of
from burnish.rewards.verifiers import completion_text

__all__ = ["CHECKS", "instructions_followed"]

Check = Callable[..., bool]

_RELATIONS: dict[str, Callable[[int, int], bool]] = {"at least": operator.ge, "less than": operator.lt}
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d)\]]*\s+(?=\S)")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z])\.$")
_BULLET = re.compile(r"^\s*(?:\*(?!\*)|-)\s*\S.*$", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compared(count: int, relation: str, number: int) -> bool:
    if relation not in _RELATIONS:
        raise RewardError(f"relation = {show(relation)}: use {' or '.join(_RELATIONS)}.")
    return _RELATIONS[relation](count, number)


def _times(text: str, keyword: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def _sentences(text: str) -> list[str]:
    sentences: list[str] = []
    for part in _SENTENCE_END.split(text.strip()):
        if sentences and _ABBREVIATION.search(sentences[-1]):
            sentences[-1] += f" {part}"
        elif part:
            sentences.append(part)
    return sentences


def _paragraphs(text: str, separator: str) -> list[str]:
    return [part.strip() for part in re.split(separator, text) if part.strip()]


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = _paragraphs(text, r"\n\s*\n")
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    words = _WORD.findall(paragraphs[nth_paragraph - 1])
    return bool(words) and words[0].casefold() == first_word.casefold()


def _is_json(text: str) -> bool:
    inner = text.strip().removeprefix("```json").removeprefix("```JSON").removeprefix("```").removesuffix("```")
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, postscript_marker: str) -> bool:
    # "P.S." is also written "p. s.".
    marker = r"\s*".join(re.escape(letter) for letter in postscript_marker if not letter.isspace())
    return re.search(rf"(?:^|\s){marker}\s*\S", text, re.IGNORECASE) is not None


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(_times(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compared(
        _times(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(_times(text, word) for word in forbidden_words),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compared(
        text.casefold().count(letter.casefold()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: language_of(text) == language,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _compared(
        len(_sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        len(_paragraphs(text, r"\*\*\*")) == num_paragraphs
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _compared(
        len(_WORD.findall(text)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: len(_BULLET.findall(text)) == num_bullets,
    "detectable_format:constrained_response": lambda text: any(answer in text for answer in _ANSWERS),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        sum(bool("".join(found).strip()) for found in _HIGHLIGHT.findall(text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None,
    "combination:two_responses": lambda text: (
        len(parts := [part.strip() for part in text.split("******")]) == 2 and all(parts) and parts[0] != parts[1]
    ),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())
    ),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _compared(
        sum(word.isupper() for word in _WORD.findall(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "punctuation:no_comma": lambda text: "," not in text,
}
"""Identifier -> check of a text, with the arguments by name."""


def instructions_followed(
    *, column: str = "instruction_id_list", arguments_column: str = "kwargs", partial_credit: bool = True
) -> RewardFunction:
    """Create a reward of verifiable instructions: the fraction that the completion follows, in [0, 1].

    Args:
        column: column of the list of identifiers, as in IFEval; None in a row gives None.
        arguments_column: column of the list of their arguments, tables by name; entries of None are dropped, since
            columnar files fill them in.
        partial_credit: False gives 1 for all instructions followed and else 0.

    Raises:
        ConfigError: a column without a name.
    """
    if not column or not arguments_column:
        raise ConfigError(f"column = {column!r} of instructions_followed: name a column.")

    def grade(text: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> float:
        if len(names) != len(arguments) or not names:
            raise RewardError(f"{len(names)} instructions with {len(arguments)} tables of arguments: give each one.")
        if unknown := sorted(set(names) - CHECKS.keys()):
            raise RewardError(f"there is no instruction {unknown[0]!r}; see burnish.rewards.instructions.CHECKS.")
        given = [{k: v for k, v in (of or {}).items() if v is not None} for of in arguments]
        # An empty text says nothing wrong, and follows no instruction either.
        followed = [bool(text.strip()) and CHECKS[name](text, **of) for name, of in zip(names, given, strict=True)]
        return sum(followed) / len(followed) if partial_credit else float(all(followed))

    def instructions_followed(completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
        if missing := [name for name in (column, arguments_column) if name not in columns]:
            raise RewardError(f"instructions_followed needs the column {missing[0]!r}; the rows have: {list(columns)}.")
        values: list[float | Exception | None] = []
        for completion, names, arguments in zip(completions, columns[column], columns[arguments_column], strict=True):
            try:
                values.append(None if names is None else grade(completion_text(completion), names, arguments))
            except (RewardError, TypeError) as error:  # TypeError: missing or unknown arguments of a check
                values.append(error)
        return values

    return instructions_followed
