"""The native engine: rollouts in the trainer's process, with the trainer's weights and continuous batching.

Prompts are packed and prefilled once per group; a decode forward is one row with one token of each running completion;
a waiting completion starts as soon as one finishes. Modules and weights stay transformers' own: only attention is
replaced, through `burnish.model.attention`, by the key-value cache of `cache.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.errors import EngineError
from burnish.model.attention import install, use_layout
from burnish.model.head import head_spec
from burnish.model.scoring import causal_lm
from burnish.model.tiled_head import HeadSpec
from burnish.rollout.cache import CacheLayout, PromptSpan, round_up
from burnish.rollout.decoding import (
    OnProgress,
    RolloutStats,
    Track,
    Vocabulary,
    check_bounds,
    check_requests,
    draw_for,
    sampling_mode,
)
from burnish.rollout.engine import Engine, Request
from burnish.rollout.packed_linears import packed_linears
from burnish.types import Completion

__all__ = ["NativeEngine"]

_PREFILL_TOKENS = 4096
"""Most prompt tokens of one prefill forward, which bounds its activations; a longer prompt is prefilled alone."""
_FIRST_OWN_TOKENS = 64
"""Initial cache length of a row; it doubles as completions grow."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt, its samples, and the logits after its last token, kept until all samples have started."""

    request: Request
    results: list[Completion | None]
    running: int = 0
    next_sample: int = 0
    logits: Tensor | None = None

    @property
    def waiting(self) -> int:
        return self.request.num_samples - self.next_sample


@dataclass(slots=True)
class _Run:
    """State of one `generate`: pending prompts, cached prompts by slot, running completions by row."""

    pending: deque[_Prompt]
    cache: CacheLayout
    seed: int
    step: int
    prompts: list[_Prompt] = field(default_factory=list[_Prompt])
    rows: list[Track] = field(default_factory=list[Track])
    owners: list[_Prompt] = field(default_factory=list[_Prompt])
    own_tokens: int = 0
    finished: int = 0


