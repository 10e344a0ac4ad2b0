"""Choice of the in-process engine for a model."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from burnish.model.scoring import causal_lm
from burnish.model.self_test import supports_prefix
from burnish.planner.memory import bounded_tokens
from burnish.rollout.decoding import sampling_mode
from burnish.rollout.lockstep import LockstepEngine
from burnish.rollout.native import NativeEngine
from burnish.rollout.stored import bytes_in_8_bits

__all__ = ["cache_tokens", "make_engine"]

_logger = logging.getLogger(__name__)


def make_engine(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_running: int = 64,
    max_cache_tokens: int | None = None,
    compile_forward: bool | Literal["unfused"] = False,
    cache_dtype: Literal["int8"] | None = None,
) -> NativeEngine | LockstepEngine:
    """Make the in-process engine for a model: `LockstepEngine` where completions cannot share a prompt.

    Args:
        model: a transformers causal language model, bare or with peft adapters (which stay active).
        tokenizer: decodes texts.
        max_running: most completions decoded together.
        max_cache_tokens: most tokens in the cache, or None.
        compile_forward: compile the decode forward of the native engine, or do so unless its layers are fused.
        cache_dtype: dtype of the native engine's keys and values; None for the model's.
    """
    lm = causal_lm(model)
    support = supports_prefix(lm)
    if support.ok:
        _logger.info("rollouts of %s: native engine, each prompt read once per group", type(lm).__name__)
        return NativeEngine(
            model,
            tokenizer,
            max_running=max_running,
            max_cache_tokens=max_cache_tokens,
            compile_forward=compile_forward,
            cache_dtype=cache_dtype,
        )
    _logger.warning("rollouts of %s: one row per completion, because %s", type(lm).__name__, support.reason)
    if compile_forward is True:
        _logger.warning(
            "compile_rollouts = True has no effect on %s: only the native engine compiles", type(lm).__name__
        )
    if cache_dtype is not None:
        _logger.warning(
            'rollout_cache_dtype = "%s" has no effect on %s: its cache is transformers\' own, in the model\'s dtype',
            cache_dtype, type(lm).__name__,
        )  # fmt: skip
    return LockstepEngine(model, tokenizer, max_running=max_running, max_cache_tokens=max_cache_tokens)


def cache_tokens(
    model: nn.Module, gib: float, *, prompt: int, completion: int, cache_dtype: Literal["int8"] | None = None
) -> int | None:
    """Return how many tokens' keys and values fit in so much memory; None for a model that keeps none.

    Args:
        model: a transformers causal language model, bare or with peft adapters.
        gib: memory in GiB.
        prompt: tokens of the longest prompt.
        completion: most tokens of a completion.
        cache_dtype: as in `make_engine`.

    Raises:
        ConfigError: a single completion does not fit.
    """
    lm: Any = causal_lm(model)
    in_8_bits = cache_dtype == "int8" and supports_prefix(lm).ok

    def held(tokens: int) -> int:
        row = torch.ones(1, tokens, dtype=torch.long, device=lm.device)
        cache = lm(input_ids=row, use_cache=True).get("past_key_values")
        tensors = (value for layer in getattr(cache, "layers", ()) for value in vars(layer).values())
        return sum(
            bytes_in_8_bits(value) if in_8_bits and value.is_floating_point() else value.nbytes
            for value in tensors
            if isinstance(value, torch.Tensor)
        )

    with sampling_mode(model):
        per_token = held(2) - held(1)
    if per_token == 0:
        return None
    return bounded_tokens(gib, per_token, prompt=prompt, completion=completion)
