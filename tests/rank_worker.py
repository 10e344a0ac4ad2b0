"""Trains a tiny model under whatever launcher started it and saves the weights: run by test_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer

import tiny
from burnish import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from test_reward_trainer import PAIRS
from test_trainers import PROMPTS, TEXTS, digits, settings


def main(stage: str, folder: Path, per_device: int, dtype: str) -> None:
    """One short run."""
    launched = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    shared: dict[str, Any] = settings(
        folder, per_device_train_batch_size=per_device, bf16=dtype == "bfloat16", optim="sgd", **launched
    )
    model, tokenizer = tiny.model(dtype=getattr(torch, dtype)), tiny.tokenizer()
    trainer: Trainer
    if stage in ("sft", "stream"):
        rows = TEXTS if stage == "sft" else iter(TEXTS[:19])
        trainer = SFTTrainer(model, SFTConfig(**shared), train_dataset=rows, processing_class=tokenizer)
    elif stage == "reward":
        trainer = RewardTrainer(model, RewardConfig(**shared), train_dataset=PAIRS, processing_class=tokenizer)
    else:
        args = GRPOConfig(
            **shared, num_generations=4, max_completion_length=8, loss_type=stage, beta=0.1, logprob_check_bound=1.0,
            log_completions=True,
        )  # fmt: skip
        trainer = GRPOTrainer(model, digits, args, PROMPTS, processing_class=tokenizer)
    own = cast(Any, trainer)
    own.create_optimizer()
    masters = own.master_weights
    trained = list(own.model.parameters()) if masters is None else masters.masters
    start = [w.detach().clone() for w in trained]
    trainer.train()
    if trainer.is_world_process_zero():
        masters = own.master_weights
        weights = list(own.model.parameters()) if masters is None else masters.masters
        names = ("loss", "reward", "min_reward", "mean_reward", "margin")
        names += ("entropy", "num_tokens") if stage in ("sft", "stream") else ()
        logs = [{k: log[k] for k in names if k in log} for log in trainer.state.log_history]
        torch.save({"start": start, "weights": [w.detach() for w in weights], "logs": logs}, folder / "result.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
