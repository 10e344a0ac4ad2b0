"""Key-value cache of running completions: each prompt once per group, each completion's own tokens beside it.

`CacheLayout` is an attention layout (`burnish.model.attention`). A prefill forward stores the keys and values of
prompts; a decode forward holds the next tokens of each running row, which attend to their group's prompt and to the
row's own tokens. The two partial attentions are merged by their log normalisers l (1805.02867), so a prompt is read
once per group and step:

    out = sigmoid(l_prompt - l_own) out_prompt + sigmoid(l_own - l_prompt) out_own

Short prompts are copied into the rows instead: one attention over a few more keys costs less than two and a merge.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from burnish.kernels.attention import PromptTable, RowTable, attend_prompts, attend_rows, attends_rows
from burnish.kernels.decoding import cpu_kernels
from burnish.model.attention import AttentionCall, math_attention
from burnish.model.traced import device_type, has_values
from burnish.rollout.stored import Stored, rotated_keys, rotated_queries
from burnish.types import GroupSpan

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
    """A prompt in a prefill row, or the beginning of several, which then stands there once.

    Attributes:
        slot: its cache slot; None for the beginning of others.
        start: where its tokens begin in the row.
        length: number of its tokens.
        prefix: the tokens of the row that it begins with.
    """

    slot: int | None
    start: int
    length: int
    prefix: slice


@dataclass(slots=True)
class _LayerCache:
    """Keys and values of one attention layer."""

    prompt_key: Stored
    prompt_value: Stored
    own_key: Stored
    own_value: Stored

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in (self.prompt_key, self.prompt_value, self.own_key, self.own_value))

    def resize(self, *, rows: int, own_tokens: int, prompts: int, prompt_tokens: int) -> None:
        for stored in (self.prompt_key, self.prompt_value):
            stored.resize(prompts, prompt_tokens)
        for stored in (self.own_key, self.own_value):
            stored.resize(rows, own_tokens)


@dataclass(slots=True)
class _Grid:
    """Tokens of a decode forward by prompt, for the attention to the prompts.

    Attributes:
        token: [groups * width] token at each cell of the padded (group, member) grid.
        cell: [T] grid cell of each token.
        groups: number of prompts.
        width: tokens of the largest group.
        is_full: the grid is the tokens in order, so no gather is needed.
        prompt_lengths: [T] length of each token's prompt.
        prompt_tokens: length of prompt cache attended to, a multiple of the step.
        table: the tokens by prompt as the kernels read them; None on an accelerator.
    """

    token: Tensor
    cell: Tensor
    groups: int
    width: int
    is_full: bool
    prompt_lengths: Tensor
    prompt_tokens: int
    table: PromptTable | None

    @classmethod
    def of(cls, slots: Sequence[int], prompt_lengths: Sequence[int], device: torch.device) -> _Grid:
        """Lay out tokens by the slots of their prompts."""
        members: list[list[int]] = [[] for _ in range(max(slots) + 1)]
        member = [0] * len(slots)
        for token, slot in enumerate(slots):
            member[token] = len(members[slot])
            members[slot].append(token)
        width = max(len(tokens) for tokens in members)
        lengths = [prompt_lengths[tokens[0]] if tokens else 0 for tokens in members]
        # Padding repeats token 0; its result is discarded.
        grid = [token for tokens in members for token in tokens + [0] * (width - len(tokens))]
        return cls(
            token=torch.tensor(grid, device=device),
            cell=torch.tensor([slot * width + i for slot, i in zip(slots, member, strict=True)], device=device),
            groups=len(members),
            width=width,
            is_full=grid == list(range(len(slots))),
            prompt_lengths=torch.tensor(prompt_lengths, device=device),
            prompt_tokens=round_up(max(prompt_lengths)),
            table=PromptTable.of(members, lengths) if device.type == "cpu" else None,
        )


@dataclass(slots=True)
class _Step:
    """Indices of one decode forward, shared by all layers; T = B * width tokens, those of a row together.

    Attributes:
        positions: [T] true position of each token.
        first: [B] true position of the first token in a row's own cache: 0 where the prompt was copied.
        write_index: [T] flattened (row, token) index of each token in the rows' own cache.
        width: tokens of a row.
        own_tokens: length of own cache attended to, a multiple of the step.
        reach: number of positions up to the last place of the own cache, over all rows.
        grid: the tokens by prompt; None where the prompts were copied.
        own_masks: additive masks over the rows' own cache, by mask rule.
        prompt_masks: additive masks over the prompts, by mask rule.
    """

    positions: Tensor
    first: Tensor
    write_index: Tensor
    width: int
    own_tokens: int
    reach: int
    grid: _Grid | None
    own_masks: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])
    prompt_masks: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor])


class CacheLayout:
    """A key-value cache as an attention layout.

    Rows 0 .. B-1 and prompt slots 0 .. P-1 are the live ones; the caller keeps them dense with `move_row` and
    `move_prompt`. Buffers are allocated at a layer's first forward.

    Args:
        max_tokens: most tokens of own and prompt caches together; None for no bound.
        copies_prompts: hold a prompt in the cache of each of its rows, by `start_rows`, and not once per group.
        in_8_bits: hold keys and values in 8 bits, which decode forwards then attend to.
    """

    def __init__(self, max_tokens: int | None = None, *, copies_prompts: bool = False, in_8_bits: bool = False) -> None:
        self._max_tokens = max_tokens
        self._in_8_bits = in_8_bits
        self.copies_prompts = copies_prompts
        self._layers: dict[nn.Module, _LayerCache] = {}
        self._rows = self._own_tokens = self._prompts = self._prompt_tokens = 0
        self._spans: Sequence[PromptSpan] = ()
        self._table: RowTable | None = None
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
            layer.resize(
                rows=self._rows, own_tokens=self._own_tokens, prompts=self._prompts, prompt_tokens=self._prompt_tokens
            )
        self._note_bytes()

    def begin_prefill(self, spans: Sequence[PromptSpan]) -> None:
        """Prepare a forward that holds these prompts, one after another."""
        self._spans, self._table, self._step = spans, _row_table(spans), None

    def begin_decode(
        self,
        *,
        prompt_slots: Sequence[int],
        prompt_lengths: Sequence[int],
        own_lengths: Sequence[int],
        max_own: Sequence[int],
        device: torch.device,
        width: int = 1,
    ) -> Tensor:
        """Prepare a forward that holds the next `width` tokens of each row, those of a row together.

        Args:
            prompt_slots: [B] prompt slot of each row.
            prompt_lengths: [B] length of that prompt.
            own_lengths: [B] own tokens of each row, the first of the new ones included.
            max_own: [B] most own tokens of each row; guesses beyond it are computed, at its last place, and not used.
            device: device of the model.
            width: new tokens per row.

        Returns:
            [B * width] position of each new token.
        """
        prompt, most = torch.tensor(prompt_lengths, device=device), torch.tensor(max_own, device=device)
        own = torch.tensor(own_lengths, device=device)[:, None] - 1 + torch.arange(width, device=device)
        own = own.minimum(most[:, None] - 1)
        kept = prompt if self.copies_prompts else torch.zeros_like(prompt)
        row = torch.arange(len(own), device=device) * self._own_tokens
        grid = None
        if not self.copies_prompts:
            slots, lengths = ([n for n in numbers for _ in range(width)] for numbers in (prompt_slots, prompt_lengths))
            grid = _Grid.of(slots, lengths, device)
        longest = max(
            (p if self.copies_prompts else 0) + min(n + width - 1, m)
            for p, n, m in zip(prompt_lengths, own_lengths, max_own, strict=True)
        )
        # The kernels would write beyond the buffers.
        assert len(own) <= self._rows and longest <= self._own_tokens, (len(own), longest)
        self._step = _Step(
            positions=(prompt[:, None] + own).flatten(),
            first=prompt - kept,
            write_index=((row + kept)[:, None] + own).flatten(),
            width=width,
            own_tokens=round_up(longest),
            reach=round_up(longest) + (0 if self.copies_prompts else max(prompt_lengths)),
            grid=grid,
        )
        return self._step.positions

    def start_rows(self, slot: int, rows: range, length: int) -> None:
        """Copy a prompt of this length into the own cache of rows."""
        part = slice(rows.start, rows.stop)
        for layer in self._layers.values():
            layer.own_key.copy(layer.prompt_key, slot, part, length)
            layer.own_value.copy(layer.prompt_value, slot, part, length)

    def move_row(self, source: int, target: int) -> None:
        """Overwrite a row with another one."""
        for layer in self._layers.values():
            layer.own_key.copy(layer.own_key, source, target)
            layer.own_value.copy(layer.own_value, source, target)

    def move_prompt(self, source: int, target: int) -> None:
        """Overwrite a prompt slot with another one."""
        for layer in self._layers.values():
            layer.prompt_key.copy(layer.prompt_key, source, target)
            layer.prompt_value.copy(layer.prompt_value, source, target)

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
        prompts, rows = (self._prompts, self._prompt_tokens), (self._rows, self._own_tokens)
        pairs = [(size, like) for size in (prompts, rows) for like in (call.key, call.value)]
        return _LayerCache(*(Stored(*size, like, in_8_bits=self._in_8_bits) for size, like in pairs))

    def _note_bytes(self) -> None:
        self.peak_bytes = max(self.peak_bytes, sum(layer.num_bytes for layer in self._layers.values()))

    def _attend_prompts(self, call: AttentionCall, layer: _LayerCache) -> Tensor:
        fits = call.is_plain and device_type(call.query) == "cpu" and attends_rows(call.query, call.key, call.value)
        by_kernel = fits and self._table is not None
        outputs: list[Tensor] = []
        for span in self._spans:
            part = slice(span.start, span.start + span.length)
            if by_kernel and span.slot is None:
                continue
            key, value = (torch.cat((x[:, :, span.prefix], x[:, :, part]), dim=2) for x in (call.key, call.value))
            if span.slot is not None:
                kept = rotated_keys(key) if self._in_8_bits else key
                layer.prompt_key.put(span.slot, kept[0].transpose(0, 1))
                layer.prompt_value.put(span.slot, value[0].transpose(0, 1))
            if not by_kernel:
                outputs.append(_causal(call, call.query[:, :, part], key, value).transpose(1, 2))
        if by_kernel and self._table is not None:
            window = call.sliding_window
            return attend_rows(call.query, call.key, call.value, self._table, scaling=call.scaling, window=window)
        return torch.cat(outputs, dim=1)

    def _attend_rows(self, call: AttentionCall, layer: _LayerCache, step: _Step) -> Tensor:
        _, heads, tokens, _ = call.query.shape
        if self._in_8_bits:
            call = replace(call, query=rotated_queries(call.query), key=rotated_keys(call.key))
        out, norm = _attend_own(call, layer, step)
        if call.sinks is not None:
            sinks = call.sinks.to(norm.dtype).view(call.key.shape[1], -1)
            out = out * torch.sigmoid(norm - sinks)[..., None].to(out.dtype)
            norm = torch.logaddexp(norm, sinks)
        if step.grid is not None:
            out = _merge_prompts(call, layer, step, step.grid, out, norm)
        return out.reshape(1, tokens, heads, out.shape[3])


def _row_table(spans: Sequence[PromptSpan]) -> RowTable | None:
    """Describe a prefill row as groups, beginnings and the prompts that continue them; None where it is no such row."""
    groups: list[GroupSpan] = []
    for span in spans:
        own, begin = (span.start, span.length), (span.prefix.start, span.prefix.stop - span.prefix.start)
        if not begin[1]:
            groups.append(GroupSpan(own, ()))
        elif groups and groups[-1].prompt == begin:
            groups[-1] = GroupSpan(begin, (*groups[-1].completions, own))
        else:
            return None
    return RowTable.of(groups)


def _attend_own(call: AttentionCall, layer: _LayerCache, step: _Step) -> tuple[Tensor, Tensor]:
    """Store the new keys and values, and attend to the rows' own ones.

    Returns:
        The output [T, kv_heads, repeats, D] and its log normaliser [T, kv_heads, repeats].
    """
    if call.rule is None and call.softcap is None and has_values(call.query):
        kernels = cpu_kernels()
        if kernels is not None and kernels.attends(call.query, call.key, call.value):
            return kernels.attend(
                call.query, call.key, call.value, layer.own_key.data, layer.own_value.data, step.write_index,
                width=step.width, scale=call.scaling, scales=(layer.own_key.scales, layer.own_value.scales),
            )  # fmt: skip
    _, heads, tokens, size = call.query.shape
    kv_heads, rows = call.key.shape[1], tokens // step.width
    layer.own_key.put_at(step.write_index, call.key.squeeze(0).transpose(0, 1))
    layer.own_value.put_at(step.write_index, call.value.squeeze(0).transpose(0, 1))
    query = call.query.view(kv_heads, heads // kv_heads, rows, step.width, size).permute(2, 0, 3, 1, 4)
    mask = _own_mask(call, step)
    out, norm = _partial_stored(call, query.flatten(2, 3), layer.own_key, layer.own_value, step.own_tokens, mask)
    return _by_token(out, step.width), _by_token(norm, step.width)


def _by_token(part: Tensor, width: int) -> Tensor:
    """Turn [N, kv_heads, width * repeats, ...] into [N * width, kv_heads, repeats, ...]."""
    if width == 1:
        return part
    return part.unflatten(2, (width, -1)).transpose(1, 2).flatten(0, 1)


def _merge_prompts(
    call: AttentionCall, layer: _LayerCache, step: _Step, grid: _Grid, own: Tensor, own_norm: Tensor
) -> Tensor:
    """Attend to the prompts, each once for all its rows, and merge with the attention to the rows' own tokens.

    Args:
        call: queries, scale and softcap.
        layer: keys and values.
        step: masks by rule.
        grid: tokens by prompt.
        own: [T, kv_heads, repeats, D]; it may be overwritten.
        own_norm: [T, kv_heads, repeats] its log normaliser.
    """
    if _by_kernel(call, layer, own, own_norm) and grid.table is not None:
        keys, values = layer.prompt_key.data, layer.prompt_value.data
        attend_prompts(call.query, keys, values, grid.table, own, own_norm, scaling=call.scaling)
        return own
    query = call.query[0].transpose(0, 1).unflatten(1, (call.key.shape[1], -1))
    grouped = (query if grid.is_full else query.index_select(0, grid.token)).unflatten(0, (grid.groups, grid.width))
    shared, norm = _partial_stored(
        call,
        grouped.transpose(1, 2).flatten(2, 3),  # [groups, kv_heads, width * repeats, D]
        layer.prompt_key,
        layer.prompt_value,
        grid.prompt_tokens,
        _prompt_mask(call, step, grid),
    )
    shared, norm = _by_token(shared, grid.width), _by_token(norm, grid.width)
    if not grid.is_full:
        shared, norm = shared.index_select(0, grid.cell), norm.index_select(0, grid.cell)
    return torch.lerp(own, shared, torch.sigmoid(norm - own_norm)[..., None].to(own.dtype))


def _by_kernel(call: AttentionCall, layer: _LayerCache, own: Tensor, own_norm: Tensor) -> bool:
    """Return whether `attend_prompts` computes this call: without a rule or a softcap, in bf16, where there is AMX."""
    return (
        call.rule is None
        and call.softcap is None
        and attends_rows(call.query, layer.prompt_key.data, layer.prompt_value.data)
        and own.is_contiguous()
        and own_norm.is_contiguous()
        and has_values(own)
    )


def _own_mask(call: AttentionCall, step: _Step) -> Tensor:
    """Return the additive mask over the rows' own tokens, [B, 1, 1 or width * repeats, L]."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key = (call.rule, repeats, call.query.dtype)
    if key not in step.own_masks:
        index = torch.arange(step.own_tokens, device=step.positions.device)
        position = (step.first[:, None] + index).repeat_interleave(step.width, dim=0)
        seen = position <= step.positions[:, None]
        if call.rule is not None:
            reach = torch.arange(step.reach, device=index.device)
            seen = seen & call.rule(step.positions, reach).gather(1, position)
        seen = seen.unflatten(0, (-1, step.width))
        # The heads of a single token share its mask.
        seen = seen if step.width == 1 else seen.repeat_interleave(repeats, dim=1)
        step.own_masks[key] = _additive(seen[:, None], torch.promote_types(call.query.dtype, torch.float32))
    return step.own_masks[key]


