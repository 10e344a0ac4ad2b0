"""A disk that is full, and files where folders should be: one clear error, and a resume that loses nothing.

The limit on the size of files stands for a full disk: the system refuses the same writes, with another number.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import tiny
from burnish.cli.main import main
from burnish.errors import ConfigError, FileError
from test_nonsense import build, good

BYTES = 24_000
"""Less than a tiny model has, more than a log line."""


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullAfter(TrainerCallback):
    """Fill the disk after so many steps."""

    def __init__(self, step: int, stack: contextlib.ExitStack) -> None:
        self.step, self.stack = step, stack

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.stack.enter_context(full_disk())


SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, "num_train_epochs": 9}


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_goes_on_exactly_after_the_disk_was_full(tmp_path: Path, stage: str) -> None:
    more = {"log_completions": True} if stage == "grpo" else {}
    whole = build(stage, tmp_path / "whole", good(stage), tiny.model(), config={**SAVING, **more})
    whole.train()
    with contextlib.ExitStack() as stack:
        cut = build(
            stage, tmp_path / "cut", good(stage), tiny.model(), config={**SAVING, **more},
            callbacks=[FullAfter(1, stack)],
        )  # fmt: skip
        with pytest.raises(FileError, match=r"cannot be written.* Free space"):
            cut.train()
    resumed = build(stage, tmp_path / "cut", good(stage), tiny.model(), config={**SAVING, **more})
    resumed.train(resume_from_checkpoint=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    names = {path.name for path in (tmp_path / "cut").iterdir() if not path.name.startswith(".")}
    assert {path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith(".")} == names


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "grpo"])
def test_a_model_that_does_not_fit_on_the_disk(tmp_path: Path, stage: str) -> None:
    trainer = build(stage, tmp_path, good(stage), tiny.model())
    with full_disk(), pytest.raises(FileError, match="the model cannot be written"):
        trainer.save_model()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="the model cannot be written"):
        trainer.save_model(str(tmp_path / "file" / "below"))
    trainer.save_model()


@pytest.mark.parametrize(
    ("command", "table", "fragment"),
    [
        ("sft", '[training]\noutput_dir = "file/out"\n', "[training] output_dir = 'file/out': file is a file"),
        ("sft", '[training]\noutput_dir = "file"\n', "it is a file; name a folder"),
        ("eval", '[evaluation]\noutput = "file/out.json"\n', "[evaluation] output = 'file/out.json': file is a file"),
        ("eval", '[evaluation]\noutput = "."\n', "it is a folder; name a file"),
        ("pairs", '[pairs]\noutput_dir = "file"\n', "[pairs] output_dir = 'file': it is a file"),
        ("pipeline", '[report]\npath = "file/x.html"\n[sft]\n', "[report] path = 'file/x.html': file is a file"),
    ],
)
def test_a_file_where_a_folder_should_be_is_seen_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, table: str,
    fragment: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("run.toml").write_text(
        'model = "./nowhere"\nrubric = [{ kind = "exact" }]\n[data]\ntrain = { path = "r.jsonl" }\n'
        f'eval = {{ path = "r.jsonl" }}\n{table}'
    )
    assert main([command, "run.toml"]) == 2
    assert fragment in capsys.readouterr().err


def test_what_a_message_says_to_begin_a_file_with_is_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Follow the advice of every error until the file is good: each line parses, and each is needed once."""
    from burnish.cli.config import load_run_file

    monkeypatch.chdir(tmp_path)
    lines: list[str] = ['model = "./nowhere"']
    for _ in range(2):
        Path("run.toml").write_text("\n".join(lines))
        with pytest.raises(ConfigError, match="begin the file with") as caught:
            load_run_file("run.toml", [], "grpo")
        found = re.search(r"begin the file with `([^`]*)`", str(caught.value))
        assert found is not None
        lines.append(found[1])
    Path("run.toml").write_text("\n".join(lines))
    assert load_run_file("run.toml", [], "grpo").rubric is not None


def test_an_unforeseen_error_of_the_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`main` lets it through, so that a test sees it; the shell's entry says where the traceback is."""
    from burnish.cli import report
    from burnish.cli.main import console

    def broken(_: Any) -> None:
        raise KeyError("nobody foresaw")

    monkeypatch.setattr(report, "run", broken)
    monkeypatch.setattr("burnish.cli.main.set_up_output", lambda words: None)  # for a process of its own
    monkeypatch.setattr("sys.argv", ["burnish", "report", str(tmp_path)])
    with pytest.raises(KeyError):
        main()
    assert console() == 1
    said = capsys.readouterr().err
    assert "unexpected KeyError: 'nobody foresaw'" in said
    assert "--debug" in said
    monkeypatch.setattr("sys.argv", ["burnish", "report", str(tmp_path), "--debug"])
    with pytest.raises(KeyError):
        console()


def test_rows_that_are_too_large_for_a_message_are_cut(tmp_path: Path) -> None:
    Path(tmp_path, "rows.jsonl").write_text(json.dumps({"prompt": "x" * 10**6, "completion": [1] * 10**5}))
    with pytest.raises(Exception, match="row 0") as caught:
        build("sft", tmp_path, [{"prompt": "x" * 10**6, "completion": [1] * 10**5}])
    assert len(str(caught.value)) < 3000