class NativeEngine(Engine):
    """In-process engine that samples from the model being trained.

    Args:
        model: a transformers causal language model, bare or with peft adapters (which stay active).
        tokenizer: decodes texts.
        max_running: most completions decoded together.
        max_cache_tokens: most tokens in the key-value cache, counting every running completion at its maximum length;
            None for no bound but `max_running`.
        spec: scale and softcap of the logits; None reads them from the model's configuration.
        pack_weights: hold a prepacked copy of the linear layers during `generate` where that is faster (bf16 on a CPU).

    Raises:
        ConfigError: a bound below 1.
        ModelError: the model's attention cannot be replaced; `make_engine` then chooses `LockstepEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_running: int = 64,
        max_cache_tokens: int | None = None,
        spec: HeadSpec | None = None,
        pack_weights: bool = True,
    ) -> None:
        check_bounds(max_running, max_cache_tokens)
        self._model = model
        self._lm = causal_lm(model)
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._max_running = max_running
        self._max_cache_tokens = max_cache_tokens
        self._spec = head_spec(self._lm.config) if spec is None else spec
        self._pack_weights = pack_weights
        self.version = 0
        self.last_stats = RolloutStats()
        install(model)

    def generate(
        self, requests: Sequence[Request], *, seed: int, step: int, on_progress: OnProgress | None = None
    ) -> list[list[Completion]]:
        """Sample completions of each request, in order.

        Args:
            requests: prompts with their sampling parameters.
            seed: seed of the run.
            step: training step, or any number that differs between calls.
            on_progress: called after every forward.

        Raises:
            EngineError: an empty prompt, a request for no samples, or a completion that exceeds `max_cache_tokens`.
        """
        check_requests(requests, self._lm)
        prompts = [_Prompt(request, [None] * request.num_samples) for request in requests]
        run = _Run(deque(prompts), CacheLayout(self._max_cache_tokens), seed=seed, step=step)
        self.last_stats = RolloutStats()
        started = time.perf_counter()
        total = sum(request.num_samples for request in requests)
        pack = packed_linears(self._lm, min(total, self._max_running)) if self._pack_weights else nullcontext()
        with sampling_mode(self._model), pack:
            while run.pending or run.prompts:
                self._admit(run)
                if run.rows:
                    self._decode(run)
                if on_progress is not None:
                    on_progress(run.finished, total, self.last_stats.decoded_tokens)
        self.last_stats.seconds = time.perf_counter() - started
        self.last_stats.peak_cache_bytes = run.cache.peak_bytes
        assert not any(result is None for prompt in prompts for result in prompt.results)
        return [[result for result in prompt.results if result is not None] for prompt in prompts]

    def sync(self, version: int) -> None:
        """Record the version: the engine samples the trainer's own weights, so nothing is copied."""
        self.version = version

    def close(self) -> None:
        """Do nothing: no resources are held between calls."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._lm.device

    def _admit(self, run: _Run) -> None:
        """Start waiting samples, those of cached prompts first, within the bounds; one-token completions end here."""
        while True:
            new = self._choose_prompts(run)
            if new:
                self._prefill(run, new)
            started: list[tuple[_Prompt, Track]] = []
            for prompt in run.prompts:
                while prompt.waiting and len(run.rows) + len(started) < self._max_running:
                    if not self._fits(run, prompt.request, len(run.rows) + len(started) + 1, new_prompt=False):
                        break
                    track = Track(prompt.request, prompt.next_sample, self._tokenizer, seed=run.seed, step=run.step)
                    prompt.next_sample += 1
                    prompt.running += 1
                    started.append((prompt, track))
            if not started:
                return
            logits = torch.cat([prompt.logits for prompt, _ in started if prompt.logits is not None])
            self.last_stats.peak_rows = max(self.last_stats.peak_rows, len(run.rows) + len(started))
            ended = self._draw(logits, [track for _, track in started])
            for (prompt, track), is_done in zip(started, ended, strict=True):
                if not prompt.waiting:
                    prompt.logits = None
                if is_done:
                    self._finish(run, prompt, track)
                else:
                    run.rows.append(track)
                    run.owners.append(prompt)
            self._drop_prompts(run)

    def _choose_prompts(self, run: _Run) -> list[_Prompt]:
        """Move pending prompts that fit into rows, cache and one prefill forward to the cached ones; return them."""
        chosen: list[_Prompt] = []
        rows = len(run.rows) + sum(prompt.waiting for prompt in run.prompts)
        tokens = 0
        while run.pending and rows < self._max_running:
            request = run.pending[0].request
            tokens += len(request.prompt_ids)
            if chosen and tokens > _PREFILL_TOKENS:
                break
            if not self._fits(run, request, rows + 1, new_prompt=True):
                if not run.prompts:
                    raise EngineError(
                        f"max_cache_tokens = {self._max_cache_tokens}: one completion of a prompt of "
                        f"{len(request.prompt_ids)} tokens with max_new_tokens = {request.params.max_new_tokens} "
                        "does not fit; raise max_cache_tokens or lower max_new_tokens."
                    )
                break
            chosen.append(run.pending.popleft())
            run.prompts.append(chosen[-1])
            rows += request.num_samples
        return chosen

    def _fits(self, run: _Run, request: Request, rows: int, *, new_prompt: bool) -> bool:
        """Check that the cache holds `rows` rows at maximum length, one of them of this request."""
        requests = [prompt.request for prompt in run.prompts] + ([request] if new_prompt else [])
        return rows <= self._room(requests)

    def _room(self, requests: Sequence[Request]) -> int:
        """Return the number of maximum-length rows that fit in the cache beside these requests' prompts."""
        if self._max_cache_tokens is None:
            return self._max_running
        prompts = len(requests) * round_up(max(len(r.prompt_ids) for r in requests))
        return (self._max_cache_tokens - prompts) // round_up(max(r.params.max_new_tokens for r in requests))

    def _prefill(self, run: _Run, new: list[_Prompt]) -> None:
        """Prefill prompts packed into one row; keep the logits after the last token of each."""
        lengths = [len(prompt.request.prompt_ids) for prompt in new]
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        first = len(run.prompts) - len(new)
        spans = [PromptSpan(first + i, start, n) for i, (start, n) in enumerate(zip(starts, lengths, strict=True))]
        self._reserve(run, own_tokens=_FIRST_OWN_TOKENS)
        run.cache.begin_prefill(spans)
        tokens = torch.tensor([t for prompt in new for t in prompt.request.prompt_ids], device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        hidden = self._forward(run.cache, tokens, positions)
        last = torch.tensor([span.start + span.length - 1 for span in spans], device=self.device)
        for prompt, logits in zip(new, self._head(hidden[last]).split(1), strict=True):
            prompt.logits = logits
        self.last_stats.prompt_tokens += sum(lengths)

    def _reserve(self, run: _Run, *, own_tokens: int) -> None:
        longest = max(prompt.request.params.max_new_tokens for prompt in run.prompts)
        waiting = sum(prompt.waiting for prompt in run.prompts)
        room = self._room([prompt.request for prompt in run.prompts])
        run.own_tokens = min(max(run.own_tokens, own_tokens), longest)
        run.cache.reserve(
            rows=min(self._max_running, len(run.rows) + waiting, room),
            own_tokens=run.own_tokens,
            prompts=len(run.prompts),
            prompt_tokens=max(len(prompt.request.prompt_ids) for prompt in run.prompts),
        )

    def _decode(self, run: _Run) -> None:
        """Decode one token for every running row and remove the finished rows."""
        longest = max(track.length for track in run.rows)
        if longest > run.own_tokens:
            self._reserve(run, own_tokens=max(longest, 2 * run.own_tokens))
        slots = {prompt: slot for slot, prompt in enumerate(run.prompts)}
        positions = run.cache.begin_decode(
            prompt_slots=[slots[prompt] for prompt in run.owners],
            prompt_lengths=[len(prompt.request.prompt_ids) for prompt in run.owners],
            own_lengths=[track.length for track in run.rows],
            device=self.device,
        )
        tokens = torch.tensor([track.last_token for track in run.rows], device=self.device)
        ended = self._draw(self._head(self._forward(run.cache, tokens, positions)), run.rows)
        self.last_stats.forwards += 1
        for row in reversed([row for row, is_done in enumerate(ended) if is_done]):
            self._finish(run, run.owners[row], run.rows[row])
            last = len(run.rows) - 1
            if row != last:
                run.cache.move_row(last, row)
                run.rows[row], run.owners[row] = run.rows[last], run.owners[last]
            run.rows.pop()
            run.owners.pop()
        self._drop_prompts(run)

    def _finish(self, run: _Run, prompt: _Prompt, track: Track) -> None:
        prompt.results[track.sample] = track.finish(self._tokenizer)
        prompt.running -= 1
        run.finished += 1

    def _drop_prompts(self, run: _Run) -> None:
        """Free the slots of prompts whose samples are all finished."""
        for slot in range(len(run.prompts) - 1, -1, -1):
            prompt = run.prompts[slot]
            if prompt.waiting or prompt.running:
                continue
            last = len(run.prompts) - 1
            if slot != last:
                run.cache.move_prompt(last, slot)
                run.prompts[slot] = run.prompts[last]
            run.prompts.pop()

    def _forward(self, cache: CacheLayout, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the [T, H] last hidden states of one row."""
        with use_layout(cache, self._lm):
            output = self._lm.base_model(
                input_ids=tokens[None],
                position_ids=positions[None],
                attention_mask=torch.ones_like(tokens)[None],
                use_cache=False,
            )
        return output.last_hidden_state[0]

    def _head(self, hidden: Tensor) -> Tensor:
        return self._lm.get_output_embeddings()(hidden)

    def _draw(self, logits: Tensor, tracks: list[Track]) -> list[bool]:
        self.last_stats.decoded_tokens += len(tracks)
        return draw_for(logits, tracks, self._spec, self._vocabulary)
