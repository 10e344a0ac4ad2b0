"""Metrics and transcripts of a run that was killed, repeated or resumed are those of an undisturbed one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import test_reward_trainer
import tiny
from burnish import RewardConfig, RewardTrainer
from burnish.runs.checkpoints import delete_run
from burnish.runs.files import append_json_lines, read_json, read_json_lines
from burnish.runs.records import StepRecords
from test_trainers import grpo, settings, sft

MODEL = tiny.model()


def reward(folder: Path, model: Any, **changes: Any) -> RewardTrainer:
    args = RewardConfig(**settings(folder, per_device_train_batch_size=4, **changes))
    rows = test_reward_trainer.PAIRS
    return RewardTrainer(model, args, train_dataset=rows, eval_dataset=rows[:4], processing_class=tiny.tokenizer())


def recorded(make: Any, folder: Path, resume: str | None = None, **changes: Any) -> None:
    trainer = make(folder, copy.deepcopy(MODEL), **changes)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Records without what a clock decides."""
    records = read_json_lines(folder / f"{name}.jsonl")
    return [{k: v for k, v in record.items() if k != "time" and not k.startswith("seconds/")} for record in records]


@pytest.mark.parametrize("make", [sft, reward, grpo])
def test_records_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path, make: Any) -> None:
    # Logs of three steps, checkpoints of two: the log at step 3 covers steps on both sides of the checkpoint at 2.
    changes: dict[str, Any] = {"max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    if make is grpo:
        changes |= {"log_completions": True, "logprob_check_bound": 1.0, "steps_per_generation": 2}
    if make is reward:
        changes |= {"eval_on_start": True}
    recorded(make, tmp_path, **changes)
    names = ["metrics", "transcripts"] if make is grpo else ["metrics"]
    whole = {name: lines(tmp_path, name) for name in names}
    assert [record["step"] for record in whole["metrics"] if "loss" in record] == [1, 3, 6]
    for step in (2, 4):
        recorded(make, tmp_path, f"checkpoint-{step}", **changes)
        assert {name: lines(tmp_path, name) for name in names} == whole


def test_a_run_that_starts_anew_drops_the_records_of_its_stage_only(tmp_path: Path) -> None:
    others = [{"stage": "sft", "step": 9, "loss": 1.0}]
    for name in ("metrics", "transcripts"):
        append_json_lines(tmp_path / f"{name}.jsonl", others)
    changes: dict[str, Any] = {"log_completions": True, "logprob_check_bound": 1.0, "max_steps": 2}
    recorded(grpo, tmp_path, **changes)
    once = {name: lines(tmp_path, name) for name in ("metrics", "transcripts")}
    assert once["transcripts"][0] == others[0]
    assert len(once["transcripts"]) == 1 + 2 * 12
    recorded(grpo, tmp_path, **changes)
    assert {name: lines(tmp_path, name) for name in once} == once


def test_runs_that_share_a_folder_keep_each_others(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"log_completions": str(tmp_path), "log_metrics": str(tmp_path), "max_steps": 1}
    for name in ("a", "b", "a"):
        grpo(tmp_path / name, logprob_check_bound=1.0, **shared).train()
    assert [record["run"] for record in lines(tmp_path, "transcripts")] == ["b"] * 12 + ["a"] * 12
    assert [record["run"] for record in lines(tmp_path, "metrics")] == ["b", "a"]
    assert {path.name for path in tmp_path.iterdir()} >= {"environment.json", "metrics.jsonl"}
    assert not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.parametrize("make", [sft, reward, grpo])
def test_a_run_from_python_records_its_first_step_and_environment(tmp_path: Path, make: Any) -> None:
    short: dict[str, Any] = {"max_steps": 2, "logging_steps": 10}
    make(tmp_path / "on", **({} if make is not reward else {"model": copy.deepcopy(MODEL)}), **short).train()
    assert [record["step"] for record in lines(tmp_path / "on", "metrics") if "loss" in record] == [1, 2]
    assert read_json(tmp_path / "on" / "environment.json")["versions"]["torch"]
    off = {"model": copy.deepcopy(MODEL)} if make is reward else {}
    make(tmp_path / "off", log_metrics=False, **off, **short).train()
    assert [path.name for path in (tmp_path / "off").glob("*.json*")] == ["status.json"]


def test_a_new_run_may_delete_all_records_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    names = ("metrics.jsonl", "environment.json", "transcripts.jsonl", "eval_transcripts.jsonl")
    for name in names:
        (tmp_path / name).write_text("{}")
    delete_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


def test_an_evaluation_before_training_is_kept(tmp_path: Path) -> None:
    trainer = reward(tmp_path, copy.deepcopy(MODEL), max_steps=1)
    trainer.evaluate()
    trainer.train()
    assert [(r["step"], "eval_loss" in r) for r in lines(tmp_path, "metrics")] == [(0, True), (1, False)]


def test_records_survive_every_kind_of_line_break(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d", "e\rf", "g\x0ch", "i\nj"]
    records = StepRecords(tmp_path / "records.jsonl", stage="grpo")
    records.append([{"step": 1, "completion": text} for text in texts])
    with (tmp_path / "records.jsonl").open("a") as stream:
        stream.write('{"stage": "grpo", "step": 1, "completion": "cut')
    records.append([{"step": 2, "completion": "later"}])
    records.start_at(1)
    assert [record["completion"] for record in read_json_lines(tmp_path / "records.jsonl")] == texts


def test_a_kill_while_records_are_cut_back_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = StepRecords(tmp_path / "records.jsonl", stage="grpo")
    records.append([{"step": step} for step in range(1, 5)])

    class Killed(BaseException): ...

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        records.start_at(2)
    assert [record["step"] for record in read_json_lines(tmp_path / "records.jsonl")] == [1, 2, 3, 4]
