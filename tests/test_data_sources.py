"""Formats and sources: what is accepted, what is refused and in which words; held-out rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.data import Kind, as_rows, check_source, detect_format, disjoint, load_rows, split_turns, unpair
from burnish.data.formats import row_template_kwargs, row_tools
from burnish.errors import ConfigError, DataError

USER = [{"role": "user", "content": "q"}]
BOT = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "stage", "kind", "conversational", "columns"),
    [
        ({"text": "x"}, "sft", Kind.LANGUAGE_MODELING, False, ("text",)),
        ({"messages": USER}, None, Kind.LANGUAGE_MODELING, True, ("messages",)),
        ({"messages": USER, "prompt": "x"}, None, Kind.LANGUAGE_MODELING, True, ("messages",)),
        ({"messages": USER, "prompt": "x"}, "sft", Kind.LANGUAGE_MODELING, True, ("messages",)),
        ({"prompt": "x", "completion": "y"}, "sft", Kind.PROMPT_COMPLETION, False, ("prompt", "completion")),
        ({"prompt": USER, "completion": BOT}, None, Kind.PROMPT_COMPLETION, True, ("prompt", "completion")),
        ({"prompt": "x", "answer": "4"}, None, Kind.PROMPT_ONLY, False, ("prompt",)),
        ({"prompt": USER, "completion": "gold"}, "prompt", Kind.PROMPT_ONLY, True, ("prompt",)),
        (
            {"prompt": "x", "chosen": "y", "rejected": "z"},
            None,
            Kind.PREFERENCE,
            False,
            ("prompt", "chosen", "rejected"),
        ),
        (
            {"prompt": None, "chosen": "y", "rejected": "z"},
            "preference",
            Kind.PREFERENCE,
            False,
            ("chosen", "rejected"),
        ),
        ({"prompt": "x", "completion": "y", "label": 0}, None, Kind.UNPAIRED, False, ("prompt", "completion")),
        (
            {"prompt": "x", "completion": "y", "label": True},
            "sft",
            Kind.PROMPT_COMPLETION,
            False,
            ("prompt", "completion"),
        ),
    ],
)
def test_format(row: Any, stage: str | None, kind: Kind, conversational: bool, columns: tuple[str, ...]) -> None:
    found = detect_format(row, stage=stage)
    assert (found.kind, found.conversational, found.columns) == (kind, conversational, columns)


@pytest.mark.parametrize(
    ("row", "stage", "message"),
    [
        (
            {"question": "x"},
            "sft",
            r"row 3 has the columns \['question'\]; stage 'sft' needs prompt \+ completion \| messages \| text",
        ),
        ({"prompt": "x"}, "preference", r"stage 'preference' needs chosen \+ rejected"),
        ({"prompt": "x", "completion": "y"}, "unpaired", r"needs prompt \+ completion \+ label"),
        ({"text": None}, None, r"row 3 has the columns \[\]; burnish needs"),
        ({"text": "x", "messages": USER}, "sft", r"fits more than one format \(messages or text\)"),
        ({"prompt": "x", "completion": "y", "chosen": "c", "rejected": "r"}, None, "fits more than one format"),
        ({"prompt": USER, "completion": "y"}, "sft", "prompt is messages, completion is a string"),
        ({"text": ""}, "sft", "text is empty"),
        ({"text": 5}, "sft", "text = 5: use a string, or a non-empty list of messages"),
        ({"messages": []}, "sft", r"messages = \[\]: use a string"),
        ({"messages": [{"from": "human"}]}, "sft", "a message without content"),
        ({"messages": [{"value": "hi"}]}, "sft", "which is not a message"),
        ({"messages": USER, "conversations": USER}, "sft", r"fits more than one format \(messages or conversations\)"),
        ({"prompt": "x", "completion": "y", "label": "yes"}, "unpaired", "label = 'yes': use true"),
    ],
)
def test_format_errors(row: Any, stage: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect_format(row, stage=stage, index=3)


def test_unknown_stage() -> None:
    with pytest.raises(ConfigError, match="stage = 'dpo': use one of preference, prompt, sft, unpaired"):
        detect_format({"text": "x"}, stage="dpo")


def test_tools_and_template_variables() -> None:
    schema = {"name": "f", "parameters": {"a": None, "b": 1}}
    clean = [{"name": "f", "parameters": {"b": 1}}]
    for tools in ([schema], json.dumps([schema]), [json.dumps(schema)]):
        assert row_tools({"tools": tools}) == clean
    assert row_tools({}) is None
    assert row_tools({"tools": "[]"}) is None
    assert row_template_kwargs({"chat_template_kwargs": {"a": 1, "b": None}}) == {"a": 1}
    for row, message in (
        ({"tools": "{"}, "row 2: tools = '{' is not JSON"),
        ({"tools": {"a": 1}}, "use a list of JSON schemas"),
        ({"tools": [1]}, "each tool must be a JSON schema"),
    ):
        with pytest.raises(DataError, match=message):
            row_tools(row, 2)
    with pytest.raises(DataError, match="chat_template_kwargs = 3: use a mapping"):
        row_template_kwargs({"chat_template_kwargs": 3})


def test_split_turns_and_unpair() -> None:
    rows = split_turns({"messages": [*USER, *BOT, *USER, *BOT], "id": 1})
    assert rows == [
        {"id": 1, "prompt": USER, "completion": BOT},
        {"id": 1, "prompt": [*USER, *BOT, *USER], "completion": BOT},
    ]
    assert [(r["completion"], r["label"]) for r in unpair({"prompt": "p", "chosen": "c", "rejected": "r"})] == [
        ("c", True),
        ("r", False),
    ]
    with pytest.raises(DataError, match=r"lacks \['rejected'\]"):
        unpair({"prompt": "p", "chosen": "c"})
    with pytest.raises(DataError, match="needs a messages or conversations column"):
        split_turns({"text": "x"})


def test_files(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b, c", "answer": "2"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "x.csv").write_text('prompt,answer\na,1\n"b, c",2\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        assert load_rows({"path": str(tmp_path / f"x.{suffix}")}) == rows
    assert load_rows({"path": str(tmp_path / "x.j*")}) == rows + rows
    assert load_rows({"path": tmp_path / "x.json", "limit": 1, "columns": {"answer": "gold"}}) == [
        {"prompt": "a", "gold": "1"}
    ]


def test_a_path_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt;answer\na;1\n")
    row = {"prompt": "a", "answer": "1"}
    for path in (file, str(file)):
        check_source(path)
        assert load_rows(path) == as_rows(path) == [row]
    assert load_rows({"mix": [str(file), {"path": str(file), "columns": {"answer": "gold"}}]})[0] == row
    for call in (load_rows, as_rows):
        with pytest.raises(ConfigError, match=r"data\.path = '.*y\.csv': no such file; .* it has 'x\.csv'"):
            call(str(tmp_path / "y.csv"))


def test_a_folder_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `load_dataset` reads it."""
    (tmp_path / "train.csv").write_text("prompt,completion\na,b\n")
    assert load_rows(str(tmp_path)) == [{"prompt": "a", "completion": "b"}]
    (tmp_path / "test.csv").write_text("prompt,completion\nc,d\n")
    assert load_rows({"path": str(tmp_path), "split": "test"}) == [{"prompt": "c", "completion": "d"}]
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match=r"data\.split = None: the data set has the splits train, test; set one"):
        load_rows(str(tmp_path))
    with pytest.raises(ConfigError, match=r"nor read its files \(.*trian.*\['train', 'test'\]"):
        load_rows({"path": str(tmp_path), "split": "trian"})
    with pytest.raises(
        ConfigError,
        match=r"data\.name = 'main': only folders and data sets on the hub have a name, not the file .*; drop name",
    ):
        load_rows({"path": str(tmp_path / "test.csv"), "name": "main"})


