"""ShareGPT's rows: `from` and `value` in any column of messages, and `conversations` as a name of `messages`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

import tiny
from burnish.data import (
    disjoint,
    load_rows,
    preference_group,
    prompt_group,
    reward_group,
    sft_group,
    sft_groups,
    split_turns,
    unpaired_group,
)
from burnish.errors import DataError

TOKENIZER = tiny.tokenizer()
TALK = [("system", "Add."), ("user", "1+1="), ("assistant", "2"), ("tool", "ok"), ("assistant", "so 2")]
SPEAKERS = {"user": "human", "assistant": "gpt"}


def usual(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


def shared(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": SPEAKERS.get(role, role), "value": text} for role, text in turns]


def row(make: Callable[..., Any], **columns: Any) -> dict[str, Any]:
    """Columns of turns as messages; others as they are."""
    return {
        name: make(*value) if isinstance(value, list) and isinstance(value[0], tuple) else value
        for name, value in columns.items()
    }


ROWS = [
    (sft_group, {"messages": TALK}),
    (sft_groups, {"messages": TALK}),
    (sft_group, {"prompt": TALK[:2], "completion": TALK[2:]}),
    (preference_group, {"prompt": TALK[:2], "chosen": [("assistant", "2")], "rejected": [("assistant", "3")]}),
    (preference_group, {"chosen": TALK[:3], "rejected": [*TALK[:2], ("assistant", "3")]}),
    (unpaired_group, {"prompt": TALK[:2], "completion": [("assistant", "2")], "label": True}),
    (reward_group, {"prompt": TALK[:2], "chosen": [("assistant", "2")], "rejected": [("assistant", "3")]}),
    (prompt_group, {"prompt": TALK[:2], "answer": "2"}),
]


@pytest.mark.parametrize(("encoder", "columns"), ROWS)
def test_from_and_value_equal_role_and_content(encoder: Any, columns: dict[str, Any]) -> None:
    given, expected = row(shared, **columns), row(usual, **columns)
    assert encoder(given, TOKENIZER) == encoder(expected, TOKENIZER), "the row that rewards see is converted too"
    assert given == row(shared, **columns), "rows are left as they were given"


def test_ranked_completions() -> None:
    ranked = [[("assistant", "2")], [("assistant", "3")]]
    given, expected = (
        reward_group({"prompt": make(*TALK[:2]), "completions": [make(*one) for one in ranked]}, TOKENIZER)
        for make in (shared, usual)
    )
    assert [c.token_ids for c in given.completions] == [c.token_ids for c in expected.completions]


@pytest.mark.parametrize("make", [shared, usual])
@pytest.mark.parametrize("options", [{}, {"assistant_only_loss": True}])
def test_conversations_are_messages(make: Callable[..., Any], options: dict[str, Any]) -> None:
    found = sft_group({"conversations": make(*TALK)}, TOKENIZER, **options)
    assert found.completions == sft_group({"messages": usual(*TALK)}, TOKENIZER, **options).completions
    turns = split_turns({"conversations": make(*TALK), "id": 7})
    assert turns == split_turns({"messages": usual(*TALK), "id": 7})


def test_rows_that_arrow_filled_with_none() -> None:
    mixed = [*shared(*TALK[:2]), *usual(*TALK[2:])]
    given = Dataset.from_list([{"conversations": mixed, "text": None}, {"conversations": None, "text": "x"}])[0]
    assert {"role", "from"} <= given["conversations"][0].keys()
    assert sft_group(given, TOKENIZER).completions == sft_group({"messages": usual(*TALK)}, TOKENIZER).completions


def test_unknown_speakers_are_refused() -> None:
    with pytest.raises(DataError, match="row 3: role = 'function_call': neither one of"):
        sft_group({"conversations": [*shared(*TALK[:2]), {"from": "function_call", "value": "{}"}]}, TOKENIZER, index=3)


def test_prompts_from_files(tmp_path: Any) -> None:
    """System prompts, templates and held-out prompts know the speakers too."""
    for name, make in (("shared", shared), ("usual", usual)):
        Dataset.from_list([{"prompt": make(*TALK[1:2])}]).to_json(tmp_path / f"{name}.jsonl")
    found, expected = (
        load_rows({"path": str(tmp_path / f"{name}.jsonl"), "prompt_template": "? {prompt}", "system_prompt": "Add."})
        for name in ("shared", "usual")
    )
    assert found == expected
    rows = [{"conversations": shared(*TALK)}, {"conversations": shared(("user", "2+2="), ("assistant", "4"))}]
    assert disjoint(rows, [{"prompt": usual(*TALK[:2])}])[0] == rows[1:]
