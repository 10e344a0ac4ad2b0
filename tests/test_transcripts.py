"""Transcripts: each sampled completion once, with the advantage it trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from test_finite import make


def rows(folder: Path, name: str = "transcripts.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().split("\n") if line]


def sampled_by(trainer: Any) -> list[Any]:
    """Every completion that the trainer's engine returns, as it is at the end."""
    found: list[Any] = []
    generate = trainer.engine.generate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        found.extend(completion for row in made for completion in row)
        return made

    trainer.engine.generate = recorded
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
            sum(c.token_advantages) / len(c.token_ids) if c.token_advantages is not None else c.advantage for c in twins
        ]
        assert row["advantage"] in [None if a is None else pytest.approx(a) for a in advantages]
    trained = [row for row in written if row["advantage"] is not None]
    assert len(trained) == len(written) or {"dynamic_sampling", "replay_size"} & set(CASES[case])
    assert any(row["advantage"] != 0 for row in trained)
