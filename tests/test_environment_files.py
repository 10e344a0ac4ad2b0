"""[environment] of run files: checked before anything loads, shown by a dry run, played by the trainers."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.config import load_pipeline_file, load_run_file
from burnish.cli.main import main
from burnish.data import disjoint, load_rows
from burnish.environments import Toolbox, ToolCall
from burnish.environments.registry import ENVIRONMENTS, environments_from_config
from burnish.environments.setup import Environments
from burnish.errors import ConfigError, DataError
from burnish.rewards import check_gold
from dialects import save_speaker, speaker

CODE = '''
from burnish.environments import Environment, Reply


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def untyped(a):
    return a


class Echo(Environment):
    def __init__(self, rounds: int = 2) -> None:
        self.rounds = rounds

    def reset(self, row, seed):
        self.turns = 0

    def step(self, text):
        self.turns += 1
        return Reply([{"role": "user", "content": "Again."}], done=self.turns >= self.rounds)

    def reward(self):
        return float(self.turns)


class Gold(Echo):
    def reset(self, row, seed):
        super().reset(row, seed)
        self.answer = row["answer"]


class Counter:
    def reset(self, **row):
        self.count = 0

    def increment(self, by: int) -> int:
        """Add to the count."""
        self.count += by
        return self.count


number = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "env.py").write_text(CODE)
    save_speaker(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"What is {i} + 1?"}], "answer": str(i + 1)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


TRAINING = """
[training]
output_dir = "{folder}/out"
max_steps = 2
per_device_train_batch_size = 4
num_generations = 2
max_completion_length = 300
bf16 = false
log_completions = true
report_to = "none"
save_strategy = "no"
"""


def write(folder: Path, tables: str, *, training: bool = True, data: str = '"rows.jsonl"') -> Path:
    path = folder / "run.toml"
    data = data.replace('"rows.jsonl"', f'"{folder}/rows.jsonl"')
    text = f'model = "{folder}/model"\ndata.train = {data}\n{tables}\n'
    path.write_text(text + (TRAINING.format(folder=folder) if training else ""))
    return path


TOOLS = '[environment]\nkind = "tools"\ntools = ["env.py:add"]\n[[rubric]]\nkind = "tool_calls"\n'


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "tool"}, "environment.kind = 'tool': did you mean 'tools'. Use one of: gym, mcp, openenv, python"),
        ({}, "environment.kind = None: "),
        ({"kind": "tools"}, "environment.tools is missing: kind 'tools' needs it"),
        ({"kind": "tools", "tools": []}, "name at least one function"),
        ({"kind": "tools", "tools": "env.py:add"}, "environment.tools = 'env.py:add': use a list of strings"),
        ({"kind": "tools", "tools": ["env.py:sub"]}, "environment: tools = 'env.py:sub': env.py has no 'sub'"),
        ({"kind": "tools", "tools": ["env.py:untyped"]}, "'untyped' has the parameter 'a' without a type"),
        ({"kind": "tools", "tools": ["env.py:add"] * 2}, "two are named 'add'"),
        ({"kind": "python", "factory": "env.py:number"}, "factory = 'env.py:number' is int"),
        ({"kind": "python", "factory": "env.py:Echo", "option": {}}, "did you mean 'options'"),
        ({"kind": "python", "factory": "env.py:Echo", "options": 3}, "environment.options = 3: use a table"),
        ({"kind": "gym", "attempts": 2.5}, "environment.attempts = 2.5: use an integer"),
        ({"kind": "gym", "attempts": 0}, "environment: attempts = 0: use at least 1"),
        ({"kind": "textarena", "game": "TicTacToe-v0", "oponent": "random"}, "did you mean 'opponent'"),
        ({"kind": "mcp", "command": ["x"], "environment": {"A": 1}}, "environment.environment = .*a table of strings"),
        ({"kind": "gym", "folder": "x"}, "environment.folder = 'x' is not an option"),
        ([], "environment = \\[\\]: add an"),
        ([{"kind": "gym"}], "environment\\[0\\].name = None: use the name that the column"),
        ([{"kind": "gym", "name": "a"}] * 2, "environment\\[1\\].name = 'a': an earlier one"),
    ],
)
def test_bad_tables_are_refused(folder: Path, table: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        environments_from_config(table, folder=folder)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tables = {
        "textarena": {"game": "TicTacToe-v0"},
        "mcp": {"command": ["x"]},
        "openenv": {"url": "http://localhost:8000"},
        "gym": {},
    }
    for kind, options in tables.items():
        extra = {"gym": "envs"}.get(kind, kind)
        with pytest.raises(ConfigError, match=rf"pip install 'burnish\[{extra}\]'"):
            environments_from_config({"kind": kind, **options})


def test_releases_of_verifiers_that_cannot_be_played_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    for version, words in (
        (missing, r"needs the package verifiers: pip install 'burnish\[verifiers\]'"),
        (
            lambda name: "0.4.0",
            r"verifiers 0\.4\.0 is installed: burnish plays 0\.1\..*pip install 'burnish\[verifiers\]'",
        ),
    ):
        monkeypatch.setattr("importlib.metadata.version", version)
        with pytest.raises(ConfigError, match=words):
            environments_from_config({"kind": "verifiers", "env_id": "wordle"})
        with pytest.raises(ConfigError, match=words):
            load_rows({"source": "verifiers", "env_id": "wordle"})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.14")
    with pytest.raises(ConfigError, match="env_id = ' ': use the name"):
        environments_from_config({"kind": "verifiers", "env_id": " "})


def test_every_kind_documents_its_options() -> None:
    for kind, make in ENVIRONMENTS.items():
        text = make.__doc__ or ""
        names = [name for name in make.__annotations__ if name != "return"]
        assert all(f"{name}: " in text for name in names), kind


def test_checking_a_file_loads_nothing_heavy(folder: Path) -> None:
    path = write(folder, '[environment]\nkind = "textarena"\ngame = "TicTacToe-v0"\nopponent = "random"')
    script = (
        "import sys\nfrom burnish.cli.config import load_run_file\n"
        f"load_run_file({str(path)!r}, [], 'grpo')\n"
        "print([name for name in ('torch', 'transformers', 'textarena', 'mcp') if name in sys.modules])"
    )
    src = str(Path(__file__).parent.parent / "src")
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": src})
    assert shown.stdout.strip() == "[]", shown.stderr


def test_files_that_play_no_episodes_refuse_an_environment(folder: Path) -> None:
    path = write(folder, TOOLS, training=False)
    with pytest.raises(ConfigError, match="`burnish sft` plays no episodes"):
        load_run_file(path, [], "sft")
    path.write_text(
        f'model = "m"\ndata.train = "{folder}/rows.jsonl"\ndata.eval = "{folder}/rows.jsonl"\n{TOOLS}\n[pairs]\n'
    )
    with pytest.raises(ConfigError, match=r"\[pairs\] with \[environment\]: pairs are made of single turns"):
        load_pipeline_file(path, [])


def test_overrides_reach_the_table(folder: Path) -> None:
    path = write(folder, '[environment]\nkind = "python"\nfactory = "env.py:Echo"')
    file = load_run_file(path, ["--environment.options.rounds=5"], "grpo")
    assert callable(file.environment)
    assert file.environment().rounds == 5


@pytest.mark.parametrize("kind", ["grpo", "ppo", "online_dpo"])
def test_a_dry_run_shows_the_tools_and_what_is_proven(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([kind, str(write(folder, TOOLS)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "environment: tools; tools: add(a, b)\ncriteria: tool_calls\n" in shown
    assert "turns end with '<|im_end|>', and can be extended token for token; earlier turns are as the" in shown
    assert '"name": "add"' in shown  # the prompt offers it
    assert not (folder / "out").exists()


def test_an_environment_needs_a_rubric_or_a_reward_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = '[environment]\nkind = "python"\nfactory = "env.py:'
    assert main(["grpo", str(write(folder, f'{own}Echo"')), "--dry-run"]) == 0
    assert "environment: Echo; tools: none\ncriteria: Echo\n" in capsys.readouterr().out
    assert main(["grpo", str(write(folder, f'{own}Counter"')), "--dry-run"]) == 2
    assert "an environment that gives a reward" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["grpo", "online_dpo"])
def test_a_run_of_a_file(folder: Path, kind: str) -> None:
    assert main([kind, str(write(folder, '[environment]\nkind = "python"\nfactory = "env.py:Echo"'))]) == 0
    assert json.loads((folder / "out" / "status.json").read_text())["state"] == "finished"
    records = [json.loads(line) for line in (folder / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert records
    for record in records:
        turns = [m["role"] for m in record["messages"]].count("assistant")
        assert record["criteria"] == {"Echo": float(turns - (record["stop_reason"] == "length"))}


def test_several_environments_take_their_own_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = """
[[environment]]
name = "sums"
kind = "tools"
tools = ["env.py:add"]
[[environment]]
name = "echo"
kind = "python"
factory = "env.py:Echo"
[[rubric]]
kind = "environment"
"""
    sources = (
        f'{{ path = "{folder}/rows.jsonl", environment = "sums" }}',
        '{ source = "environment", size = 6, environment = "echo" }',
    )
    path = write(folder, tables, data=f"{{ mix = [{', '.join(sources)}] }}")
    assert main(["grpo", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "environment 'sums': tools; tools: add(a, b)\nenvironment 'echo': Echo; tools: none\n" in shown
    file = load_run_file(path, [], "grpo")
    tokenizer, end = speaker("chatml")
    environments = Environments(tokenizer, [end], factory=file.environment)  # type: ignore[arg-type]
    rows = load_rows(file.data.train or {})
    assert [row["environment"] for row in rows] == ["sums"] * 8 + ["echo"] * 6
    assert [environments.make(row).name for row in (rows[0], rows[-1])] == ["tools", "Echo"]
    with pytest.raises(DataError, match="row 0 already has a column environment"):
        load_rows({"mix": [file.data.train], "environment": "other"})


def test_a_source_of_empty_prompts() -> None:
    rows = load_rows({"source": "environment", "size": 3, "system_prompt": "Play well."})
    assert rows == [
        {"prompt": [{"role": "system", "content": "Play well."}, {"role": "user", "content": ""}]} for _ in range(3)
    ]
    kept, counts = disjoint(rows, rows, keep_repeats=True)
    assert (len(kept), counts.num_in_evaluation) == (3, 0)  # each begins a game of its own
    with pytest.raises(ConfigError, match=r"data\.size is missing: a source environment needs size"):
        load_rows({"source": "environment"})
    with pytest.raises(ConfigError, match=r"data\.seed = 1: a source environment does not use it"):
        load_rows({"source": "environment", "size": 1, "seed": 1})


def test_an_evaluation_plays_episodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "eval.toml"
    path.write_text(
        f'model = "{folder}/model"\ndata.eval = "{folder}/rows.jsonl"\n[environment]\nkind = "python"\n'
        'factory = "env.py:Gold"\noptions.rounds = 1\n[[rubric]]\nkind = "environment"\n'
        "[evaluation]\nnum_samples = 2\nmax_completion_length = 600\n"
    )
    assert main(["eval", str(path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["pass_at_k"]["1"]["mean"] > 0.5  # each turn that ends is worth 1


def test_the_calculator_of_the_examples() -> None:
    folder = Path(__file__).parent.parent / "examples"
    file = load_run_file(folder / "calculator.toml", [], "grpo")
    assert file.rubric is not None
    assert not check_gold(file.rubric, load_rows(file.data.train or {})[:50])
    box = Toolbox(file.environment().tools)  # type: ignore[misc, operator]
    good, evil, huge = ("12 * (3 + 4) - -2 / 4", "__import__('os').getcwd()", "9 * 9" + " * 999999" * 9)
    results = box.run([ToolCall("calculate", {"expression": text}) for text in (good, evil, huge)])
    assert [result.content for result in results[:1]] == ["84.5"]
    assert [result.error for result in results[1:]] == ["tool_error"] * 2


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The form of SmolLM2's template, which knows no tools."""
SYSTEM = "Solve the problem with the tools, one call a turn. Then give the answer as a number."


def test_the_agents_transcripts_are_what_its_episodes_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the supervised stage teaches is the prompt, the calls and the answers that GRPO's episodes have."""
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    file = load_pipeline_file(root / "examples" / "agent" / "agent.toml", [])
    assert file.data.eval is not None
    held_out, train = load_rows(file.data.eval), load_rows(file.data.train or {})
    assert not check_gold(file.rubric, held_out)
    assert len(disjoint(train, held_out)[0]) == len(train)
    tools = file.environment().tools  # type: ignore[misc, operator]
    tokenizer, end = speaker(template=PLAIN, controls=("<|im_start|>", "<|im_end|>"), end="<|im_end|>")
    environments = Environments(tokenizer, [end], tools=tools)
    for row in load_rows(file.data.sft or {}):
        opening, question, *turns = row["messages"]
        prepared = environments.prepared({"prompt": [{"role": "system", "content": SYSTEM}, question]})["prompt"]
        assert [opening, question] == prepared
        for written, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            (call,) = environments.tool_format.parse(written["content"])
            (result,) = Toolbox(tools).run([call])
            assert environments.dialogue.as_shown(result.message(), "user") == answer
        assert turns[-1]["content"] == f"The answer is {result.content}."
