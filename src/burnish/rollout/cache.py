"""Key-value cache of running completions: each prompt once per group, each completion's own tokens beside it.

`CacheLayout` is an attention layout (`burnish.model.attention`). A prefill forward stores the keys and values of
prompts; a decode forward holds one new token per running row, which attends to its group's prompt and to its own
earlier tokens. The two partial attentions are merged by their log normalisers l (1805.02867), so a prompt is read once
per group and step:

    out = sigmoid(l_prompt - l_own) out_prompt + sigmoid(l_own - l_prompt) out_own
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from burnish.model.attention import AttentionCall, math_attention

__all__ = ["CacheLayout", "PromptSpan", "round_up"]

_UNSEEN = -1e30
"""Score of a masked key: finite, so that a part with every key masked merges with weight zero instead of NaN."""
_STEP = 16
"""Cache lengths are reserved and attended in multiples of this many tokens."""


def round_up(length: int) -> int:
    """Round a length up to the next multiple of the step."""
    return -(-length // _STEP) * _STEP


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A prompt in a prefill row: its cache slot, and its start and length in tokens."""

    slot: int
    start: int
    length: int


@dataclass(slots=True)
class _LayerCache:
    """[slots, tokens, kv_heads, D] keys and values of one attention layer."""

    prompt_key: Tensor
    prompt_value: Tensor
    own_key: Tensor
    own_value: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.prompt_key, self.prompt_value, self.own_key, self.own_value


@dataclass(slots=True)
class _Step:
    """Indices of one decode forward, shared by all layers.

    Attributes:
        positions: [B] true position of each row's new token.
        prompt_lengths: [B] length of each row's prompt.
        write_index: [B] flattened (row, token) index of the new token in the rows' own cache.
        grid: [groups * width] row at each cell of the padded (group, member) grid.
        cell: [B] grid cell of each row.
        groups: number of prompts attended to.
        width: rows of the largest group.
        own_tokens: length of own cache attended to, a multiple of the step.
        prompt_tokens: length of prompt cache attended to, a multiple of the step.
        is_full: the grid is the rows in order, so no gather is needed.
        masks: additive masks (prompt, own) by mask rule.
    """

    positions: Tensor
    prompt_lengths: Tensor
    write_index: Tensor
    grid: Tensor
    cell: Tensor
    groups: int
    width: int
    own_tokens: int
    prompt_tokens: int
    is_full: bool
    masks: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict[Hashable, tuple[Tensor, Tensor]])


