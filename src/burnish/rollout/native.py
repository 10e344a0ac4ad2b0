"""The native engine: rollouts in the trainer's process, with the trainer's weights and continuous batching.

Prompts are packed and prefilled once per group; a decode forward is one row with the next tokens of each running
completion: one that is known, and guesses where few completions are left (`drafts.py`). A waiting completion starts as
soon as one finishes. Modules and weights stay transformers' own: only attention is replaced, through
`burnish.model.attention`, by the key-value cache of `cache.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from burnish.errors import EngineError
from burnish.model.attention import install, use_layout
from burnish.model.head import head_spec
from burnish.model.scoring import causal_lm
from burnish.model.tiled_head import HeadSpec
from burnish.rollout.cache import CacheLayout, PromptSpan, round_up
from burnish.rollout.compiled import CompiledForward
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
from burnish.rollout.drafts import MOST_GUESSES, DraftSource, DraftWidth
from burnish.rollout.engine import Engine, Request
from burnish.rollout.fused_layers import FusedLayers
from burnish.rollout.fused_norms import fused_norms
from burnish.rollout.packed_linears import packed_linears
from burnish.rollout.validation import check_requests
from burnish.types import Completion

__all__ = ["NativeEngine"]

_PREFILL_TOKENS = 4096
"""Most prompt tokens of one prefill forward, which bounds its activations; a longer prompt is prefilled alone."""
_LEAST_SHARED_TOKENS = 32
"""Tokens below which prompts that begin alike are prefilled apart: one more part of the row would cost as much."""
_TRIED_TOKENS = 24
"""Tokens of a forward in which fused layers are compared with the model's own."""
_FIRST_OWN_TOKENS = 64
"""Initial cache length of a row; it doubles as completions grow."""
_COPIED_PROMPT_TOKENS = 128
"""Longest prompt that is copied into the cache of each of its rows; a longer one is held, and read, once per group."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """A prompt, its samples, and the logits after its last token, kept until all samples have started."""

    request: Request
    results: list[Completion | None]
    drafts: DraftSource
    running: int = 0
    next_sample: int = 0
    logits: Tensor | None = None

    @property
    def waiting(self) -> int:
        return self.request.num_samples - self.next_sample


@dataclass(slots=True)
class _Row:
    """A running completion, its prompt, and its number among the texts that guesses come from."""

    track: Track
    prompt: _Prompt
    text: int


@dataclass(slots=True)
class _Run:
    """State of one `generate`: pending prompts, cached prompts by slot, running completions by row.

    Attributes:
        copied_tokens: prompt tokens in a row's own cache: those of the longest prompt, or 0 where none is copied.
        own_tokens: sampled tokens that a row's own cache has room for.
    """

    pending: deque[_Prompt]
    cache: CacheLayout
    seed: int
    step: int
    copied_tokens: int
    width: DraftWidth
    prompts: list[_Prompt] = field(default_factory=list[_Prompt])
    rows: list[_Row] = field(default_factory=list[_Row])
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
        speculate: compute guessed tokens where few completions run; it changes speed, not what is drawn.
        compile_forward: compile the decode forward, which takes tens of seconds once; it changes speed and rounding.
            "unfused": unless its layers are fused (`fused_layers.py`), which is faster.
        cache_dtype: "int8" holds keys and values in 8 bits; None in the model's dtype.

    Raises:
        ConfigError: a bound below 1.
        ModelError: the model's attention cannot be replaced; `make_engine` then chooses `LockstepEngine`.
    """

    stops_settled = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        max_running: int = 64,
        max_cache_tokens: int | None = None,
        spec: HeadSpec | None = None,
        pack_weights: bool = True,
        speculate: bool = True,
        compile_forward: bool | Literal["unfused"] = False,
        cache_dtype: Literal["int8"] | None = None,
    ) -> None:
        check_bounds(max_running, max_cache_tokens)
        self._model = model
        self._lm = causal_lm(model)
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._max_running = max_running
        self._max_cache_tokens = max_cache_tokens
        self._cache_dtype = cache_dtype
        self._spec = head_spec(self._lm.config) if spec is None else spec
        self._pack_weights = pack_weights
        self._speculate = speculate
        self._fused_layers = FusedLayers(self._lm)
        self._compiled = CompiledForward(self._lm) if compile_forward else None
        self._compiles_fused = compile_forward is True
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
        check_requests(requests)
        check_request_lengths(requests, self._lm)
        prompts = [_Prompt(r, [None] * r.num_samples, DraftSource(r.prompt_ids)) for r in requests]
        run = self._new_run(prompts, seed, step)
        self.last_stats = RolloutStats()
        started = time.perf_counter()
        total = sum(request.num_samples for request in requests)
        rows = min(total, self._max_running)
        pack = packed_linears(self._lm, rows, self._forward_once) if self._pack_weights else nullcontext({})
        with (
            sampling_mode(self._model),
            pack as products,
            self._fused_layers.running(products, self._prefill_once) as num_fused,
            fused_norms(self._lm),
            self._compiling(num_fused),
        ):
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

    def _new_run(self, prompts: Sequence[_Prompt], seed: int, step: int) -> _Run:
        longest = max((len(prompt.request.prompt_ids) for prompt in prompts), default=0)
        expected = [tokens for prompt in prompts if (tokens := prompt.request.expected_tokens) is not None]
        mean = sum(expected) / max(len(expected), 1)

        def expected_tokens(prompt: _Prompt) -> float:
            tokens = prompt.request.expected_tokens
            return mean if tokens is None else tokens

        # Under a bound on the cache, rows are worth more than the time that a copy saves.
        copies = self._max_cache_tokens is None and longest <= _COPIED_PROMPT_TOKENS
        return _Run(
            # Long completions first: one that starts last would run alone at the end.
            deque(sorted(prompts, key=expected_tokens, reverse=True)),
            CacheLayout(self._max_cache_tokens, copies_prompts=copies, in_8_bits=self._cache_dtype == "int8"),
            seed=seed,
            step=step,
            copied_tokens=longest if copies else 0,
            width=DraftWidth(_fixed_tokens(self._lm)),
        )

    def _admit(self, run: _Run) -> None:
        """Start waiting samples, those of cached prompts first, within the bounds; one-token completions end here."""
        while True:
            new = self._choose_prompts(run)
            if new:
                self._prefill(run, new)
            elif any(prompt.waiting for prompt in run.prompts):
                self._reserve(run, own_tokens=run.own_tokens)  # a prompt that has ended leaves room for rows
            started: list[_Row] = []
            for prompt in run.prompts:
                while prompt.waiting and len(run.rows) + len(started) < self._max_running:
                    if not self._fits(run, prompt.request, len(run.rows) + len(started) + 1, new_prompt=False):
                        break
                    track = Track(prompt.request, prompt.next_sample, self._tokenizer, seed=run.seed, step=run.step)
                    prompt.next_sample += 1
                    prompt.running += 1
                    started.append(_Row(track, prompt, prompt.drafts.add_text()))
            if not started:
                return
            logits = torch.cat([row.prompt.logits for row in started if row.prompt.logits is not None])
            self.last_stats.peak_rows = max(self.last_stats.peak_rows, len(run.rows) + len(started))
            ended = self._draw(logits, started)
            for row, is_done in zip(started, ended, strict=True):
                if not row.prompt.waiting:
                    row.prompt.logits = None
                if is_done:
                    self._finish(run, row)
                else:
                    run.rows.append(row)
            self._copy_prompts(run, sum(not is_done for is_done in ended))
            self._drop_prompts(run)

    def _copy_prompts(self, run: _Run, started: int) -> None:
        """Copy their prompts into the rows that have just started, which are the last ones."""
        if not run.copied_tokens:
            return
        slots = {prompt: slot for slot, prompt in enumerate(run.prompts)}
        first = len(run.rows) - started
        for prompt, rows in groupby(range(first, len(run.rows)), key=lambda index: run.rows[index].prompt):
            indices = list(rows)
            span = range(indices[0], indices[-1] + 1)
            run.cache.start_rows(slots[prompt], span, len(prompt.request.prompt_ids))

    def _choose_prompts(self, run: _Run) -> list[_Prompt]:
        """Move pending prompts that fit into rows, cache and one prefill forward to the cached ones; return them."""
        chosen: list[_Prompt] = []
        rows = len(run.rows) + sum(prompt.waiting for prompt in run.prompts)
        tokens = 0
        while run.pending and rows < self._max_running:
            request = run.pending[0].request
            siblings = [prompt.request.prompt_ids for prompt in chosen[-1:] if prompt.request.index == request.index]
            tokens += len(request.prompt_ids) - _shared_tokens([*siblings, request.prompt_ids])
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
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[PromptSpan] = []

        def add(slot: int | None, ids: Sequence[int], position: int, prefix: slice) -> slice:
            spans.append(PromptSpan(slot, len(tokens), len(ids), prefix))
            tokens.extend(ids)
            positions.extend(range(position, position + len(ids)))
            return slice(len(tokens) - len(ids), len(tokens))

        slots = count(len(run.prompts) - len(new))
        for _, siblings in groupby(new, key=lambda prompt: prompt.request.index):
            group = [list(prompt.request.prompt_ids) for prompt in siblings]
            shared = _shared_tokens(group)
            prefix = add(None, group[0][:shared], 0, slice(0, 0)) if shared else slice(0, 0)
            for ids in group:
                add(next(slots), ids[shared:], shared, prefix)
        self._reserve(run, own_tokens=_FIRST_OWN_TOKENS)
        run.cache.begin_prefill(spans)
        device = self.device
        hidden = self._forward(run.cache, torch.tensor(tokens, device=device), torch.tensor(positions, device=device))
        ends = [span.start + span.length - 1 for span in spans if span.slot is not None]
        for prompt, logits in zip(new, self._head(hidden[torch.tensor(ends, device=device)]).split(1), strict=True):
            prompt.logits = logits
        self.last_stats.prompt_tokens += len(tokens)

    def _reserve(self, run: _Run, *, own_tokens: int) -> None:
        longest = max(prompt.request.params.max_new_tokens for prompt in run.prompts)
        waiting = sum(prompt.waiting for prompt in run.prompts)
        room = self._room([prompt.request for prompt in run.prompts])
        run.own_tokens = min(max(run.own_tokens, own_tokens), longest)
        run.cache.reserve(
            rows=min(self._max_running, len(run.rows) + waiting, room),
            own_tokens=run.copied_tokens + run.own_tokens,
            prompts=len(run.prompts),
            prompt_tokens=max(len(prompt.request.prompt_ids) for prompt in run.prompts),
        )

    def _decode(self, run: _Run) -> None:
        """Decode the next tokens of every running row and remove the finished rows."""
        guesses = self._guess(run)
        width = 1 + max(len(guess) for guess in guesses)
        most = max(row.prompt.request.params.max_new_tokens for row in run.rows)
        longest = min(max(row.track.length for row in run.rows) + width - 1, most)
        if longest > run.own_tokens:
            self._reserve(run, own_tokens=max(longest, 2 * run.own_tokens))
        slots = {prompt: slot for slot, prompt in enumerate(run.prompts)}
        positions = run.cache.begin_decode(
            prompt_slots=[slots[row.prompt] for row in run.rows],
            prompt_lengths=[len(row.prompt.request.prompt_ids) for row in run.rows],
            own_lengths=[row.track.length for row in run.rows],
            max_own=[row.prompt.request.params.max_new_tokens for row in run.rows],
            device=self.device,
            width=width,
        )
        tokens = [
            token
            for row, guess in zip(run.rows, guesses, strict=True)
            for token in ([row.track.last_token, *guess] + [row.track.last_token] * (width - 1 - len(guess)))
        ]
        hidden = self._decoded(run.cache, torch.tensor(tokens, device=self.device), positions)
        ended = self._draw(self._head(hidden), run.rows, guesses, run.width)
        self.last_stats.forwards += 1
        for index in reversed([index for index, is_done in enumerate(ended) if is_done]):
            self._finish(run, run.rows[index])
            last = len(run.rows) - 1
            if index != last:
                run.cache.move_row(last, index)
                run.rows[index] = run.rows[last]
            run.rows.pop()
        self._drop_prompts(run)

    def _guess(self, run: _Run) -> list[list[int]]:
        """Guess the tokens after the next one of each row; none where that would not pay."""
        nothing: list[list[int]] = [[] for _ in run.rows]
        # A penalty depends on the tokens before, which a guess would have to be among.
        if not self._speculate or any(r.prompt.request.params.repetition_penalty != 1 for r in run.rows):
            return nothing
        guesses = [row.prompt.drafts.guess(row.text, MOST_GUESSES) for row in run.rows]
        width = run.width.choose(len(guesses), sum(bool(guess) for guess in guesses))
        return [guess[: width - 1] for guess in guesses]

    def _finish(self, run: _Run, row: _Row) -> None:
        row.prompt.results[row.track.sample] = row.track.finish(self._tokenizer)
        row.prompt.running -= 1
        run.finished += 1
        completions = [result for result in row.prompt.results if result is not None]
        if row.prompt.request.on_done is not None and len(completions) == row.prompt.request.num_samples:
            row.prompt.request.on_done(completions)

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

    def _compiling(self, num_fused: int) -> AbstractContextManager[None]:
        """Run compiled decode forwards inside, where that is wanted beside so many fused layers."""
        if self._compiled is None or (num_fused and not self._compiles_fused):
            return nullcontext()
        return self._compiled.current_weights()

    def _decoded(self, cache: CacheLayout, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the [T, H] last hidden states of a decode forward, compiled where that is wanted and possible."""
        hidden = None if self._compiled is None else self._compiled(cache, tokens, positions)
        return self._forward(cache, tokens, positions) if hidden is None else hidden

    def _forward(self, cache: CacheLayout, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the [T, H] last hidden states of one row."""
        with use_layout(cache, self._lm, checks_mask=False):
            output = self._lm.base_model(
                input_ids=tokens[None],
                position_ids=positions[None],
                attention_mask=torch.ones_like(tokens)[None],
                use_cache=False,
            )
        return output.last_hidden_state[0]

    def _forward_once(self) -> None:
        """Run a forward of one token."""
        self._lm.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def _prefill_once(self) -> None:
        """Prefill a few tokens, into a cache of their own."""
        cache = CacheLayout()
        tokens = torch.arange(_TRIED_TOKENS, device=self.device)
        cache.begin_prefill([PromptSpan(None, 0, _TRIED_TOKENS, slice(0, 0))])
        self._forward(cache, tokens % self._lm.get_input_embeddings().weight.shape[0], tokens)

    def _head(self, hidden: Tensor) -> Tensor:
        return self._lm.get_output_embeddings()(hidden)

    def _draw(
        self, logits: Tensor, rows: Sequence[_Row], guesses: Sequence[list[int]] = (), width: DraftWidth | None = None
    ) -> list[bool]:
        """Draw the next tokens of rows, up to the first that differs from its guess; return which rows have ended."""
        tracks, stats = [row.track for row in rows], self.last_stats
        before = [track.length for track in tracks]
        ended = draw_for(logits, tracks, self._spec, self._vocabulary, guesses)
        for index, (row, start) in enumerate(zip(rows, before, strict=True)):
            drawn = row.track.completion.token_ids[start:]
            stats.decoded_tokens += len(drawn)
            for token in drawn:
                row.prompt.drafts.push(row.text, token)
            if width is not None and guesses[index]:
                accepted, guessed = len(drawn) - 1, len(guesses[index])
                width.add(accepted, accepted + (accepted < guessed and not ended[index]))
                stats.guessed_tokens += guessed
                stats.accepted_tokens += accepted
        return ended


def _shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens prompts begin with in common: those of one task after some turns, computed once."""
    most = min(map(len, prompts)) - 1
    shared = next((i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), most)
    return min(shared, most) if len(prompts) > 1 and shared >= _LEAST_SHARED_TOKENS else 0


def _fixed_tokens(model: Any) -> float:
    """Return the cost of a forward's weights and overhead, in tokens of the forward (see `DraftWidth`).

    A 135M model on two cores takes 20 to 35 ms a forward and 0.4 to 0.8 ms a token in bf16, 50 and 2.1 to 2.6 in fp32.
    The value for other devices is not measured.
    """
    if model.device.type != "cpu":
        return 256.0
    return 60.0 if model.dtype == torch.bfloat16 else 20.0
