"""Transcripts: each sampled completion once, with the advantage it trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_finite import make
from test_trainers import PROMPTS, grpo


def rows(folder: Path, name: str = "transcripts.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n") if line]


def sampled_by(trainer: Any) -> list[Any]:
    """Every completion that the trainer's engine returns, as it is at the end."""
    found: list[Any] = []
    generate = trainer.stage.sampler.engine.generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        found.extend(completion for row in made for completion in row)
        return made

    trainer.stage.sampler.engine.generate = recorded
    return found


def often_flat(completions: list[str], **columns: Any) -> list[float]:
    return [float("1" in text) for text in completions]


CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, refills": {"dynamic_sampling": True, "reward_funcs": often_flat, "max_sampling_rounds": 3},
    "grpo, replay": {"replay_size": 8, "reward_funcs": often_flat},
    "grpo, several steps": {"steps_per_generation": 2},
    "ppo": {"num_iterations": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_each_completion_once_with_its_advantage(tmp_path: Path, case: str) -> None:
    trainer = make(
        case.split(",")[0], tmp_path, learning_rate=1e-3, max_steps=4, log_completions=True, temperature=1.2,
        **CASES[case],
    )  # fmt: skip
    sampled = sampled_by(trainer)
    trainer.train()
    written = rows(tmp_path)
    assert len(written) == len(sampled)
    keys = {(row["step"], row["prompt_index"], row["sample"]) for row in written}
    assert len(keys) == len(written) or CASES[case].get("dynamic_sampling")
    by_text: dict[str, list[Any]] = {}
    for completion in sampled:
        by_text.setdefault(completion.text, []).append(completion)
    for row in written:
        twins = by_text[row["completion"]]
        advantages = [
            sum(c.token["advantages"]) / len(c.token_ids) if "advantages" in c.token else c.sequence.get("advantages")
            for c in twins
        ]
        assert row["advantage"] in [None if a is None else pytest.approx(a) for a in advantages]
    trained = [row for row in written if row["advantage"] is not None]
    assert len(trained) == len(written) or {"dynamic_sampling", "replay_size"} & set(CASES[case])
    assert any(row["advantage"] != 0 for row in trained)


def test_columns_and_metrics_that_rewards_log(tmp_path: Path) -> None:
    """Columns stand in the transcripts, metrics in the logs, of evaluations too; a name that is taken moves aside."""

    def reward(completions: list[str], log_extra: Any, log_metric: Any, trainer_state: Any, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_extra("odd", [{("a", 1): object()}] * len(completions))  # JSON knows neither
        log_metric("step_seen", trainer_state.global_step)
        log_metric("reward", 100.0)
        log_metric("step", -1.0)
        return [float(len(text) % 5) for text in completions]

    trainer = grpo(
        tmp_path, rewards=reward, eval_dataset=PROMPTS[:2], log_completions=True, logging_steps=1, eval_steps=1,
        eval_strategy="steps", save_strategy="steps", save_steps=1, steps_per_generation=2, logprob_check_bound=1.0,
    )  # fmt: skip
    trainer.train()
    written = [*rows(tmp_path), *rows(tmp_path, "eval_transcripts.jsonl")]
    assert all(row["extra"]["length"] == len(row["completion"]) for row in written)
    logs = [row for row in rows(tmp_path, "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in logs] == [1, 2, 3]
    sampled = [row for row in logs if "reward" in row]
    assert [row["step_seen"] for row in sampled] == [0.0, 2.0]
    assert all(row["reward"] < 5 and row["logged/reward"] == 100.0 and row["logged/step"] == -1.0 for row in sampled)
    held_out = [row for row in rows(tmp_path, "metrics.jsonl") if "eval_loss" in row]
    assert [row["eval_step_seen"] for row in held_out] == [1.0, 2.0, 3.0]
    assert all(row["eval_reward"] < 5 and row["eval_logged/reward"] == 100.0 for row in held_out)
