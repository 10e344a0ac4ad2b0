"""Sampling parameters of online stages."""

from __future__ import annotations

from typing import Any

from burnish.errors import ConfigError
from burnish.rollout import SamplingParams, eos_token_ids

__all__ = ["sampling_params"]


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
