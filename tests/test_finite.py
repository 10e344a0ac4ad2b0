"""A model whose weights are not finite is never saved, by whatever path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from burnish import (
    CheckFailed,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from burnish.model.finite import non_finite_weights

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no"} for i in range(8)]
PROMPTS = [{"prompt": row["prompt"], "difficulty": i, "answer": row["chosen"]} for i, row in enumerate(PAIRS)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "dpo": PAIRS,
    "kto": PAIRS,
    "reward": PAIRS,
}
TRAINERS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
}


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isdigit() for c in text) / 8 for text in completions]


def make(kind: str, folder: Path, *, peft_config: Any = None, **changes: Any) -> Any:
    trainer, config = TRAINERS[kind]
    online = kind not in ROWS
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "learning_rate": 1e38,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "progress": False,
        "per_device_train_batch_size": 8,
    }
    if online:
        fields |= {"num_generations": 4, "max_completion_length": 8}
    own: dict[str, Any] = {"reward_funcs": changes.pop("reward_funcs", digits)} if online else {}
    if "ref_model" in changes:
        own["ref_model"] = changes.pop("ref_model")
    return trainer(
        model=tiny.model(),
        args=config(**{**fields, **changes}),
        train_dataset=[
            {"prompt": row["prompt"], "difficulty": i, "answer": row["chosen"]} for i, row in enumerate(PAIRS)
        ]
        if online
        else ROWS[kind],
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        **own,
    )


def weight_files(folder: Path) -> list[Path]:
    return [*folder.rglob("*.safetensors"), *folder.rglob("*.bin"), *folder.rglob("complete")]


@pytest.mark.parametrize(
    ("kind", "bf16"), [*((kind, False) for kind in sorted(TRAINERS)), ("sft", True), ("ppo", True)]
)
def test_overflowed_weights_are_saved_by_no_stage(tmp_path: Path, kind: str, bf16: bool) -> None:
    trainer = make(kind, tmp_path, bf16=bf16)
    trainer.train()
    with pytest.raises(CheckFailed, match=r"weights are not finite.*lower learning_rate"):
        trainer.save_model()
    assert weight_files(tmp_path) == []


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_checkpoint_of_them_is_refused(tmp_path: Path, kind: str) -> None:
    trainer = make(kind, tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(CheckFailed, match=r"step 1, the model: .* not finite"):
        trainer.train()
    assert weight_files(tmp_path) == []


def test_adapters_are_read_and_their_frozen_base_is_not(tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = make("sft", tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer.train()
    assert all("lora" in name for name in non_finite_weights(trainer.model))
    with pytest.raises(CheckFailed, match="lora"):
        trainer.save_model()


def test_a_critic_that_overflows_keeps_the_policy_from_being_saved_without_it(tmp_path: Path) -> None:
    trainer = make("ppo", tmp_path, learning_rate=1e-6, value_learning_rate=1e38)
    trainer.train()
    with pytest.raises(CheckFailed, match="value_model: "):
        trainer.save_model()
    with pytest.raises(CheckFailed, match="the critic: "):
        trainer.stage.algorithm.critic.save(tmp_path / "critic")
    assert weight_files(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_value_in_a_million_is_found(value: float, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(1000, 1000).to(dtype)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(dtype).max)  # the largest finite values are no false alarm
        assert non_finite_weights(model) == []
        model.weight[123, 456] = value
    assert non_finite_weights(model) == ["weight"]
