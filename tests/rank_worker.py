"""Trains a tiny model under whatever launcher started it and saves the weights: run by test_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer

import test_preference_trainer
import tiny
from burnish import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from dialects import speaker
from test_agents import ROWS, STOPS, Quiz, spread
from test_policy_trainer import only_even
from test_reward_trainer import PAIRS
from test_trainers import PROMPTS, TEXTS, digits, settings

ONLINE: dict[str, Any] = {"max_completion_length": 8, "logprob_check_bound": 1.0, "log_completions": True}
LOGGED = {
    "sft": ("entropy", "num_tokens"),
    "stream": ("entropy", "num_tokens"),
    "dynamic": ("sampling/rounds", "sampling/extra_completions", "frac_reward_zero_std"),
    "ppo": ("value/loss", "value/explained_variance", "value/grad_norm"),
    "kto": ("kl", "rewards/margins"),
    "dpo": ("rewards/margins",),
}


def make(stage: str, model: Any, shared: dict[str, Any]) -> Trainer:
    """The trainer of a stage; the name of a loss is GRPO with that loss."""
    common: dict[str, Any] = {"processing_class": tiny.tokenizer()}
    match stage:
        case "sft" | "stream":
            rows = TEXTS if stage == "sft" else iter(TEXTS[:19])
            return SFTTrainer(model, SFTConfig(**shared), train_dataset=rows, **common)
        case "reward":
            return RewardTrainer(model, RewardConfig(**shared), train_dataset=PAIRS, **common)
        case "dpo":
            # aot sorts the pairs of all ranks.
            args = DPOConfig(**shared, loss_type=["sigmoid", "aot"], loss_weights=[1.0, 0.5])
            return DPOTrainer(model, args=args, train_dataset=test_preference_trainer.PAIRS, **common)
        case "kto":
            rows = test_preference_trainer.LABELLED
            return KTOTrainer(model, args=KTOConfig(**shared), train_dataset=rows, **common)
        case "ppo":
            args = PPOConfig(**shared, **ONLINE, num_iterations=1, beta=0.1)
            return PPOTrainer(args, model=model, reward_funcs=digits, train_dataset=PROMPTS, **common)
        case "dynamic":
            args = GRPOConfig(
                **shared, **ONLINE, num_generations=4, algorithm="dapo", overlong_buffer=None, temperature=1.5
            )
            return GRPOTrainer(model, only_even, args, PROMPTS, **common)
        case "pieces":
            # Two groups of three with long prompts, cut: the last gradient of a step comes from a prompt's own pass.
            args = GRPOConfig(**shared, **ONLINE, num_generations=3, beta=0.1, token_budget=84)
            return GRPOTrainer(model, digits, args, [{"prompt": str(n) * 75} for n in range(9)], **common)
        case "episodes":
            tokenizer, end = speaker("chatml")
            model = tiny.model(vocab_size=len(tokenizer), max_position_embeddings=2048, dtype=model.dtype)
            model.generation_config.eos_token_id = end
            online = {**ONLINE, "max_completion_length": 60, "stop": STOPS, "num_generations": 4, "beta": 0.1}
            common = {"processing_class": tokenizer, "environment_factory": Quiz}
            # With some seeds a draw lies so near the edge of two tokens that one rounding of a bf16 weight decides it.
            shared = {**shared, "seed": 1}
            return GRPOTrainer(model, spread, GRPOConfig(**shared, **online), ROWS, **common)
        case _:
            args = GRPOConfig(**shared, **ONLINE, num_generations=4, loss_type=stage, beta=0.1)
            return GRPOTrainer(model, digits, args, PROMPTS, **common)


def main(stage: str, folder: Path, per_device: int, dtype: str, resume: str = "") -> None:
    """One short run, or the rest of one; a stage with a "+" keeps samples in flight and a checkpoint of each step."""
    launched = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    shared: dict[str, Any] = settings(
        folder, per_device_train_batch_size=per_device, bf16=dtype == "bfloat16", optim="sgd", **launched
    )
    if stage.endswith("+"):
        shared |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "steps_per_generation": 2}
        shared |= {"resume_from_checkpoint": resume or None}
    trainer = make(stage.rstrip("+"), tiny.model(dtype=getattr(torch, dtype)), shared)
    own = cast(Any, trainer)
    own.create_optimizer()
    start = weights_of(trainer)
    trainer.train()
    if trainer.is_world_process_zero():
        names = ("loss", "reward", "min_reward", "mean_reward", "margin", *LOGGED.get(stage, ()))
        logs = [{k: log[k] for k in names if k in log} for log in trainer.state.log_history]
        found = {
            "start": start,
            "weights": weights_of(trainer),
            "logs": logs,
            "wrapper": type(own.model_wrapped).__name__,
        }
        torch.save(found, folder / "result.pt")


def weights_of(trainer: Trainer) -> list[torch.Tensor]:
    """What is trained, PPO's critic too, as exactly as it is known."""
    optimizer = cast(Any, trainer).master_weights or cast(torch.optim.Optimizer, trainer.optimizer)
    weights = tiny.exact_weights(optimizer)
    return weights + (
        tiny.exact_weights(trainer.stage.algorithm.critic.optimizer) if isinstance(trainer, PPOTrainer) else []
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
