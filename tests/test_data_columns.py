"""Columns under other names: the error of every stage prints the line that mends it, before weights are asked for."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import tiny
from burnish.cli.main import main
from burnish.data import load_rows
from burnish.data.columns import meant_columns, rename_line
from burnish.data.formats import detect_format
from burnish.errors import DataError, ModelError
from test_nonsense import EVERY, build, chat, good, said, tokenizer, user

RUBRIC = '[[rubric]]\nkind = "exact"\n'
PROMPTS = {"question": "1+1=", "solution": "2"}
PAIR = {"query": "1+1=", "accepted": "2", "dispreferred": "3"}
UNKNOWN = {
    "sft": {"query": "1+1=", "reply": "2"},
    "dpo": PAIR,
    "reward": PAIR,
    "kto": {"Question": "1+1=", "response": "2", "is-good": True},
    **dict.fromkeys(("online_dpo", "grpo", "rloo", "ppo", "pairs", "eval"), PROMPTS),
}
"""A row of every command, none of whose columns has the name that it needs."""


def printed(message: str) -> dict[str, str]:
    """The line of the message, as TOML reads it."""
    return tomllib.loads(re.findall(r"`(columns = .*?)`; of", message)[-1])["columns"]


def printed_in_python(message: str) -> dict[str, str]:
    return ast.literal_eval(re.findall(r"`rename_columns\((.*?)\)`\)", message)[-1])


def write_run(kind: str, columns: dict[str, str], *, weights: bool = False) -> None:
    """A run file; without weights, the first thing that is amiss once the rows are read is the model."""
    tiny.tokenizer().save_pretrained("model")
    (tiny.model() if weights else tiny.model().config).save_pretrained("model")
    Path("rows.jsonl").write_text(f"{json.dumps(UNKNOWN[kind])}\n" * 4)
    which = "eval" if kind == "eval" else "train"
    line = f", columns = {{ {', '.join(f'{json.dumps(old)} = {json.dumps(new)}' for old, new in columns.items())} }}"
    text = f'model = "model"\n[data]\n{which} = {{ path = "rows.jsonl"{line if columns else ""} }}\n'
    if kind not in ("sft", "dpo", "kto", "reward"):
        text += RUBRIC
    if kind not in ("pairs", "eval"):
        text += "[training]\nuse_cpu = true\nbf16 = false\nmax_steps = 1\nprogress = false\n"
    if kind in ("online_dpo", "grpo", "rloo", "ppo"):
        text += "per_device_train_batch_size = 2\nmax_completion_length = 4\n"
        text += "" if kind == "ppo" else "num_generations = 2\n"
    Path("run.toml").write_text(text)


def mended(kind: str, capsys: pytest.CaptureFixture[str], columns: dict[str, str]) -> dict[str, str]:
    """The columns as every message asks for them, until none does."""
    while True:
        write_run(kind, columns)
        assert main([kind, "run.toml"]) == 2
        message = capsys.readouterr().err
        if "rename columns" not in message:
            assert "model" in message, message
            return columns
        found = printed(message)
        assert found == printed_in_python(message)
        assert not found.items() <= columns.items(), message
        columns = columns | found


@pytest.mark.parametrize("kind", UNKNOWN)
def test_the_printed_line_makes_the_run_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = mended(kind, capsys, {})
    assert set(columns) == set(UNKNOWN[kind]), "what the row holds is read in full"


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_mended_file_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    columns = mended(kind, capsys, {})
    write_run(kind, columns, weights=True)
    assert main([kind, "run.toml", f"--training.output_dir={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize("stage", EVERY.split())
def test_the_printed_call_makes_the_trainer_start(tmp_path: Path, stage: str) -> None:
    rows = Dataset.from_list([UNKNOWN[stage]] * 4)
    with pytest.raises(DataError) as caught:
        build(stage, tmp_path, rows)
    names = printed_in_python(str(caught.value))
    with pytest.raises(ModelError, match=r"model = './nowhere': no such folder"):
        build(stage, tmp_path, rows.rename_columns(names))


@pytest.mark.parametrize(
    ("row", "families", "also", "names"),
    [
        ({"promt": "a", "completion": "b"}, [("prompt", "completion")], (), {"promt": "prompt"}),
        ({"context": "x", "content": "y"}, [("text",)], (), {"content": "text"}),
        ({"text": "x"}, [("prompt",)], (), {"text": "prompt"}),
        ({"question": 5, "query": "x"}, [("prompt",)], (), {"query": "prompt"}),
        ({"question": "", "id": "x"}, [("prompt",)], (), {}),
        ({"question": None, "instruction": "x"}, [("prompt",)], (), {"instruction": "prompt"}),
        ({"question": "x", "label": "good"}, [("prompt", "completion", "label")], (), {}),
        ({"Dialog": [user("x")]}, [("text",), ("messages",)], (), {"Dialog": "messages"}),
        ({"dialog": "x"}, [("messages",)], (), {}),
        ({"a": "b"}, [("prompt",)], (), {}),
        ({5: "b"}, [("prompt",)], (), {}),
        ({"question": "x", "win": "a", "lose": "b"}, [("chosen", "rejected")], ("prompt",),
         {"win": "chosen", "lose": "rejected", "question": "prompt"}),
    ],
)  # fmt: skip
def test_names_and_types_decide(
    row: dict[str, Any], families: list[tuple[str, ...]], also: tuple[str, ...], names: dict[str, str]
) -> None:
    assert meant_columns(row, families, also=also) == names


@pytest.mark.parametrize("name", ["a b", "ä", 'quo"te', "back\\slash", "tab\t", "🙂", "x.y", "del\x7f", "columns", ""])
def test_any_name_can_be_pasted(name: str) -> None:
    assert tomllib.loads(rename_line({name: "prompt", "x": name})) == {"columns": {name: "prompt", "x": name}}


def test_renaming_where_arrow_filled_the_new_name_with_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": None, "question": "1+1="}) + "\n")
    assert load_rows({"path": str(file), "columns": {"question": "prompt"}}) == [{"prompt": "1+1="}]
    with pytest.raises(DataError, match=r"row 0 has no column 'qestion'; .*; write columns = { question = .prompt. }"):
        load_rows({"path": str(file), "columns": {"qestion": "prompt"}})
    with pytest.raises(DataError) as caught:
        load_rows({"path": str(file), "prompt_template": "Q: {prompt}"})
    assert printed(str(caught.value)) == {"question": "prompt"}


@pytest.mark.parametrize(
    ("config", "rows", "fragment"),
    [
        ({"prompt_sampling": "weighted"}, {"probability": 0.5}, '`columns = { probability = "weight" }`'),
        ({"prompt_sampling": "curriculum"}, {"level": 3}, '`columns = { level = "difficulty" }`'),
    ],
)
def test_columns_of_the_order_of_prompts(tmp_path: Path, config: Any, rows: Any, fragment: str) -> None:
    with pytest.raises(DataError) as caught:
        build("grpo", tmp_path, [{**row, **rows} for row in good("grpo")], config=config)
    assert fragment in str(caught.value)


def test_the_field_of_the_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'row 0 has the columns .*; set dataset_text_field = "content"\.$'):
        build("sft", tmp_path, [{"content": "x"}], config={"dataset_text_field": "body"})


MESSAGES_AS_TEXT = [{"messages": "user: 1+1="}, {"text": [user("1+1="), said("2")]}]


@pytest.mark.parametrize("row", MESSAGES_AS_TEXT)
@pytest.mark.parametrize("stage", EVERY.split())
def test_messages_as_text_and_text_as_messages(tmp_path: Path, stage: str, row: dict[str, Any]) -> None:
    """The model's name leads nowhere: the rows are looked at before."""
    for given in ({}, {"eval_dataset": [row]}):
        with pytest.raises(DataError, match=r"(train|eval)_dataset: row 0.*(list|needs)"):
            build(stage, tmp_path, good(stage) if given else [row] * 4, **given)


