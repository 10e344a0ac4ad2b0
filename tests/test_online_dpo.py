"""Online DPO: pairs from own samples, whole whatever the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import ConfigError, OnlineDPOConfig, OnlineDPOTrainer
from test_trainers import PROMPTS, assert_same, digits, settings, weights


def online_dpo(folder: Path, rewards: Any = digits, **changes: Any) -> OnlineDPOTrainer:
    defaults = {"per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 8, "optim": "sgd"}
    args = OnlineDPOConfig(**settings(folder, **{**defaults, **changes}))
    return OnlineDPOTrainer(tiny.model(), rewards, args, PROMPTS, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
@pytest.mark.parametrize(
    "split", [{"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}, {"token_budget": 30}]
)
def test_it_is_independent_of_the_split(tmp_path: Path, split: dict[str, int], loss_type: str) -> None:
    whole = online_dpo(tmp_path / "a", loss_type=loss_type)
    whole.train()
    parts = online_dpo(tmp_path / "b", loss_type=loss_type, **split)
    parts.train()
    assert_same(weights(whole), weights(parts), 2e-6)


def test_the_best_is_preferred_to_the_worst(tmp_path: Path) -> None:
    trainer = online_dpo(tmp_path, max_steps=1)
    seen: list[Any] = []
    algorithm: Any = trainer.stage.algorithm
    begin = algorithm.begin_step
    algorithm.begin_step = lambda groups, **k: seen.append((groups, begin(groups, **k))) or seen[-1][1]
    trainer.train()
    groups, pairs = seen[0][0], seen[0][1].groups
    assert len(groups) == 3
    for pair in pairs:
        rewards = [c.reward for group in groups if group.index == pair.index for c in group.completions]
        assert [c.reward for c in pair.completions] == [max(rewards), min(rewards)]
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are one at the start"


def test_it_learns(tmp_path: Path) -> None:
    trainer = online_dpo(tmp_path, max_steps=40, optim="adamw_torch", learning_rate=3e-3)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


def test_equal_rewards_make_no_pair_and_no_update(tmp_path: Path) -> None:
    trainer = online_dpo(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    assert_same(before, weights(trainer), 0.0)


def test_a_failed_reward_is_neither_best_nor_worst(tmp_path: Path) -> None:
    def partly(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if i % 2 else float(i) for i in range(len(completions))]

    trainer = online_dpo(tmp_path, rewards=partly, max_steps=1)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[0]["loss"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 6}, "each process needs whole groups; use a multiple of 4"),
        ({"loss_type": "aot"}, "loss_type = 'aot': use one of sigmoid"),
        ({"beta": 0.0}, "beta = 0.0: use a number above 0"),
    ],
)
def test_bad_values_name_the_fix(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        online_dpo(tmp_path, **changes)
