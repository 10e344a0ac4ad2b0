"""Verifiable instructions and languages: each check on a text that follows it and on one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.errors import ConfigError, RewardError
from burnish.rewards import rubric_from_config
from burnish.rewards.instructions import CHECKS, instructions_followed
from burnish.rewards.languages import language_is
from test_rewards_rubric import group

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["sea", "a.b"]}, ["The Sea, a.b."], ["The seas, a.b", "sea", "sea axb"]),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "at least"}, ["No, no."], ["no", "nono no"]),
    ("keywords:frequency", {"keyword": "no", "frequency": 2, "relation": "less than"}, ["no", "x"], ["no no"]),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, ["badly", "good"], ["Bad!", "so bad"]),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 3, "let_relation": "at least"},
        ["eEe", "needle"],
        ["ee"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["A b. C d!", 'He said "no." Go.'],
        ["One only.", "Dr. Smith sleeps.", "No end"],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a***b***c"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["it's well-known"],
        ["one two three"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a b\n\n'then c"],
        ["a\n\nb then", "a\n\nthen\n\nc", "then"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] and [place]"], ["[name]", "[] []"]),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Hi.\nP.S. more", "Hi p. s. more"],
        ["Hi", "P.S."],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Hi.\nP.P.S more"], ["Hi.\nP.S. more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "**a**\n**b**"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["yes", "my answer is perhaps."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and **b**", "*a b* *c*"],
        ["*a*", "** **", "* a\n* b"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1", "section 1 section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a}", "text"]),
    ("detectable_format:title", {}, ["<<A title>>\ntext"], ["<A>", "<<>>", "<< >>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "a******"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, ["say it. Done"], ["Done. Say it."]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. the END.", '"The end."\n'], ["The end. Or not."]),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ["a", '"', '"a" b']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THE SEA is"],
        ["THE sea", "The Sea"],
    ),
    ("change_case:english_capital", {}, ["ALL OF IT, 3!"], ["Not ALL"]),
    ("change_case:english_lowercase", {}, ["all of it, 3!"], ["Not all"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


def followed(names: list[str], arguments: list[Any], *texts: str, **options: Any) -> list[Any]:
    size = len(texts)
    columns = {"instruction_id_list": [names] * size, "kwargs": [arguments] * size}
    return instructions_followed(**options)(completions=list(texts), **columns)


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_each_instruction(name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    given = [{**arguments, "unused": None}]
    assert followed([name], given, *right) == [1.0] * len(right)
    assert followed([name], given, *wrong, "", " \n") == [0.0] * (len(wrong) + 2)


def test_every_check_has_a_case() -> None:
    assert CHECKS.keys() == {case[0] for case in CASES} | {"language:response_language"}


def test_part_of_the_instructions_earns_a_part() -> None:
    names, arguments = ["punctuation:no_comma", "change_case:english_lowercase"], [None, {}]
    assert followed(names, arguments, "a b", "A b", "A, b") == [1.0, 0.5, 0.0]
    assert followed(names, arguments, "a b", "A b", partial_credit=False) == [1.0, 0.0]


def test_bad_rows_exclude_their_completion() -> None:
    for names, arguments in (
        (["no:such"], [{}]),
        (["punctuation:no_comma"], []),
        ([], []),
        (["keywords:frequency"], [{"keyword": "a"}]),
        (["punctuation:no_comma"], [{"more": 1}]),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1, "relation": "about"}]),
    ):
        (value,) = followed(names, arguments, "a")
        assert isinstance(value, RewardError | TypeError)
    values = instructions_followed()(completions=["a"], instruction_id_list=[None], kwargs=[None])
    assert values == [None]
    with pytest.raises(RewardError, match="kwargs"):
        instructions_followed()(completions=["a"], instruction_id_list=[["punctuation:no_comma"]])
    with pytest.raises(ConfigError, match="column"):
        instructions_followed(column="")


ENGLISH = "The weather was fine, so we walked along the river until the sun went down."
GERMAN = "Das Wetter war schön, also gingen wir am Fluss entlang, bis die Sonne unterging."


def test_languages() -> None:
    pytest.importorskip("py3langid")
    assert language_is(language="en")(completions=[ENGLISH, GERMAN, ""]) == [1.0, 0.0, 0.0]
    values = language_is(column="code")(completions=[ENGLISH, GERMAN, GERMAN, "x"], code=["en", "de", None, "xx"])
    assert values[:3] == [1.0, 1.0, None]
    assert isinstance(values[3], RewardError)
    assert followed(["language:response_language"], [{"language": "de"}], GERMAN, ENGLISH) == [1.0, 0.0]
    for options in ({}, {"language": "en", "column": "c"}, {"language": "xx"}):
        with pytest.raises(ConfigError, match="language"):
            language_is(**options)


def test_run_files_take_them() -> None:
    rubric = rubric_from_config([{"kind": "instructions"}])
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"keywords": None}]}
    assert [score.total for score in rubric.score([group("a", "a, b", **row)])[0]] == [1.0, 0.0]