def test_saved_data_set(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    data.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": data})
    splits.save_to_disk(str(tmp_path / "two"))
    assert load_rows({"path": str(tmp_path / "one")}) == [{"text": "a"}, {"text": "b"}]
    assert load_rows({"path": str(tmp_path / "two"), "split": "train"}) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ConfigError, match=r"data\.split = None: the data set has the splits train"):
        load_rows({"path": str(tmp_path / "two")})
    with pytest.raises(ConfigError, match="has no splits"):
        load_rows({"path": str(tmp_path / "one"), "split": "train"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="datasets can neither load this folder from disk nor read its files"):
        load_rows({"path": str(tmp_path / "empty")})
    assert as_rows(data) is data
    assert as_rows(data.to_iterable_dataset()) is not None
    with pytest.raises(ConfigError, match=r"train_dataset is a dict of splits \['train'\]"):
        as_rows(splits, "train_dataset")


def test_bad_files(tmp_path: Path) -> None:
    def write(name: str, text: str) -> dict[str, Any]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return {"path": str(tmp_path / name)}

    for spec, error, message in (
        (write("a.jsonl", '{"a": 1}\n{'), DataError, r"a\.jsonl:2 is not JSON"),
        (write("b.jsonl", "[1]"), DataError, r"b\.jsonl:1 is a list: each row must be an object"),
        (write("c.json", '{"a": 1}'), DataError, "the file holds a dict"),
        (write("d.csv", "a,b\n1\n"), DataError, "row 2 has more or fewer cells"),
        (write("e.txt", "x"), ConfigError, r"e\.txt': use one of \.csv, \.json, \.jsonl, \.parquet"),
        (write("f.jsonl", ""), DataError, "has no rows"),
        ({"path": "nowhere/*.json"}, ConfigError, r"data.path = 'nowhere/\*.json': no such file"),
        (
            {**write("g.json", "[]"), "split": "train"},
            ConfigError,
            "only folders and data sets on the hub have a split",
        ),
    ):
        with pytest.raises(error, match=message):
            load_rows(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"train has the keys \[\]: give exactly one of path"),
        ({"path": "x", "mix": []}, "give exactly one of path"),
        (
            {"path": "x", "paths": "y"},
            "train.paths is unknown: a source with path takes columns, completion_template, environment, limit, name",
        ),
        ({"path": 3}, "train.path = 3: use a str or Path"),
        ({"path": "x", "limit": True}, "train.limit = True: use a int"),
        ({"path": "x", "limit": 0}, "train.limit = 0: use a positive number"),
        ({"source": "gsm8k", "task": "x", "size": 3}, "train.source = 'gsm8k': use 'reasoning_gym'"),
        ({"source": "reasoning_gym", "size": 3}, "train.task is missing"),
        ({"mix": []}, "train.mix is empty"),
        ({"mix": "x"}, "train.mix = 'x'"),
        ({"mix": [3]}, r"train.mix\[0\] = 3: use a source"),
        ({"mix": [""]}, r"train.mix\[0\].path = '': it is empty; give a path"),
        ("", "train.path = '': it is empty; give a path"),
        ({"path": "x", "name": ""}, "train.name = '': it is empty; give a path"),
        ({"mix": [{"path": 3}]}, r"train.mix\[0\].path = 3"),
        ({"path": "x", "prompt_template": "hi"}, r"has the placeholders \[\]: use \{prompt\} and nothing else"),
        ({"path": "x", "prompt_template": "{prompt} {"}, "write literal braces as"),
    ],
)
def test_spec_errors(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_source(spec, "train")


def test_reasoning_gym() -> None:
    spec = {"source": "reasoning_gym", "task": "chain_sum", "size": 5, "seed": 1, "options": {"max_terms": 3}}
    rows = load_rows(spec)
    assert len(rows) == 5
    assert rows == load_rows(spec)
    assert rows != load_rows({**spec, "seed": 2})
    first = rows[0]
    assert set(first) == {"prompt", "answer", "gym_task", "gym_entry"}
    entry = json.loads(first["gym_entry"])
    assert first["prompt"] == [{"role": "user", "content": entry["question"]}]
    assert (first["answer"], first["gym_task"]) == (entry["answer"], "chain_sum")

    import reasoning_gym

    verifier = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    assert verifier.score_answer(first["answer"], entry) == 1.0
    with pytest.raises(ConfigError, match="refuses task = 'no_task'"):
        load_rows({**spec, "task": "no_task"})
    with pytest.raises(ConfigError, match=r"options = \{'max_words': 3\}"):
        load_rows({**spec, "options": {"max_words": 3}})


def test_mix_template_and_system_prompt(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps([{"prompt": "2+2 {x}?", "completion": "4"}]), encoding="utf-8")
    gym = {"source": "reasoning_gym", "task": "chain_sum", "size": 1, "prompt_template": "{prompt} Go."}
    rows = load_rows({"mix": [{"path": str(file), "prompt_template": "Q: {prompt} {{}}"}, gym], "system_prompt": "S"})
    assert rows[0] == {
        "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: 2+2 {x}? {}"}],
        "completion": [{"role": "assistant", "content": "4"}],
    }
    assert [m["role"] for m in rows[1]["prompt"]] == ["system", "user"]
    assert rows[1]["prompt"][1]["content"].endswith(" Go.")
    with pytest.raises(DataError, match="row 0 has a system message and system_prompt is set"):
        load_rows({"mix": [{"path": str(file), "system_prompt": "A"}], "system_prompt": "B"})
    with pytest.raises(DataError, match=r"row 0 has no prompt for prompt_template or system_prompt; it has"):
        load_rows({"path": str(file), "columns": {"prompt": "q"}, "system_prompt": "B"})
    with pytest.raises(DataError, match="row 0 has no column 'z'"):
        load_rows({"path": str(file), "columns": {"z": "q"}})
    with pytest.raises(DataError, match="already has a column 'completion'"):
        load_rows({"path": str(file), "columns": {"prompt": "completion"}})


