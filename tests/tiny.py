"""Tiny models and a tokenizer, built here: no download, no real weights."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from burnish.model.masters import MasterWeights

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, plus roles and EOS."""
    characters = string.digits + string.ascii_letters + " +-=<>/.,?!:\n"
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<unk>", *characters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48, "attn_pdrop": 0.0,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
                "experts_implementation": "eager"},
}  # fmt: skip


def model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of an architecture, in evaluation mode."""
    sizes = {k: v for k, v in SIZES.items() if kind != "gpt2" or k in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(kind, **{**sizes, **ARCHITECTURES.get(kind, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in made.parameters():
            # Larger than the usual 0.02: distributions must be far from uniform for a mistake to show.
            torch.nn.init.normal_(parameter, std=0.2)
    made.generation_config.eos_token_id = 0
    made.generation_config.pad_token_id = 0
    return made.to(dtype).eval()


def exact_weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of what an optimizer trains: the fp32 masters where it has some, else the parameters."""
    if isinstance(optimizer, MasterWeights):
        return [master.clone() for master in optimizer.masters]
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def move(model: Any, size: float, seed: int = 7) -> None:
    """Add noise of a standard deviation to all trainable weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
