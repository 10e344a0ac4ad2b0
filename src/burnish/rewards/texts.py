"""Reward functions of texts: choices, JSON, patterns, lengths, quotations, and completions against their siblings."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.errors import ConfigError, RewardError, show
from burnish.rewards.criterion import RewardFunction
from burnish.rewards.verifiers import AnswerVerifier, Row, completion_text, each_answer, gold_of, require

__all__ = [
    "diversity",
    "json_answer",
    "length_between",
    "multiple_choice",
    "quotes_prompt",
    "regex_match",
    "relative_length",
]

_CHOICE = re.compile(
    r"(?:(?:the )?(?:correct |right |final |best )?(?:answer|choice|option)(?: is)?:? ?)?"
    r"(?P<open>[(\[])?(?P<label>[A-Z]|\d{1,2})(?(open)[)\]]|[).\]:]?)(?P<text> .*)?",
    re.IGNORECASE | re.DOTALL,
)
_DECORATION = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}|\$|\*\*|__|`")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL | re.IGNORECASE)
_QUOTE = re.compile(
    r'"([^"\n]+)"|\u201c([^\u201d\n]+)\u201d|\u00ab([^\u00bb\n]+)\u00bb|<quote>(.+?)</quote>', re.DOTALL
)
_UNITS = ("tokens", "words", "characters")


def multiple_choice(
    *,
    column: str = "answer",
    choices_column: str | None = None,
    sources: Sequence[str] = ("tag", "boxed"),
    tag: str = "answer",
    until_closed: bool = False,
) -> AnswerVerifier:
    r"""Create a verifier of multiple choice: 1 if the answer names the right choice and no other, else 0.

    Accepted are a label ("B", "(b)", "B.", `\text{B}`, "the answer is B"), a label with the text of its choice
    ("B) 12"), and the text alone. A label with the text of another choice scores 0.

    Args:
        column: column of the label of the right choice; with `choices_column` also its text.
        choices_column: column of the choices, as a list of texts (labelled A, B, ...) or a table of texts by label;
            None accepts labels alone.
        sources: sources of the answer, see :func:`burnish.rewards.extract_answer`.
        tag: name of the answer tag.
        until_closed: grade the first answer to be closed instead of the last.

    Raises:
        ConfigError: an invalid option.
    """
    gold = gold_of(column)

    def choices(row: Row) -> dict[str, str]:
        found: Any = None if choices_column is None else row.get(choices_column)
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            found = {chr(ord("A") + i): text for i, text in enumerate(found)}
        return {str(label).upper(): _plain(str(text)) for label, text in found.items()}

    def label_of(text: str, texts: Mapping[str, str]) -> str | None:
        text = _plain(text)
        if len(named := [label for label, choice in texts.items() if choice == text]) == 1:
            return named[0]
        match = _CHOICE.fullmatch(text)
        if match is None:
            return None
        label, rest = match["label"].upper(), (match["text"] or "").strip(" .:)-")
        return label if not rest or texts.get(label, "").strip(" .:)-") == rest else None

    def grade_one(answer: str, row: Row) -> float:
        texts = choices(row)
        right = {label_of(text, texts) for text in gold(row)}
        if None in right or (texts and not right <= texts.keys()):
            raise RewardError(f"the gold answer {gold(row)[0]!r} in column {column!r} is not one of the choices")
        return float(label_of(answer, texts) in right)

    return AnswerVerifier("multiple_choice", each_answer(grade_one), gold, column, tuple(sources), tag, until_closed)


def _plain(text: str) -> str:
    return " ".join(_DECORATION.sub(lambda match: match[1] or "", text).split()).rstrip(".").casefold()


def json_answer(*, schema: Mapping[str, Any] | None = None, column: str | None = None) -> RewardFunction:
    """Create a reward of 1 for a completion that is JSON of a schema, else 0.

    The JSON is the whole text, or its only fenced block.

    Args:
        schema: JSON Schema, as a table; None accepts any JSON.
        column: column of the schema, as JSON text or a table, in place of `schema`; a row without one gives None.

    Raises:
        ConfigError: two schemas, one that is invalid, or jsonschema is not installed.
    """
    require("jsonschema", "text", "json_answer")
    jsonschema: Any = importlib.import_module("jsonschema")

    def validator(schema: Any) -> Any:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        return kind(schema)

    if schema is not None and column is not None:
        raise ConfigError(f"column = {column!r} of json_answer beside a schema: give one of them.")
    try:
        shared = None if column is not None else validator({} if schema is None else schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"schema of json_answer: {error.message}; correct it.") from error

    def grade(completion: Any, given: Any) -> float | Exception | None:
        if column is not None and given is None:
            return None
        try:
            checker = shared or validator(json.loads(given) if isinstance(given, str) else given)
        except (ValueError, jsonschema.SchemaError) as error:
            return RewardError(f"the schema in column {column!r} cannot be read: {str(error).splitlines()[0]}")
        text = completion_text(completion)
        blocks = _FENCE.findall(text)
        try:
            value = json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse_constant)
            return float(checker.is_valid(value))
        except (ValueError, RecursionError):
            return 0.0

    def json_answer(completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
        if column is not None and column not in columns:
            raise RewardError(f"json_answer needs the column {column!r}; the rows have: {', '.join(columns)}.")
        schemas = [None] * len(completions) if column is None else columns[column]
        return [grade(completion, given) for completion, given in zip(completions, schemas, strict=True)]

    return json_answer


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def regex_match(*, pattern: str | None = None, column: str | None = None, whole: bool = False) -> RewardFunction:
    """Create a reward of 1 for a completion in which a regular expression matches, else 0.

    A pattern may take very long on some texts: give the criterion `timeout_seconds`.

    Args:
        pattern: regular expression of Python's `re`; `.` matches line breaks.
        column: column of the pattern, in place of `pattern`; a row without one gives None.
        whole: it must match the whole text, without surrounding white space.

    Raises:
        ConfigError: no pattern, two, or one that is invalid.
    """
    if (pattern is None) == (column is None):
        raise ConfigError(f"pattern = {show(pattern)} and column = {show(column)} of regex_match: give one of them.")
    try:
        shared = None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"pattern = {show(pattern)} of regex_match: {error}; correct it.") from error

    def grade(completion: Any, given: str | None) -> float | Exception | None:
        try:
            compiled = shared or (None if given is None else re.compile(given, re.DOTALL))
        except (re.error, TypeError) as error:
            return RewardError(f"the pattern {show(given)} in column {column!r}: {error}")
        if compiled is None:
            return None
        text = completion_text(completion)
        return float(bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text)))

    def regex_match(completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
        if column is not None and column not in columns:
            raise RewardError(f"regex_match needs the column {column!r}; the rows have: {', '.join(columns)}.")
        patterns = [None] * len(completions) if column is None else columns[column]
        return [grade(completion, given) for completion, given in zip(completions, patterns, strict=True)]

    return regex_match


def length_between(*, least: int = 0, most: int, slack: int = 0, unit: str = "tokens") -> RewardFunction:
    """Create a reward of length L: 1 within [least, most], 0 beyond, linear over `slack` on either side.

    Args:
        least: shortest length of full reward.
        most: longest length of full reward.
        slack: distance from them at which the reward reaches 0.
        unit: "tokens", "words" or "characters".

    Raises:
        ConfigError: lengths out of order, or an unknown unit.
    """
    if unit not in _UNITS:
        raise ConfigError(f"unit = {show(unit)} of length_between: use {', '.join(_UNITS)}.")
    if not 0 <= least <= most or slack < 0:
        raise ConfigError(
            f"least = {least!r}, most = {most!r}, slack = {slack!r} of length_between: use 0 <= least <= most, and a "
            "slack of at least 0."
        )

    def measure(completion: Any, ids: Sequence[int]) -> int:
        text = completion_text(completion)
        return {"tokens": len(ids), "words": len(text.split()), "characters": len(text)}[unit]

    def length_between(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        lengths = [measure(*pair) for pair in zip(completions, completion_ids, strict=True)]
        beyond = [max(least - length, length - most, 0) for length in lengths]
        return [max(0.0, 1 - distance / slack) if slack else float(distance == 0) for distance in beyond]

    return length_between


def quotes_prompt(*, column: str | None = None, least_quotes: int = 1, least_words: int = 3) -> RewardFunction:
    """Create a reward of quotations: the fraction that stand in the source word for word, white space and case aside.

    Quotations stand in quotation marks or `<quote>` tags; shorter ones than `least_words` do not count either way. With
    fewer than `least_quotes` the reward is 0.

    Args:
        column: column of the source; None for the prompt.
        least_quotes: fewest quotations.
        least_words: fewest words of a quotation.

    Raises:
        ConfigError: a number below 1.
    """
    for name, value in (("least_quotes", least_quotes), ("least_words", least_words)):
        if value < 1:
            raise ConfigError(f"{name} = {value!r} of quotes_prompt: use at least 1.")

    def grade(completion: Any, source: Any) -> float | None:
        if source is None:
            return None
        texts = [source] if isinstance(source, str) else [str(message.get("content") or "") for message in source]
        known = " ".join(" ".join(texts).casefold().split())
        quotes = [" ".join("".join(found).casefold().split()) for found in _QUOTE.findall(completion_text(completion))]
        quotes = [quote for quote in quotes if len(quote.split()) >= least_words]
        return statistics.fmean(quote in known for quote in quotes) if len(quotes) >= least_quotes else 0.0

    def quotes_prompt(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column is not None and column not in columns:
            raise RewardError(f"quotes_prompt needs the column {column!r}; the rows have: {', '.join(columns)}.")
        sources = prompts if column is None else columns[column]
        return [grade(completion, source) for completion, source in zip(completions, sources, strict=True)]

    return quotes_prompt


def diversity(*, ngram_size: int = 3) -> RewardFunction:
    """Create a reward of difference from the siblings: 1 - mean Jaccard index of token n-grams, in [0, 1].

    A completion alone gives None. Use it with `per_group`, as run files do by themselves.

    Args:
        ngram_size: n; of a shorter completion the whole is one n-gram.

    Raises:
        ConfigError: n below 1.
    """
    if ngram_size < 1:
        raise ConfigError(f"ngram_size = {ngram_size!r} of diversity: use at least 1 token.")

    def diversity(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float | None]:
        sets = [
            {tuple(ids[i : i + ngram_size]) for i in range(max(1, len(ids) - ngram_size + 1))} for ids in completion_ids
        ]
        return [
            1 - statistics.fmean(len(own & other) / len(own | other) for j, other in enumerate(sets) if j != i)
            if len(sets) > 1
            else None
            for i, own in enumerate(sets)
        ]

    return diversity


def relative_length() -> RewardFunction:
    """Create a reward of length L among the siblings: 1/2 - (L - min) / (max - min); section 2.3.3 of 2501.12599.

    The shortest gets 1/2, the longest -1/2, and all get 0 where lengths are equal. So that short wrong answers earn
    nothing, name the criterion of correctness in `requires`. Use it with `per_group`, as run files do by themselves.
    """

    def relative_length(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        lengths = [len(ids) for ids in completion_ids]
        low, high = min(lengths), max(lengths)
        return [0.5 - (length - low) / (high - low) if high > low else 0.0 for length in lengths]

    return relative_length
