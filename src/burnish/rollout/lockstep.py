"""Rollouts of models whose completions cannot share a prompt (state-space layers, ALiBi, ...): one row each.

A batch holds prompts of equal length that decode in lockstep without padding, which would change the output of such
models. They use transformers' own cache where it reproduces uncached logits; otherwise every token recomputes its row.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import EngineError
from burnish.model.scoring import causal_lm
from burnish.model.tiled_head import HeadSpec
from burnish.rollout.decoding import (
    OnProgress,
    RolloutStats,
    Track,
    Vocabulary,
    check_bounds,
    check_request_lengths,
    draw_for,
    sampling_mode,
)
from burnish.rollout.engine import Engine, Request
from burnish.rollout.validation import check_requests
from burnish.types import Completion

__all__ = ["LockstepEngine"]

_logger = logging.getLogger(__name__)

_MAX_NATS = 1e-3
_MAX_NATS_HALF = 0.25
"""Largest difference between cached and uncached log-probabilities; a lost state shows as whole nats."""


class LockstepEngine(Engine):
    """Engine for any causal language model of transformers, with the model's own cache.

    Args:
        model: a transformers causal language model, bare or with peft adapters (which stay active).
        tokenizer: decodes texts.
        max_running: most completions decoded together.
        max_cache_tokens: most tokens of prompts and completions held together; None for no bound.

    Raises:
        ConfigError: a bound below 1.
    """

    stops_settled = True

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, max_running: int = 64, max_cache_tokens: int | None = None
    ) -> None:
        check_bounds(max_running, max_cache_tokens)
        self._model = model
        self._lm = causal_lm(model)
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._max_running = max_running
        self._max_cache_tokens = max_cache_tokens
        keeps = "logits_to_keep" in inspect.signature(type(self._lm).forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self._cached: bool | None = None
        self.version = 0
        self.last_stats = RolloutStats()

    def generate(
        self, requests: Sequence[Request], *, seed: int, step: int, on_progress: OnProgress | None = None
    ) -> list[list[Completion]]:
        """Sample completions of each request, in order; see `NativeEngine.generate`."""
        check_requests(requests)
        check_request_lengths(requests, self._lm)
        self.last_stats = stats = RolloutStats()
        started = time.perf_counter()
        tracks = [
            [Track(request, sample, self._tokenizer, seed=seed, step=step) for sample in range(request.num_samples)]
            for request in requests
        ]
        total, finished = sum(map(len, tracks)), 0
        sampling, ended = list(tracks), set[Track]()
        with sampling_mode(self._model):
            for batch in self._batches([track for group in tracks for track in group]):
                stats.peak_rows = max(stats.peak_rows, len(batch))
                for number in self._run(batch):
                    finished += number
                    if on_progress is not None:
                        on_progress(finished, total, stats.decoded_tokens)
                ended.update(batch)
                for group in [group for group in sampling if ended.issuperset(group)]:
                    sampling.remove(group)
                    if (on_done := group[0].request.on_done) is not None:
                        on_done([track.finish(self._tokenizer) for track in group])
        stats.seconds = time.perf_counter() - started
        return [[track.finish(self._tokenizer) for track in group] for group in tracks]

    def sync(self, version: int) -> None:
        """Record the version: the engine samples the trainer's own weights, so nothing is copied."""
        self.version = version

    def close(self) -> None:
        """Do nothing: no resources are held between calls."""

    def _batches(self, tracks: list[Track]) -> Iterator[list[Track]]:
        """Batch tracks with prompts of equal length, as many as the bounds allow."""
        by_length: dict[int, list[Track]] = {}
        for track in tracks:
            by_length.setdefault(len(track.request.prompt_ids), []).append(track)
        for length, group in sorted(by_length.items()):
            longest = length + max(track.request.params.max_new_tokens for track in group)
            rows = self._max_running
            if self._max_cache_tokens is not None:
                rows = min(rows, self._max_cache_tokens // longest)
            if rows < 1:
                raise EngineError(
                    f"max_cache_tokens = {self._max_cache_tokens}: one completion of a prompt of {length} tokens may "
                    f"take {longest}; raise max_cache_tokens or lower max_new_tokens."
                )
            yield from (group[start : start + rows] for start in range(0, len(group), rows))

    def _run(self, batch: list[Track]) -> Iterator[int]:
        """Decode one batch; yield the number of completions that each forward ended."""
        device = self._lm.device
        rows: list[Track | None] = list(batch)
        new = torch.tensor([list(track.request.prompt_ids) for track in batch], device=device)
        self.last_stats.prompt_tokens += new.numel()
        cache: dict[str, Any] = {}
        tokens = new
        while True:
            logits, cache = self._cached_logits(new, cache) if self._can_cache() else (self._logits(tokens), {})
            live = [row for row, track in enumerate(rows) if track is not None]
            tracks = [track for track in rows if track is not None]
            ended = draw_for(logits[live], tracks, HeadSpec(), self._vocabulary)
            self.last_stats.decoded_tokens += len(tracks)
            self.last_stats.forwards += 1
            for row, is_done in zip(live, ended, strict=True):
                rows[row] = None if is_done else rows[row]
            yield sum(ended)
            if all(ended):
                return
            live = [row for row, track in enumerate(rows) if track is not None]
            # Reordering copies the cache: finished rows run idle until they are half of all.
            if 2 * len(live) <= len(rows):
                rows, tokens = [rows[row] for row in live], tokens[live]
                _reorder(cache, live)
            new = torch.tensor([[track.last_token if track else 0] for track in rows], device=device)
            tokens = torch.cat((tokens, new), dim=1)

    def _cached_logits(self, tokens: Tensor, cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return [B, V] last logits and the cache, keyed by the forward's argument name."""
        output = self._lm(input_ids=tokens, use_cache=True, **self._last_only, **cache)
        for name in ("past_key_values", "cache_params"):
            if output.get(name) is not None:
                return output.logits[:, -1], {name: output[name]}
        raise EngineError(f"{type(self._lm).__name__} returned no cache")

    def _logits(self, tokens: Tensor) -> Tensor:
        """Return [B, V] last logits of whole rows, without a cache."""
        return self._lm(input_ids=tokens, use_cache=False, **self._last_only).logits[:, -1]

    def _can_cache(self) -> bool:
        """Test once that cached decoding reproduces the logits of whole rows, also after rows are dropped."""
        if self._cached is None:
            try:
                worst = self._probe_cache()
            except Exception as error:  # third-party caches may fail in any way; the reason is logged
                reason = f"{type(error).__name__}: {error}"
            else:
                bound = _MAX_NATS if self._lm.dtype in (torch.float32, torch.float64) else _MAX_NATS_HALF
                reason = "" if worst <= bound else f"log-probabilities differ by {worst:.2g} nats"
            self._cached = not reason
            if reason:
                _logger.warning(
                    "rollouts of %s: its cache cannot be used (%s), so each token recomputes its whole row: slow.",
                    type(self._lm).__name__, reason,
                )  # fmt: skip
        return self._cached

    def _probe_cache(self) -> float:
        """Return the largest cached-uncached difference in nats, before and after one of three rows is dropped."""
        size = min(int(self._lm.get_input_embeddings().weight.shape[0]), 64)
        tokens = torch.randint(size, (3, 8), generator=torch.Generator().manual_seed(0)).to(self._lm.device)
        cache: dict[str, Any] = {}
        worst, start = 0.0, 0
        for stop in (5, 6, 7, 8):
            logits, cache = self._cached_logits(tokens[:, start:stop], cache)
            difference = logits.float().log_softmax(-1) - self._logits(tokens[:, :stop]).float().log_softmax(-1)
            worst, start = max(worst, float(difference.abs().max().nan_to_num(torch.inf))), stop
            if stop == 6:
                tokens = tokens[[0, 2]]
                _reorder(cache, [0, 2])
        return worst


def _reorder(cache: dict[str, Any], kept: list[int]) -> None:
    for held in cache.values():
        held.reorder_cache(torch.tensor(kept))