@pytest.mark.parametrize("stage", EVERY.split())
def test_conversations_without_a_chat_template(tmp_path: Path, stage: str) -> None:
    """In train_dataset and in eval_dataset, from Python."""
    bare = tokenizer(chat_template=None)
    for rows, held_out in ((good(stage, chat), None), (good(stage), good(stage, chat))):
        with pytest.raises(DataError, match=r"(train|eval)_dataset: row 0: the tokenizer has no chat template"):
            build(stage, tmp_path, rows, eval_dataset=held_out, processing_class=bare)


@pytest.mark.parametrize("kind", UNKNOWN)
@pytest.mark.parametrize("row", [*MESSAGES_AS_TEXT, "a conversation"])
def test_the_same_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, row: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(kind, {})
    if row == "a conversation":
        tokenizer(chat_template=None).save_pretrained("model")
        Path("model/chat_template.jinja").unlink(missing_ok=True)
        row = {**chat(kind), "answer": "2"}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    assert main([kind, "run.toml"]) == 2
    message = capsys.readouterr().err
    where = "data.eval" if kind == "eval" else "train_dataset|data.train"
    assert re.search(rf"({where}): row 0.*(list|needs|no chat template)", message), message


@pytest.mark.parametrize("asked", ["question", "instruction", "Query"])
def test_a_prompt_by_another_name_beside_a_pair_is_not_lost(asked: str) -> None:
    row = {asked: 'How "far"\nis Ben\'s town?', "chosen": "4 km", "rejected": "far"}
    with pytest.raises(DataError, match=rf"row 3 has chosen \+ rejected without a prompt.*{asked} = \"prompt\""):
        detect_format(row, stage="preference", index=3)
    # Where the answers begin with it, as Anthropic's dialogues do, nothing is lost; nor beside a prompt.
    whole = {name: f"{row[asked]} {text}" for name, text in row.items()}
    assert detect_format({**whole, asked: row[asked]}, stage="preference").columns == ("chosen", "rejected")
    chat = [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": "4 km"}]
    other = [chat[0], {"role": "assistant", "content": "far"}]
    assert detect_format({asked: row[asked], "chosen": chat, "rejected": other}, stage="preference").conversational
    assert detect_format({**row, "prompt": "x"}, stage="preference").columns == ("prompt", "chosen", "rejected")
