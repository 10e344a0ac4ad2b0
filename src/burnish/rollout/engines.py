"""Choice of the in-process engine for a model."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from burnish.model.scoring import causal_lm
from burnish.model.self_test import supports_prefix
from burnish.rollout.lockstep import LockstepEngine
from burnish.rollout.native import NativeEngine

__all__ = ["make_engine"]

_logger = logging.getLogger(__name__)


def make_engine(
    model: nn.Module,
    tokenizer: Any,
    *,
    max_running: int = 64,
    max_cache_tokens: int | None = None,
    compile_forward: bool = False,
) -> NativeEngine | LockstepEngine:
    """Make the in-process engine for a model: `LockstepEngine` where completions cannot share a prompt.

    Args:
        model: a transformers causal language model, bare or with peft adapters (which stay active).
        tokenizer: decodes texts.
        max_running: most completions decoded together.
        max_cache_tokens: most tokens in the cache, or None.
        compile_forward: compile the decode forward of the native engine.
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
        )
    _logger.warning("rollouts of %s: one row per completion, because %s", type(lm).__name__, support.reason)
    if compile_forward:
        _logger.warning(
            "compile_rollouts = True has no effect on %s: only the native engine compiles", type(lm).__name__
        )
    return LockstepEngine(model, tokenizer, max_running=max_running, max_cache_tokens=max_cache_tokens)
