"""What a run shows and records beside its training: the last metrics, samples, versions that no test has seen."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import tiny
from burnish import progress
from burnish.runs.files import read_json_lines
from burnish.training import environment, transcripts
from test_trainers import grpo, sft

ROOT = Path(__file__).parent.parent


def test_a_run_shorter_than_its_logging_steps_has_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft(tmp_path, progress=True, logging_steps=10, logging_first_step=False).train()
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl")] == [3]
    step, last = capsys.readouterr().err.splitlines()[-2:]
    metrics = re.fullmatch(r"\[burnish\] sft 3/3  left 0:00  (loss \S+  entropy \S+  grad_norm \S+)", step)
    assert metrics is not None, step
    assert re.fullmatch(rf"\[burnish\] sft: step 3 after \d:\d\d  {re.escape(metrics[1])}", last), last


def test_a_run_that_logs_nothing_still_logs_nothing(tmp_path: Path) -> None:
    sft(tmp_path, logging_strategy="no", logging_first_step=False).train()
    assert not list(read_json_lines(tmp_path / "metrics.jsonl"))


def test_a_run_says_what_it_loads_and_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SHORT_SECONDS", 0.0)
    tiny.model().save_pretrained(tmp_path / "model")
    sft(tmp_path / "run", str(tmp_path / "model"))
    said = capsys.readouterr().err
    assert re.search(r"^\[burnish\] encoding 24 rows of train_dataset \.\.\. \d+\.\d s$", said, re.MULTILINE), said
    assert re.search(r"^\[burnish\] loading \S+/model \.\.\. \d+\.\d s$", said, re.MULTILINE), said


def test_an_online_run_shows_a_sample_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transcripts, "_PROMPT_LENGTH", 3)
    monkeypatch.setattr(transcripts, "_COMPLETION_LENGTH", 4)
    grpo(tmp_path / "quiet").train()
    assert "sample:" not in capsys.readouterr().err
    grpo(tmp_path / "shown", progress=True).train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "sample:" in line]
    sample = re.fullmatch(r"\[burnish\] sample: '(\.\.\.)?(.*)' -> '(.*?)(\.\.\.)?'  reward \S+", line)
    assert sample is not None, line
    assert len(sample[2]) <= 3
    assert len(sample[3]) <= 4
    monkeypatch.setattr(transcripts, "_SHOWN_SECONDS", 0.0)
    grpo(tmp_path / "often", progress=True).train()
    assert capsys.readouterr().err.count("sample:") == 3, "one a rollout"


def test_a_sample_cannot_steer_the_terminal() -> None:
    assert transcripts._printable("a\x1b[2J\n\tb\u202e") == "a [2J b "


def test_a_newer_library_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    installed = {"torch": "99.0.1+cpu", "transformers": environment.TESTED["transformers"]}
    monkeypatch.setattr(environment.metadata, "version", installed.__getitem__)
    environment.warn_of_untested.cache_clear()
    with caplog.at_level(logging.WARNING):
        environment.warn_of_untested()
        environment.warn_of_untested()
    (record,) = caplog.records
    assert f"torch 99.0.1+cpu (tested up to {environment.TESTED['torch']})" in record.message
    assert "transformers" not in record.message
    installed["torch"] = f"{environment.TESTED['torch']}+cpu"
    environment.warn_of_untested.cache_clear()
    environment.warn_of_untested()
    assert len(caplog.records) == 1, "a build of a tested version is tested"


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert environment.TESTED.items() <= pinned.items()