def test_as_rows() -> None:
    rows = [{"text": "x"}]
    assert as_rows(rows) is rows
    with pytest.raises(ConfigError, match=r"eval = b'x\.json': use a list of rows"):
        as_rows(b"x.json", "eval")
    with pytest.raises(ConfigError, match="exactly one of path"):
        as_rows({"text": "x"})


def test_disjoint() -> None:
    system = {"role": "system", "content": "Other."}
    train = [{"prompt": "a  b", "n": 0}, {"prompt": "c", "n": 1}, {"prompt": "c ", "n": 2}, {"prompt": "d", "n": 3}]
    held = [{"prompt": [system, {"role": "user", "content": "a b"}]}, {"prompt": "zzz"}]
    kept, counts = disjoint(train, held)
    assert [row["n"] for row in kept] == [1, 3]
    assert (counts.num_kept, counts.num_in_evaluation, counts.num_repeated) == (2, 1, 1)
    conversations = [{"messages": [*USER, *BOT]}, {"messages": [*USER, {"role": "assistant", "content": "other"}]}]
    assert disjoint(conversations, [])[1].num_repeated == 1
    with pytest.raises(DataError, match="every training prompt is also an evaluation prompt"):
        disjoint([{"prompt": "q"}], [{"prompt": USER}])
    with pytest.raises(DataError, match=r"row 0 has the columns \['chosen'\]"):
        disjoint([{"chosen": "q"}], [])


