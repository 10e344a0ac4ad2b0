"""Rows of instructions and answers in SFT: what is read as the prompt and the completion, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish.data import disjoint, encode_rows, load_rows, prompt_group, sft_group, sft_groups
from burnish.errors import ConfigError, DataError
from test_nonsense import build, said, tokenizer, user

TEMPLATED = tiny.tokenizer()
BARE = tokenizer(chat_template=None)
ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (ALPACA, "Add.\n\n1+1"),
        ({"instruction": "1+1=", "input": "", "output": "2"}, "1+1="),
        ({"instruction": "1+1=", "input": None, "output": "2"}, "1+1="),
        ({"instruction": "1+1=", "output": "2"}, "1+1="),
        ({"instruction": "1+1=", "response": "2"}, "1+1="),
        ({"instruction": "Add.", "context": "1+1", "response": "2", "category": "x"}, "Add.\n\n1+1"),
        ({"question": "1+1=", "answer": "2"}, "1+1="),
        ({"question": "1+1=", "answer": "2", "instruction": None, "output": None, "prompt": None}, "1+1="),
        ({"question": "1+1=", "answer": "2", "history": [], "system": ""}, "1+1="),
    ],
)
@pytest.mark.parametrize("options", [{}, {"completion_only_loss": False}, {"max_length": 3}])
def test_a_prompt_and_its_completion(row: dict[str, Any], prompt: str, options: dict[str, Any]) -> None:
    given = dict(row)
    chat = {"prompt": [user(prompt)], "completion": [said("2")]}
    plain = {"prompt": prompt, "completion": "2"}
    for processing_class, expected in ((TEMPLATED, chat), (BARE, plain)):
        found, wanted = (sft_group(one, processing_class, **options) for one in (row, expected))
        assert (found.prompt_ids, found.completions) == (wanted.prompt_ids, wanted.completions)
        assert {name: found.row[name] for name in expected} == expected
    template = {"chat_template": tiny.TEMPLATE}
    assert sft_group(row, BARE, **template).prompt_ids == sft_group(chat, BARE, **template).prompt_ids
    assert row == given, "rows are left as they were given"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "question": "b", "output": "c"},
        {"instruction": "a", "output": "b", "response": "c"},
        {"question": "a", "answer": "b", "output": "c"},
        {"question": "a", "input": "b", "context": "c", "answer": "d"},
        {"question": "a", "answer": 5},
        {"question": "a", "answer": ["b"]},
        {"question": "a", "input": 5, "answer": "b"},
        {"instruction": "", "output": "b"},
        {"question": [user("a")], "answer": "b"},
        {"question": "a"},
        {"answer": "b"},
    ],
)
def test_rows_that_can_be_read_in_two_ways_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 3 has the columns .*stage 'sft' needs prompt \+ completion"):
        sft_group(row, TEMPLATED, index=3)


def test_answers_that_are_numbers_are_named() -> None:
    with pytest.raises(DataError, match=r": answer = 4\.5 is a number, not text; write it in quotes\.$"):
        sft_group({"question": "a", "answer": 4.5}, TEMPLATED)


@pytest.mark.parametrize("name", ["history", "system"])
def test_earlier_turns_are_not_lost(name: str) -> None:
    with pytest.raises(DataError, match=f"row 3 has {name} beside instruction and input and output, which would be"):
        sft_group({**ALPACA, name: "Be kind."}, TEMPLATED, index=3)


@pytest.mark.parametrize("text", [{"text": "x"}, {"messages": [user("a"), said("b")]}])
def test_columns_of_ours_come_first(text: dict[str, Any]) -> None:
    assert sft_group({**ALPACA, **text}, TEMPLATED).completions == sft_group(text, TEMPLATED).completions
    with pytest.raises(DataError, match="needs prompt"):
        sft_group({"prompt": "a", "question": "a", "answer": "b"}, TEMPLATED)


def test_prompts_are_read_from_questions() -> None:
    """Rewards still see every column, and no completion that nobody named so."""
    for row, prompt in (({"question": "1+1=", "answer": "2"}, "1+1="), (ALPACA, "Add.\n\n1+1")):
        for processing_class, expected in ((TEMPLATED, [user(prompt)]), (BARE, prompt)):
            found = prompt_group(row, processing_class)
            assert found.prompt_ids == prompt_group({"prompt": expected}, processing_class).prompt_ids
            assert found.row == {**row, "prompt": expected}


def test_other_stages_ask_for_names() -> None:
    with pytest.raises(
        DataError, match=r'needs prompt: rename columns \(in a source: `columns = \{ question = "prompt"'
    ):
        prompt_group({"question": "1+1=", "solution": "2"}, TEMPLATED)
    with pytest.raises(DataError, match=r"; input is not part of the prompt then: write both into one\.$"):
        prompt_group({"instruction": "Add.", "input": "1+1", "solution": "2"}, TEMPLATED)


def test_one_line_says_how_rows_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "1+1=", "answer": "2"}] * 3
    encode_rows(sft_groups, rows, TEMPLATED, name="train_dataset")
    encode_rows(sft_groups, [*rows, {"prompt": "a", "completion": "b"}], BARE)
    encode_rows(sft_groups, [{"prompt": "a", "completion": "b"}], BARE)
    encode_rows(prompt_group, rows, BARE)
    assert capsys.readouterr().err.splitlines() == [
        "[burnish] train_dataset: 3 of 3 rows: prompts are read from question, completions from answer, as messages of "
        "user and assistant",
        "[burnish] 3 of 4 rows: prompts are read from question, completions from answer, as plain texts",
        "[burnish] 3 of 3 rows: prompts are read from question, as plain texts",
    ]


def test_the_end_of_a_pair_is_not_split_off() -> None:
    with pytest.raises(ConfigError, match="truncation_mode = 'split', but row 0 has a prompt and a completion"):
        sft_groups(ALPACA, TEMPLATED, max_length=5, truncation_mode="split")


def test_prompts_of_such_rows_in_files(tmp_path: Path) -> None:
    """Templates, system prompts and held-out prompts find them."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ALPACA) + "\n")
    source = {"path": str(file), "prompt_template": "Q: {prompt}"}
    assert load_rows(source) == [{**ALPACA, "prompt": "Q: Add.\n\n1+1", "completion": "2"}]
    talk = {"prompt": [{"role": "system", "content": "S"}, user("Add.\n\n1+1")], "completion": [said("2")]}
    assert load_rows({"path": str(file), "system_prompt": "S"}) == [{**ALPACA, **talk}]
    other = {**ALPACA, "input": "2+2"}
    assert disjoint([ALPACA, other], [{"prompt": "Add. 1+1"}])[0] == [other]


def test_a_trainer_learns_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build("sft", tmp_path, [ALPACA] * 4, tiny.model(), eval_dataset=[ALPACA])
    assert trainer.train().training_loss > 0
    said_lines = [line for line in capsys.readouterr().err.splitlines() if "are read from" in line]
    assert [line.split(":")[0] for line in said_lines] == ["[burnish] train_dataset", "[burnish] eval_dataset"]
