"""Sampling parameters of online stages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from burnish.errors import ConfigError
from burnish.model.sources import find_model, reach
from burnish.rollout import SamplingParams, eos_token_ids

__all__ = ["known_ends", "sampling_params"]


def sampling_params(args: Any, model: Any, tokenizer: Any) -> SamplingParams:
    """Return the sampling parameters of a config, with every token that ends a completion.

    Raises:
        ConfigError: nothing would end a completion.
    """
    ends = eos_token_ids(model, tokenizer)
    if not ends and not args.stop:
        raise ConfigError(
            "neither the tokenizer nor the model's generation_config has an eos_token, so every completion would "
            "run to max_completion_length: set tokenizer.eos_token, or stop."
        )
    return SamplingParams(
        max_new_tokens=args.max_completion_length,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        stop=tuple(args.stop or ()),
        eos_token_ids=ends,
    )


def known_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end a completion of a model whose weights need not be loaded yet."""
    if isinstance(model, str | Path):
        source = find_model(model)
        try:
            known = None if source.gguf_file else GenerationConfig.from_pretrained(reach(source))
        except (OSError, ValueError):  # it has none
            known = None
        model = SimpleNamespace(generation_config=known)
    return eos_token_ids(model, tokenizer)