def test_generated_tasks_can_be_held_out() -> None:
    spec = {
        "source": "reasoning_gym",
        "task": "chain_sum",
        "options": {"min_digits": 1, "max_digits": 1, "max_terms": 2},
    }
    held = load_rows({**spec, "size": 20, "seed": 0})
    kept, counts = disjoint(load_rows({**spec, "size": 200, "seed": 1}), held)
    questions = {row["prompt"][0]["content"] for row in held}
    assert counts.num_in_evaluation > 0
    assert not questions & {row["prompt"][0]["content"] for row in kept}
    assert counts.num_kept + counts.num_in_evaluation + counts.num_repeated == 200


def test_needs_no_torch() -> None:
    code = "import sys, burnish.data; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demonstrations_from_a_template(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n")
    spec = {"path": str(file), "completion_template": "<answer>{answer}</answer>"}
    assert load_rows(spec)[0]["completion"] == "<answer>2</answer>"
    assert load_rows({**spec, "system_prompt": "Add."})[0]["completion"] == [
        {"role": "assistant", "content": "<answer>2</answer>"}
    ]
    with pytest.raises(ConfigError, match=r"use placeholders out of \['answer', 'prompt'\]"):
        load_rows({**spec, "completion_template": "{expression}"})
    task = {"source": "reasoning_gym", "task": "chain_sum", "size": 1, "completion_template": "{expression}={answer}"}
    row = load_rows(task)[0]
    assert row["completion"][0]["content"].endswith("=" + row["answer"])
    file.write_text(json.dumps({"prompt": "1+1=", "completion": "2"}) + "\n")
    with pytest.raises(DataError, match="already has a completion"):
        load_rows(spec)


def test_disjoint_can_keep_repeats() -> None:
    train = [{"prompt": p} for p in ("a", "b", "b", "c")]
    rows, counts = disjoint(train, [{"prompt": "a"}], keep_repeats=True)
    assert [row["prompt"] for row in rows] == ["b", "b", "c"]
    assert (counts.num_in_evaluation, counts.num_repeated) == (1, 0)