def _prompt_mask(call: AttentionCall, step: _Step, grid: _Grid) -> Tensor:
    """Return the additive mask over the prompts, [groups, 1, 1 or width * repeats, L]."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key = (call.rule, repeats, call.query.dtype)
    if key not in step.prompt_masks:
        index = torch.arange(grid.prompt_tokens, device=step.positions.device)
        seen = index < grid.prompt_lengths[:, None]
        if call.rule is not None:
            seen = seen & call.rule(step.positions, index)
        on_grid = seen[grid.token].unflatten(0, (grid.groups, grid.width))
        # Without a rule all tokens of a prompt share the mask of the first, which is never padding.
        on_grid = on_grid[:, :1] if call.rule is None else on_grid.repeat_interleave(repeats, dim=1)
        step.prompt_masks[key] = _additive(on_grid[:, None], torch.promote_types(call.query.dtype, torch.float32))
    return step.prompt_masks[key]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, _UNSEEN)


def _partial_stored(
    call: AttentionCall, query: Tensor, key: Stored, value: Stored, tokens: int, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend to the first tokens of the first N slots; of a cache in 8 bits, widen a few slots at a time."""
    slots, at_once = len(query), key.slots_at_once(tokens)
    if at_once is None or at_once >= slots:
        return _partial(call, query, key.read(0, slots, tokens), value.read(0, slots, tokens), mask)
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, slots, at_once):
        stop = min(start + at_once, slots)
        keys, values = key.read(start, stop, tokens), value.read(start, stop, tokens)
        parts.append(_partial(call, query[start:stop], keys, values, mask[start:stop]))
    return torch.cat([out for out, _ in parts]), torch.cat([norm for _, norm in parts])


def _partial(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attend to part of the keys; return the output [N, heads, Q, D] and its log normaliser [N, heads, Q].

    Args:
        call: scale and softcap.
        query: [N, heads, Q, D].
        key: [N, heads, K, D].
        value: [N, heads, K, D].
        mask: additive, broadcastable to [N, heads, Q, K].
    """
    if device_type(query) == "cpu" and call.softcap is None and key.shape[3] == value.shape[3]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=call.scaling
        )
    scores = torch.matmul(query, key.transpose(-1, -2)).to(mask.dtype) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores + mask
    norm = scores.logsumexp(dim=-1)
    return torch.matmul((scores - norm[..., None]).exp().to(value.dtype), value), norm


def _causal(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the [1, heads, L, D] attention of the last L tokens of a prompt to it."""
    position = torch.arange(key.shape[2], device=query.device)
    own = position[key.shape[2] - query.shape[2] :]
    seen = own[:, None] >= position if call.rule is None else call.rule(own, position)
    if call.softcap is None and call.sinks is None:
        mask = None if call.rule is None and len(own) == len(position) else seen
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=call.scaling, enable_gqa=True
        )
    return math_attention(call, query, key, value, seen)
