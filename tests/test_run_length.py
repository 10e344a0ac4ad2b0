"""The line that says, before the first step, what a run will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import burnish
from burnish.training.run_length import describe_run_length
from test_trainers import grpo, recorded, settings, sft


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("SFT", {"gradient_accumulation_steps": 2, "max_length": 100},
         "sft: 10 steps of 16 rows; at most 100 tokens a sequence, 16,000 in all"),
        ("SFT", {"max_length": None}, "sft: 10 steps of 8 rows, of any length"),
        ("Reward", {"max_length": 100}, "reward: 10 steps of 8 rows; at most 100 tokens a sequence, 16,000 in all"),
        ("DPO", {"max_length": 100}, "dpo: 10 steps of 8 rows; at most 100 tokens a sequence, 16,000 in all"),
        ("KTO", {"max_length": 100}, "kto: 10 steps of 8 rows; at most 100 tokens a sequence, 8,000 in all"),
        ("GRPO", {},
         "grpo: 10 steps; 10 rollouts of 8 completions, 8 to a prompt; at most 512 tokens each, 40,960 in all"),
        ("RLOO", {"max_completion_length": 10, "num_generations": 4, "steps_per_generation": 4},
         "rloo: 10 steps; 3 rollouts of 32 completions, 4 to a prompt; at most 10 tokens each, 960 in all"),
        ("GRPO", {"max_completion_length": 10, "num_iterations": 2, "dynamic_sampling": True, "max_sampling_rounds": 3},
         "grpo: 10 steps; 5 rollouts of up to 24 completions, 8 to a prompt; at most 10 tokens each, 1,200 in all"),
        ("OnlineDPO", {"max_completion_length": 10, "num_generations": 2},
         "online_dpo: 10 steps; 10 rollouts of 8 completions, 2 to a prompt; at most 10 tokens each, 800 in all"),
        ("PPO", {"max_completion_length": 10},
         "ppo: 10 steps; 3 rollouts of 8 completions, 1 to a prompt; at most 10 tokens each, 240 in all"),
    ],
)  # fmt: skip
def test_every_stage_counts_by_hand(tmp_path: Path, stage: str, changes: dict[str, Any], expected: str) -> None:
    config = getattr(burnish, f"{stage}Config")
    args = config(**settings(tmp_path, **{"per_device_train_batch_size": 8, **changes}))
    assert describe_run_length(args, first_step=0, max_steps=10) == expected


def test_a_run_says_what_it_will_do_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"progress": True, "save_strategy": "steps", "save_steps": 2}
    sft(tmp_path / "sft", **changes).train()
    trainer = grpo(tmp_path / "grpo", **changes)
    steps = recorded(trainer)
    trainer.train()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[burnish] sft: 3 steps of 8 rows; at most 1024 tokens a sequence, 24,576 in all"
    first = "[burnish] grpo: 3 steps; 3 rollouts of 12 completions, 4 to a prompt; at most 8 tokens each, 288 in all"
    lines = [line for line in lines if line.startswith("[burnish] grpo")]
    assert lines[0] == first
    sampled = sum(len(c.token_ids) for group in steps[-1] for c in group.completions)
    assert 0 < sampled <= 12 * 8
    grpo(tmp_path / "grpo", **changes).train(resume_from_checkpoint=str(tmp_path / "grpo" / "checkpoint-2"))
    assert "grpo: 1 steps, 3 to 3; 1 rollouts of 12 completions" in capsys.readouterr().err
