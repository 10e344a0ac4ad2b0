"""Rollouts of models that cannot share a prompt: every token is one of the model's own forward over the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from burnish.rollout import Request, SamplingParams, make_engine
from burnish.rollout.lockstep import LockstepEngine

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
STATE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRIDS: dict[str, dict[str, Any]] = {
    "jamba": {
        **HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "bamba": {**HEADS, **STATE, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **HEADS, **STATE, **EXPERTS, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"],
    },
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "minimax": {
        **HEADS, **EXPERTS, "head_dim": 8, "block_size": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "lru_width": 32,
        "attention_window_size": 8,
    },
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 48},
    "xlstm": {"hidden_size": 64, "num_blocks": 2, "num_heads": 4, "chunk_size": 8},
    "bloom": {"num_attention_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", HYBRIDS)
def test_tokens_are_those_of_whole_rows(kind: str) -> None:
    """Where the model's cache loses a state, cannot drop a row, or does not exist, whole rows are read instead."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **HYBRIDS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    engine = make_engine(model, tiny.tokenizer())
    assert isinstance(engine, LockstepEngine)
    prompts = [[3, 4, 5], [7, 8, 9]]
    params = SamplingParams(12, eos_token_ids=tuple(range(12)))  # many rows leave early
    groups = engine.generate([Request(prompt, 6, params) for prompt in prompts], seed=0, step=0)
    assert len({len(completion.token_ids) for group in groups for completion in group}) > 2
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logprobs = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            expected = logprobs[range(len(prompt) - 1, ids.shape[1] - 1), completion.token_ids]
            torch.testing.assert_close(torch.tensor(completion.policy_logprobs), expected, rtol=0, atol=1e-3)
