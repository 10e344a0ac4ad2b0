"""Trace a rollout: the native engine's own prefill and decode forward on fake tensors, with made-up tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from burnish.planner.rollout import Wave
from burnish.rollout.engine import Request, SamplingParams
from burnish.rollout.native import NativeEngine
from burnish.rollout.sampling import SamplingBatch, draw
from burnish.training.ledger import Ledger, Peak

__all__ = ["trace_rollout"]


class _TracedEngine(NativeEngine):
    """The native engine on fake tensors: the first draw of a completion stands for all of its tokens but the last.

    The cache has its full size from the first prefill on, where it would grow with the completions, so that a prefill
    and a decode forward are both counted beside a full cache. Guesses and packed weights are not traced.
    """

    def __init__(self, model: Any, tokenizer: Any, ledger: Ledger, **fields: Any) -> None:
        super().__init__(model, tokenizer, pack_weights=False, speculate=False, **fields)
        self._ledger = ledger

    def _new_run(self, prompts: Any, seed: int, step: int) -> Any:
        run: Any = super()._new_run(prompts, seed, step)
        run.own_tokens = max(prompt.request.params.max_new_tokens for prompt in prompts)
        run.cache._allocate = _counted(self._ledger, "key-value cache", run.cache._allocate)
        run.cache.reserve = _counted(self._ledger, "key-value cache", run.cache.reserve)
        return run

    def _head(self, hidden: Tensor) -> Tensor:
        with self._ledger.component("logits"):
            return super()._head(hidden)

    def _draw(self, logits: Tensor, rows: Sequence[Any], guesses: Any = (), width: Any = None) -> list[bool]:
        tracks: list[Any] = [row.track for row in rows]
        with self._ledger.component("logits"):
            draw(
                logits,
                torch.zeros(len(tracks), dtype=torch.float64),
                SamplingBatch.of([track.request.params for track in tracks]),
                scale=self._spec.scale,
                softcap=self._spec.softcap,
            )
        for track in tracks:
            most = track.request.params.max_new_tokens
            track.completion.token_ids += [0] * (1 if track.length else max(most - 1, 1))
        return [track.length == track.request.params.max_new_tokens for track in tracks]


def trace_rollout(model: Any, tokenizer: Any, wave: Wave, ledger: Ledger) -> Peak:
    """Run the prefill of a wave's prompts and a decode forward of its rows at full length; count their bytes.

    Components: key-value cache, logits (with the temporaries of sampling, without truncation or penalty) and
    activations, beside what is alive before.

    Args:
        model: of fake tensors, in their mode.
        tokenizer: of the run.
        wave: completions that are sampled together.
        ledger: counts, and knows what is alive.
    """
    cache_dtype = "int8" if wave.in_8_bits else None
    engine = _TracedEngine(model, tokenizer, ledger, max_cache_tokens=wave.bound, cache_dtype=cache_dtype)
    sizes = [min(wave.group, wave.rows - first) for first in range(0, wave.rows, wave.group)]
    params = SamplingParams(wave.completion)
    requests = [Request([0] * wave.prompt, size, params, index) for index, size in enumerate(sizes)]
    with ledger.phase() as peak:
        engine.generate(requests, seed=0, step=0)
    return peak


def _counted(ledger: Ledger, component: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Count what a method makes under a component."""

    @wraps(method)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with ledger.component(component):
            return method(*args, **kwargs)

    return counted
