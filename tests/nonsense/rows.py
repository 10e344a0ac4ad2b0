"""Rows of every stage's formats: columns of other types, messages that are none, formats mixed, columns gone."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from burnish.errors import ModelError
from nonsense.cases import Case
from test_nonsense import HALF, build, chat, good, plain, said, user

STAGES = ("sft", "dpo", "kto", "reward", "online_dpo", "grpo")
_ANSWERS = {
    "sft": ("completion",),
    "kto": ("completion",),
    "dpo": ("chosen", "rejected"),
    "reward": ("chosen", "rejected"),
}

_DEEP: Any = "x"
_DEEP_TABLE: Any = "x"
for _ in range(500):
    _DEEP, _DEEP_TABLE = [_DEEP], {"a": _DEEP_TABLE}
_ENDLESS: list[Any] = []
_ENDLESS.append(_ENDLESS)

_NO_TEXT: tuple[Any, ...] = (
    5, 0, -1, 1.5, float("nan"), float("inf"), True, False, b"abc", {}, {"a": 1}, [], [1], [None], ["a"], [["a"]], [[]],
    [{}], [{"a": 1}], 10**5000, _DEEP, _DEEP_TABLE, _ENDLESS, (), ("a",), {"a"}, object(), int, len, Path("x"),
    datetime.datetime(2024, 1, 1), 1j, [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}],
    [{"role": None, "content": "x"}], [{"role": ["user"], "content": "x"}], [{"role": "", "content": "x"}],
    [user("x"), 5], [user("x"), None], [user("x"), {}], [user("x"), []], {"role": "user", "content": "x"},
    [{"from": "martian", "value": "x"}], [{"from": 5, "value": "x"}],
    [[user("x")]], [[user("x")], [user("y")]], HALF, "\ud800", "a\udfffb",
)  # fmt: skip
"""Neither a text nor messages."""

_NO_CONTENT: tuple[Any, ...] = (
    None, 5, 1.5, True, float("nan"), {}, {"type": "text"}, ["a"], [5], [None], [[]], [{}], [{"type": "image"}],
    [{"type": "text"}], [{"type": "text", "text": 5}], HALF, b"x", _DEEP, _DEEP_TABLE, 10**5000,
    [{"type": "image_url", "image_url": "x"}], [{"type": "audio", "audio": "x"}], object(),
)  # fmt: skip

_NO_ROLE: tuple[Any, ...] = (
    None,
    5,
    True,
    "",
    "martian",
    " user",
    "User",
    ["user"],
    {},
    b"user",
    HALF,
    10**5000,
    object(),
)

_NO_TOOLS: tuple[Any, ...] = ("x", 5, True, [5], ["x"], [None], [[]], {"a": 1}, "[", "[5]", "5", _DEEP, b"x", object())

_NO_CALLS: tuple[Any, ...] = (
    "x", 5, True, [5], ["x"], [None], [{}], [{"x": 1}], {"a": 1}, [{"function": 5}], [{"function": {}}], _DEEP,
    [{"function": {"name": 5}}], [{"type": "function"}], object(),
)  # fmt: skip

_NO_LABEL: tuple[Any, ...] = (
    "x",
    "",
    "true",
    2,
    -1,
    0.5,
    float("nan"),
    [],
    {},
    [True],
    b"x",
    10**5000,
    object(),
    _DEEP,
)
_NO_MARGIN: tuple[Any, ...] = ("x", "0.5", float("nan"), float("inf"), True, [], {}, [0.5], b"x", 10**400, 1j, object())

_NO_ROW: tuple[Any, ...] = (
    None, 5, "x", b"x", True, [], [1], ["prompt"], (), set(), object(), {}, {"x": 1}, {1: "a"}, {None: "a"},
    {"Prompt": "a", "Completion": "b"}, {"prompt ": "a"}, {"": "a"}, _DEEP, _DEEP_TABLE,
    {"prompt": None, "completion": None},
    {"input": "a", "target": "b"}, {"instruction": "a", "question": "b", "output": "c"}, {"question": "a", "answer": 5},
    {"instruction": "a", "output": "b", "response": "c"}, {"instruction": "a", "output": "b", "system": "c"},
    {"conversations": [{"from": "martian", "value": "x"}]}, {"input_ids": "x"}, {"input_ids": [1.5], "labels": [1]},
)  # fmt: skip

_ROWS_OF_SFT: tuple[Any, ...] = (
    {"instruction": "a", "output": "b"}, {"instruction": "a", "input": "b", "output": "c"},
    {"question": "a", "answer": "b"}, {"conversations": [{"from": "human", "value": "x"}]},
)  # fmt: skip
"""Good there, and where prompts are sampled, but for a conversation; refused elsewhere."""


def cases() -> Iterator[Case]:
    """One column, message or row at a time, in a data set that is good otherwise."""
    for stage in STAGES:
        for place in (0, 3):
            yield from _of_columns(stage, place)
        yield from _of_messages(stage)
        yield from _of_rows(stage)


def _of_columns(stage: str, place: int) -> Iterator[Case]:
    columns = ["prompt", *_ANSWERS.get(stage, ())]
    for column in columns:
        for i, value in enumerate(_NO_TEXT):
            change = {column: value}
            yield _case("row, column", f"{stage}.{place}.{column} {i} {_label(value)}", stage, plain, place, change)
    for column, values in (("label", _NO_LABEL), ("margin", _NO_MARGIN)):
        if (column == "label" and stage == "kto") or (column == "margin" and stage == "reward"):
            for i, value in enumerate(values):
                name = f"{stage}.{place}.{column} {i} {_label(value)}"
                more = {"margin": 0.5} if column == "margin" else {}
                yield _case("row, column", name, stage, partial(_with, more), place, {column: value})


def _with(more: dict[str, Any], stage: str, i: int = 0) -> dict[str, Any]:
    return {**plain(stage, i), **more}


def _of_messages(stage: str) -> Iterator[Case]:
    for i, content in enumerate(_NO_CONTENT):
        yield _case(
            "row, message", f"{stage} content {i} {_label(content)}", stage, chat, 2, {"prompt": [user(content)]}
        )
        for column in _ANSWERS.get(stage, ()):
            name = f"{stage}.{column} content {i} {_label(content)}"
            yield _case("row, message", name, stage, chat, 2, {column: [said(content)]})
    for i, role in enumerate(_NO_ROLE):
        message = {"role": role, "content": "x"}
        yield _case("row, message", f"{stage} role {i} {_label(role)}", stage, chat, 2, {"prompt": [message]})
    for i, tools in enumerate(_NO_TOOLS):
        if stage in ("sft", "dpo", "grpo"):
            yield _case("row, message", f"{stage} tools {i} {_label(tools)}", stage, chat, 2, {"tools": tools})
    for i, calls in enumerate(_NO_CALLS):
        for column in _ANSWERS.get(stage, ()):
            change = {column: [said("2", tool_calls=calls)]}
            yield _case("row, message", f"{stage}.{column} tool_calls {i} {_label(calls)}", stage, chat, 2, change)


def _of_rows(stage: str) -> Iterator[Case]:
    for i, row in enumerate(_NO_ROW):
        for place in (0, 3):
            rows: list[Any] = good(stage)
            rows[place] = row
            yield Case("row", f"{stage}.{place} {i} {_label(row)}", partial(_build, stage, rows))
        if not (isinstance(row, dict) and row):
            yield Case("data set", f"{stage} {i} {_label(row)}", partial(_build, stage, row))
    for i, row in enumerate(_ROWS_OF_SFT):
        rows = [*good(stage), row]
        is_good = stage == "sft" or (stage in ("grpo", "online_dpo") and "conversations" not in row)
        yield Case("row", f"{stage} {i} {_label(row)}, of SFT", partial(_build, stage, rows), not is_good)
    for column in plain(stage):
        rows = good(stage)
        for place in range(6):
            del rows[place][column]
        # Some stages know a format without that column: a prompt may be implicit.
        yield Case("row", f"{stage} without {column}", partial(_build, stage, rows), None)
        rows = good(stage)
        del rows[3][column]
        yield Case("row", f"{stage} without {column} in one row", partial(_build, stage, rows), None)


def _case(
    family: str, name: str, stage: str, make: Callable[..., dict[str, Any]], place: int, change: dict[str, Any]
) -> Case:
    rows = good(stage, make)
    rows[place] = {**rows[place], **change}
    return Case(family, name, partial(_build, stage, rows), names=f"row {place}")


def _label(value: Any) -> str:
    try:
        return f"{value!r:.40}".encode("ascii", "backslashreplace").decode()
    except (RecursionError, ValueError):
        return type(value).__name__


def _build(stage: str, rows: Any) -> None:
    """Make the trainer; where nothing but the model is missing, the rows were taken for good."""
    try:
        build(stage, Path("out"), rows)
    except ModelError as error:
        if "./nowhere" not in str(error):
            raise