class CacheLayout:
    """A key-value cache as an attention layout.

    Rows 0 .. B-1 and prompt slots 0 .. P-1 are the live ones; the caller keeps them dense with `move_row` and
    `move_prompt`. Buffers are allocated at a layer's first forward.

    Args:
        max_tokens: most tokens of own and prompt caches together; None for no bound.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        self._max_tokens = max_tokens
        self._layers: dict[nn.Module, _LayerCache] = {}
        self._rows = self._own_tokens = self._prompts = self._prompt_tokens = 0
        self._spans: Sequence[PromptSpan] = ()
        self._step: _Step | None = None
        self.peak_bytes = 0

    def reserve(self, *, rows: int, own_tokens: int, prompts: int, prompt_tokens: int) -> None:
        """Resize to at least so many slots of so many tokens, keeping contents; shrink only to stay in the bound."""
        wanted = (rows, round_up(own_tokens), prompts, round_up(prompt_tokens))
        have = (self._rows, self._own_tokens, self._prompts, self._prompt_tokens)
        grown = tuple(max(a, b) for a, b in zip(wanted, have, strict=True))
        if self._max_tokens is not None and grown[0] * grown[1] + grown[2] * grown[3] > self._max_tokens:
            grown = wanted
        if grown == have:
            return
        self._rows, self._own_tokens, self._prompts, self._prompt_tokens = grown
        for layer in self._layers.values():
            layer.prompt_key = _resized(layer.prompt_key, self._prompts, self._prompt_tokens)
            layer.prompt_value = _resized(layer.prompt_value, self._prompts, self._prompt_tokens)
            layer.own_key = _resized(layer.own_key, self._rows, self._own_tokens)
            layer.own_value = _resized(layer.own_value, self._rows, self._own_tokens)
        self._note_bytes()

    def begin_prefill(self, spans: Sequence[PromptSpan]) -> None:
        """Prepare a forward that holds these prompts, one after another."""
        self._spans, self._step = spans, None

    def begin_decode(
        self, *, prompt_slots: list[int], prompt_lengths: list[int], own_lengths: list[int], device: torch.device
    ) -> Tensor:
        """Prepare a forward that holds the next token of each row.

        Args:
            prompt_slots: [B] prompt slot of each row.
            prompt_lengths: [B] length of that prompt.
            own_lengths: [B] own tokens of each row, including the new one.
            device: device of the model.

        Returns:
            [B] position of each new token.
        """
        members: list[list[int]] = [[] for _ in range(max(prompt_slots) + 1)]
        member = [0] * len(prompt_slots)
        for row, slot in enumerate(prompt_slots):
            member[row] = len(members[slot])
            members[slot].append(row)
        width = max(len(rows) for rows in members)
        cell = [slot * width + i for slot, i in zip(prompt_slots, member, strict=True)]
        # Padding repeats row 0; its result is discarded.
        grid = [row for rows in members for row in rows + [0] * (width - len(rows))]
        is_full = grid == list(range(len(prompt_slots)))
        own, prompt = torch.tensor(own_lengths, device=device), torch.tensor(prompt_lengths, device=device)
        self._step = _Step(
            positions=prompt + own - 1,
            prompt_lengths=prompt,
            write_index=torch.arange(len(cell), device=device) * self._own_tokens + own - 1,
            grid=torch.tensor(grid, device=device),
            cell=torch.tensor(cell, device=device),
            groups=len(members),
            width=width,
            own_tokens=round_up(max(own_lengths)),
            prompt_tokens=round_up(max(prompt_lengths)),
            is_full=is_full,
        )
        return self._step.positions

    def move_row(self, source: int, target: int) -> None:
        """Overwrite a row with another one."""
        for layer in self._layers.values():
            layer.own_key[target] = layer.own_key[source]
            layer.own_value[target] = layer.own_value[source]

    def move_prompt(self, source: int, target: int) -> None:
        """Overwrite a prompt slot with another one."""
        for layer in self._layers.values():
            layer.prompt_key[target] = layer.prompt_key[source]
            layer.prompt_value[target] = layer.prompt_value[source]

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention output [1, T, heads, D] of one layer, after storing its keys and values."""
        layer = self._layers.get(call.module)
        if layer is None:
            layer = self._layers[call.module] = self._allocate(call)
            self._note_bytes()
        if self._step is None:
            return self._attend_prompts(call, layer)
        return self._attend_rows(call, layer, self._step)

    def _allocate(self, call: AttentionCall) -> _LayerCache:
        # Zeros: a masked key or value that is NaN would still make its row NaN.
        heads, key, value = call.key.shape[1], call.key.shape[3], call.value.shape[3]
        return _LayerCache(
            prompt_key=call.key.new_zeros(self._prompts, self._prompt_tokens, heads, key),
            prompt_value=call.key.new_zeros(self._prompts, self._prompt_tokens, heads, value),
            own_key=call.key.new_zeros(self._rows, self._own_tokens, heads, key),
            own_value=call.key.new_zeros(self._rows, self._own_tokens, heads, value),
        )

    def _note_bytes(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(layer.num_bytes for layer in self._layers.values()))

    def _attend_prompts(self, call: AttentionCall, layer: _LayerCache) -> Tensor:
        outputs: list[Tensor] = []
        for span in self._spans:
            part = slice(span.start, span.start + span.length)
            query, key, value = call.query[:, :, part], call.key[:, :, part], call.value[:, :, part]
            layer.prompt_key[span.slot, : span.length] = key[0].transpose(0, 1)
            layer.prompt_value[span.slot, : span.length] = value[0].transpose(0, 1)
            outputs.append(_causal(call, query, key, value).transpose(1, 2))
        return torch.cat(outputs, dim=1)

    def _attend_rows(self, call: AttentionCall, layer: _LayerCache, step: _Step) -> Tensor:
        rows, heads = call.query.shape[2], call.query.shape[1]
        kv_heads, value_size = call.key.shape[1], call.value.shape[3]
        layer.own_key.flatten(0, 1).index_copy_(0, step.write_index, call.key[0].transpose(0, 1))
        layer.own_value.flatten(0, 1).index_copy_(0, step.write_index, call.value[0].transpose(0, 1))
        prompt_mask, own_mask = self._masks(call, step)
        query = call.query[0].transpose(0, 1).unflatten(1, (kv_heads, heads // kv_heads))
        grouped = (query if step.is_full else query.index_select(0, step.grid)).unflatten(0, (step.groups, step.width))
        own, own_norm = _partial(
            call, query, layer.own_key[:rows, : step.own_tokens], layer.own_value[:rows, : step.own_tokens], own_mask
        )
        shared, shared_norm = _partial(
            call,
            grouped.transpose(1, 2).flatten(2, 3),  # [groups, kv_heads, width * repeats, D]
            layer.prompt_key[: step.groups, : step.prompt_tokens],
            layer.prompt_value[: step.groups, : step.prompt_tokens],
            prompt_mask,
        )
        shared, shared_norm = _from_grid(shared, step), _from_grid(shared_norm, step)
        if call.sinks is not None:
            sinks = call.sinks.to(own_norm.dtype).unflatten(0, (kv_heads, -1)).t()[None]
            own = own * torch.sigmoid(own_norm - sinks)[..., None].to(own.dtype)
            own_norm = torch.logaddexp(own_norm, sinks)
        weight = torch.sigmoid(shared_norm - own_norm)[..., None].to(own.dtype)
        merged = torch.lerp(own, shared, weight)
        return merged.transpose(1, 2).reshape(1, rows, heads, value_size)

    def _masks(self, call: AttentionCall, step: _Step) -> tuple[Tensor, Tensor]:
        """Return additive masks: prompt [groups, 1, 1 or width * repeats, L], own [B, 1, 1, C]."""
        repeats = call.query.shape[1] // call.key.shape[1]
        key = (call.rule, repeats, call.query.dtype)
        if key not in step.masks:
            dtype = torch.promote_types(call.query.dtype, torch.float32)
            step.masks[key] = _masks_of(call.rule, repeats, step, dtype)
        return step.masks[key]


def _resized(buffer: Tensor, slots: int, tokens: int) -> Tensor:
    if buffer.shape[0] == slots and buffer.shape[1] == tokens:
        return buffer
    grown = buffer.new_zeros(slots, tokens, *buffer.shape[2:])
    kept = (slice(min(slots, buffer.shape[0])), slice(min(tokens, buffer.shape[1])))
    grown[kept] = buffer[kept]
    return grown


def _masks_of(rule: object, repeats: int, step: _Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    device = step.positions.device
    own_index = torch.arange(step.own_tokens, device=device)
    prompt_index = torch.arange(step.prompt_tokens, device=device)
    own_position = step.prompt_lengths[:, None] + own_index
    sees_own = own_position <= step.positions[:, None]
    sees_prompt = prompt_index < step.prompt_lengths[:, None]
    if rule is not None:
        reach = torch.arange(step.own_tokens + step.prompt_tokens, device=device)
        seen: Tensor = rule(step.positions, reach)  # type: ignore[operator]
        sees_own = sees_own & seen.gather(1, own_position)
        sees_prompt = sees_prompt & seen[:, : step.prompt_tokens]
    on_grid = sees_prompt[step.grid].unflatten(0, (step.groups, step.width))
    # Without a rule all rows of a prompt share the mask of the first, which is never padding.
    on_grid = on_grid[:, :1] if rule is None else on_grid.repeat_interleave(repeats, dim=1)
    return _additive(on_grid[:, None], dtype), _additive(sees_own[:, None, None], dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _UNSEEN)


def _from_grid(result: Tensor, step: _Step) -> Tensor:
    """Scatter [groups, width * repeats, kv_heads, ...] back to [B, repeats, kv_heads, ...]."""
    rows = result.unflatten(1, (step.width, -1)).flatten(0, 1)
    return rows if step.is_full else rows.index_select(0, step.cell)


def _partial(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to part of the keys; return the output [N, Q, heads, D] and its log normaliser [N, Q, heads].

    Args:
        call: scale and softcap.
        query: [N, heads, Q, D].
        key: [N, K, heads, D].
        value: [N, K, heads, D].
        mask: additive, broadcastable to [N, heads, Q, K].
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if query.device.type == "cpu" and call.softcap is None and key.shape[3] == value.shape[3]:
        out, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=call.scaling
        )
        return out.transpose(1, 2), norm.transpose(1, 2)
    scores = torch.matmul(query, key.transpose(-1, -2)).to(mask.dtype) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores + mask
    norm = scores.logsumexp(dim=-1)
    out = torch.matmul((scores - norm[..., None]).exp().to(value.dtype), value)
    return out.transpose(1, 2), norm.transpose(1, 2)


def _causal(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the [1, heads, L, D] attention of one prompt within itself."""
    position = torch.arange(query.shape[2], device=query.device)
    if call.softcap is None and call.sinks is None:
        mask = None if call.rule is None else call.rule(position, position)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=call.scaling, enable_gqa=True
        )
    seen = position[:, None] >= position if call.rule is None else call.rule(position, position)
    return math_attention(call, query, key, value, seen)
