"""Reward functions of texts: choices, JSON, patterns, lengths, quotations, and completions against their siblings."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import Rubric, rubric_from_config
from burnish.rewards.texts import (
    diversity,
    json_answer,
    length_between,
    multiple_choice,
    quotes_prompt,
    regex_match,
    relative_length,
)
from test_rewards_rubric import group

CHOICES = ["Paris", "Rome", "the city of London", "12"]


def choose(text: str, gold: Any = "B", choices: Any = None) -> Any:
    verifier = multiple_choice(sources=("text",), choices_column=None if choices is None else "choices")
    (value,) = verifier([""], [text], answer=[gold], choices=[choices])
    return value


@pytest.mark.parametrize(
    "text",
    ["B", "b", "(B)", "[B]", "B.", "B)", "**B**", "$B$", r"\text{B}", r"$\textbf{(B)}$", "`B`", "The answer is B",
     "the correct answer is (B).", "Option B", "Answer: B", " B "],
)  # fmt: skip
def test_a_label_is_read_as_people_write_it(text: str) -> None:
    assert choose(text) == 1.0
    assert choose(text, gold="A") == 0.0


@pytest.mark.parametrize("text", ["A or B", "A, B", "AB", "B and C", "not B", "", "Brazil", "B is wrong", "(B", "A B"])
def test_no_single_label_is_no_answer(text: str) -> None:
    assert choose(text) == 0.0


@pytest.mark.parametrize("choices", [CHOICES, dict(zip("ABCD", CHOICES, strict=True))])
def test_texts_of_choices_count_too(choices: Any) -> None:
    for text in ("Rome", "rome.", "B) Rome", "B: rome", "(B) Rome", "**B. Rome**"):
        assert choose(text, choices=choices) == 1.0, text
    for text in ("Paris", "B) Paris", "A) Rome", "London", "B Rome or Paris", "Rome, Paris"):
        assert choose(text, choices=choices) == 0.0, text
    assert choose("the city of London", gold="C", choices=choices) == 1.0
    assert choose("B", gold="Rome", choices=choices) == 1.0
    assert choose("12", gold="D", choices=choices) == 1.0


def test_a_gold_that_is_no_choice_excludes_the_completion() -> None:
    assert isinstance(choose("B", gold="Madrid", choices=CHOICES), RewardError)
    assert isinstance(choose("B", gold="E", choices=CHOICES), RewardError)
    assert isinstance(choose("B", gold="none of them"), RewardError)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "a", "age": 3}', 1.0),
        (' {"name": "a"}\n', 1.0),
        ('Here it is:\n```json\n{"name": "a"}\n```\nDone.', 1.0),
        ('```\n{"name": "a"}\n```', 1.0),
        ('{"name": "a", "age": -1}', 0.0),
        ('{"age": 3}', 0.0),
        ('{"name": "a", "b": 1}', 0.0),
        ('{"name": "a"} and more', 0.0),
        ("{'name': 'a'}", 0.0),
        ('{"name": "a", "age": NaN}', 0.0),
        ("", 0.0),
        ('```json\n{"name": "a"}\n```\n```json\n{"name": "b"}\n```', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_follows_its_schema(text: str, value: float) -> None:
    pytest.importorskip("jsonschema")
    assert json_answer(schema=SCHEMA)(completions=[text]) == [value]


def test_json_schemas_of_rows() -> None:
    pytest.importorskip("jsonschema")
    function = json_answer(column="schema")
    texts, schemas = ["3", '"x"', "3", "3", "3"], ['{"type": "integer"}', {"type": "integer"}, None, "{", '{"type": 5}']
    values = function(completions=texts, schema=schemas)
    assert values[:3] == [1.0, 0.0, None]
    assert all(isinstance(value, RewardError) for value in values[3:])
    with pytest.raises(RewardError, match="column 'schema'"):
        function(completions=["3"])
    with pytest.raises(ConfigError, match="schema of json_answer"):
        json_answer(schema={"type": 5})
    with pytest.raises(ConfigError, match="column"):
        json_answer(schema={}, column="schema")


def test_patterns() -> None:
    search, whole = regex_match(pattern=r"\d+.end"), regex_match(pattern=r"\d+", whole=True)
    assert search(completions=["a 12\nend b", "end"]) == [1.0, 0.0]
    assert whole(completions=[" 12 ", "12 a"]) == [1.0, 0.0]
    values = regex_match(column="p")(completions=["ab", "ab", "ab"], p=["a", None, "("])
    assert values[:2] == [1.0, None]
    assert isinstance(values[2], RewardError)
    for options in ({}, {"pattern": "a", "column": "p"}, {"pattern": "("}):
        with pytest.raises(ConfigError, match="regex_match"):
            regex_match(**options)


def test_a_pattern_that_takes_for_ever_ends_at_the_limit() -> None:
    rubric = rubric_from_config([{"kind": "regex", "pattern": "(a+)+$", "timeout_seconds": 0.3}])
    scores = rubric.score([group("a" * 40 + "b", "aaa")])[0]
    assert scores[0].total is None
    assert "timeout_seconds" in scores[0].errors["regex"]
    assert scores[1].total == 1.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"most": 3}, [1, 1, 0]),
        ({"least": 2, "most": 3}, [0, 1, 0]),
        ({"least": 2, "most": 3, "slack": 4}, [0.75, 1, 0.5]),
        ({"most": 2, "unit": "words"}, [1, 1, 1]),
        ({"least": 4, "most": 5, "unit": "characters"}, [0, 0, 1]),
    ],
)
def test_lengths(options: dict[str, Any], expected: list[float]) -> None:
    texts, ids = ["a", "a b", "a b c"], [[1], [1, 2], [1, 2, 3, 4, 5]]
    if options.get("unit") == "words":
        texts = ["a", "b", "a b"]
    assert length_between(**options)(completions=texts, completion_ids=ids) == expected
    with pytest.raises(ConfigError, match="unit"):
        length_between(most=3, unit="lines")
    with pytest.raises(ConfigError, match="least"):
        length_between(least=4, most=3)


def test_quotations_stand_in_their_source() -> None:
    prompt = "The quick  brown fox\njumps over the lazy dog."
    texts = [
        'It says "the quick brown fox" clearly.',
        "It says \u201cquick brown FOX jumps\u201d and <quote>over the lazy cat</quote>.",
        'It says "fox" only.',
        "No quotation.",
    ]
    assert quotes_prompt()(prompts=[prompt] * 4, completions=texts) == [1.0, 0.5, 0.0, 0.0]
    chat = [{"role": "system", "content": None}, {"role": "user", "content": prompt}]
    assert quotes_prompt(least_quotes=2)(prompts=[chat] * 2, completions=texts[:2]) == [0.0, 0.5]
    assert quotes_prompt(column="text")(prompts=["", ""], completions=texts[:2], text=[prompt, None]) == [1.0, None]
    with pytest.raises(ConfigError, match="least_words"):
        quotes_prompt(least_words=0)


def test_diversity_by_hand() -> None:
    # Bigrams {12, 23}, {12, 24}, {56}: Jaccard 1/3, 0, 0.
    values = diversity(ngram_size=2)(completion_ids=[[1, 2, 3], [1, 2, 4], [5, 6]])
    third = (1 / 3, 0.0, 0.0)
    assert values == pytest.approx([1 - third[0] / 2, 1 - third[0] / 2, 1.0])
    assert diversity()(completion_ids=[[1, 2, 3, 4]] * 2) == [0.0, 0.0]
    assert diversity()(completion_ids=[[1], [2], []]) == [1.0, 1.0, 1.0]
    assert diversity()(completion_ids=[[1, 2]]) == [None]


def test_relative_length_by_hand() -> None:
    assert relative_length()(completion_ids=[[1], [1, 1], [1] * 5]) == [0.5, 0.25, -0.5]
    assert relative_length()(completion_ids=[[1, 2], [3, 4]]) == [0.0, 0.0]


def test_run_files_compare_the_completions_of_a_prompt() -> None:
    rubric = rubric_from_config([{"kind": "relative_length", "requires": ["one"]}, {"kind": "regex", "name": "one",
        "pattern": "a", "weight": 0}])  # fmt: skip
    assert rubric.criteria[0].per_group
    scores = rubric.score([group("a", "aaa", "b"), group("aa", "aa")])
    assert [score.total for row in scores for score in row] == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert isinstance(rubric, Rubric)


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kind": "choice", "choices_column": 3}, "choices_column"),
        ({"kind": "json", "schema": "x"}, "schema"),
        ({"kind": "length"}, "most is missing"),
        ({"kind": "regex", "pattern": 3}, "pattern"),
        ({"kind": "repetition", "ngram_size": 0}, "ngram_size"),
        ({"kind": "diversity", "ngram_size": 0}, "ngram_size"),
    ],
)
def test_bad_options_in_files_are_named(entry: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"rubric\[0\].*{named}"):
        rubric_from_config([entry])
