"""The status of a run: what it is doing, how it ended, and what the report makes of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from burnish import BurnishError, ConfigError, Interrupted
from burnish.cli.main import main
from burnish.errors import CheckFailed, FileError
from burnish.report import write_report
from burnish.runs.checkpoints import delete_run
from burnish.runs.lock import is_locked, locked
from burnish.runs.status import STATUS, RunStatus, Status, read_status
from test_pipeline import file as file
from test_trainers import grpo, sft


class At(TrainerCallback):
    """Does something after a step, once its checkpoint is saved and its metrics are logged."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def run(folder: Path, *callbacks: Any, **changes: Any) -> Any:
    trainer = sft(folder, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **changes})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def status(folder: Path) -> Status:
    found = read_status(folder)
    assert found is not None
    return found


def page(folder: Path) -> str:
    return unescape(write_report(folder, folder / "page.html").read_text())


def failing(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


def test_a_run_that_ends_is_finished_and_stays_so_while_it_saves(tmp_path: Path) -> None:
    seen: list[Status] = []
    trainer = run(tmp_path, At(2, lambda: seen.append(status(tmp_path))))
    trainer.train()
    trainer.evaluate([{"text": "a"}])
    trainer.save_model()
    assert [(s.state, s.step, s.max_steps, s.doing) for s in (*seen, status(tmp_path))] == [
        ("running", 2, 3, "training"), ("finished", 3, 3, "")
    ]  # fmt: skip
    record = json.loads((tmp_path / STATUS).read_text())
    assert record["started"] < record["updated"]
    assert "<dd>Finished" in page(tmp_path)


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (ZeroDivisionError("no\nmore"), "failed", "sft: failed at step 2 of 3 while training (ZeroDivisionError: no)."),
        (KeyboardInterrupt(), "interrupted", "sft: was interrupted at step 2 of 3 while training (KeyboardInterrupt"),
        (CheckFailed("NaN: mend"), "stopped", "was stopped by a check at step 2 of 3 while training (CheckFailed: NaN"),
        (SystemExit(0), "failed", "sft: failed at step 2 of 3 while training (SystemExit: 0)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_the_reason(error: BaseException, state: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        run(tmp_path, At(2, failing(error))).train()
    found = status(tmp_path)
    assert (found.state, found.step, found.error) == (state, 2, type(error).__name__)
    text = page(tmp_path)
    assert said in text.partition("Read first</h2><ul>")[2]
    assert "resume_from_checkpoint = true (--training.resume_from_checkpoint=true), from checkpoint-2." in text
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert status(tmp_path) == Status("sft", "finished", "", "", 3, 3, "", "")


def test_a_signal_leaves_the_line_that_resumes(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, At(1, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    found = status(tmp_path)
    assert (found.state, found.error) == ("interrupted", "Interrupted")
    assert "train(resume_from_checkpoint=True) continues" in found.reason


def test_a_check_that_stops_a_run_is_named_by_its_message(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed):
        grpo(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), max_dead_steps=1).train()
    assert "grpo: was stopped by a check at step 0 of 3 while training (CheckFailed: step 1: 1 optimizer" in page(
        tmp_path
    )
    assert "It has saved no checkpoint: start it again." in page(tmp_path)


def test_a_run_that_cannot_save_its_result_has_failed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir(parents=True)
    trainer = run(tmp_path)
    trainer.train()
    assert status(tmp_path).state == "finished"
    with pytest.raises(FileError):
        trainer.save_model()
    found = status(tmp_path)
    assert (found.state, found.step, found.doing) == ("failed", 3, "saving the model")


def test_what_a_kill_leaves_is_told_from_what_runs(tmp_path: Path) -> None:
    alive: list[str] = []

    def look() -> None:
        alive.append(page(tmp_path / "run"))
        shutil.copytree(tmp_path / "run", tmp_path / "killed")  # as a kill would leave it, the lock's file too

    run(tmp_path / "run", At(2, look)).train()
    assert "<dd>Running, step 2 of 3" in alive[0]
    assert "was killed" not in alive[0]
    text = page(tmp_path / "killed")
    assert "<dd>Killed, step 2 of 3, see the notes" in text
    assert "Read first</h2><ul><li>sft: was killed at step 2 of 3 while training. Resume with resume_from" in text


def test_metrics_may_be_later_than_the_status(tmp_path: Path) -> None:
    RunStatus(tmp_path, "sft").begin("training", step=4, max_steps=9)
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 6, "loss": 1}\n')
    assert "sft: was killed at step 6 of 9" in page(tmp_path)


def test_a_run_that_is_refused_says_nothing_about_the_one_before(tmp_path: Path) -> None:
    run(tmp_path).train()
    before = (tmp_path / STATUS).read_bytes()
    with pytest.raises(ConfigError, match="has checkpoints of an earlier run"):
        run(tmp_path).train()
    assert (tmp_path / STATUS).read_bytes() == before
    delete_run(tmp_path)
    assert not (tmp_path / STATUS).exists()


def test_nested_blocks_finish_once_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    own = RunStatus(tmp_path, "sft")
    with own.recording():
        own.begin("training")
        with own.recording():
            pass
        assert status(tmp_path).state == "running"
    assert status(tmp_path).state == "finished"
    other = RunStatus(None, "sft")
    with other.recording():
        other.begin("training")
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_a_lock_is_seen_by_its_own_process_and_by_others(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is False
    with locked(tmp_path):
        assert is_locked(tmp_path) is True
        child = os.fork()
        if child == 0:
            os._exit(0 if is_locked(tmp_path) is True else 1)
        assert os.waitpid(child, 0)[1] == 0
        # Looking has not released it.
        child = os.fork()
        if child == 0:
            os._exit(0 if is_locked(tmp_path) is True else 1)
        assert os.waitpid(child, 0)[1] == 0
    (tmp_path / ".lock").write_text("stale")
    assert is_locked(tmp_path) is False


def test_a_pipeline_says_at_which_step_it_ended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = file.parent / "unfinished"
    command = ["pipeline", str(file), f"--output_dir={folder}", "--evaluation.num_samples=1", "--evaluation.ks=[1]"]
    blocked = folder / "grpo" / "model.safetensors"  # a folder where the stage saves its model
    blocked.mkdir(parents=True)
    assert main(command) == 2
    text = page(folder)
    assert "pipeline: failed at stage 2 of 2, its step 4 of 4 while training grpo (FileError: " in text
    assert "Repeat the command to continue" in text
    blocked.rmdir()
    assert main(command) == 0
    assert status(folder).state == status(folder / "grpo").state == "finished"
    assert "<dd>Finished" in unescape((folder / "report.html").read_text())


def test_errors_of_the_end_do_not_hide_behind_a_full_disk(tmp_path: Path) -> None:
    own = RunStatus(tmp_path / "run", "sft")

    def fail() -> None:
        with own.recording():
            own.begin("training")
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").touch()
            raise BurnishError("the first")

    with pytest.raises(BurnishError, match="the first"):
        fail()
