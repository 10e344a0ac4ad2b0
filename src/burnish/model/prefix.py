"""Shared-prefix attention: packed rows that hold every prompt once, before all of its completions.

A prompt attends causally to itself; a completion attends to its whole prompt and causally to itself. The row is cut
into tiles of queries with all of their keys, so each tile's softmax is complete and no dense [T, T] mask is needed:

    O = softmax(cap(scaling * Q [K_prompt, K_own]^T) + mask) [V_prompt, V_own]

The backward pass recomputes the probabilities of a tile, so attention saves only its inputs. On CUDA the same mask is
a FlexAttention block mask; on a CPU with AMX, attention in bf16 has kernels of its own (`burnish.kernels.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from burnish.kernels.attention import RowTable, attend_rows, attends_rows
from burnish.model.attention import AttentionCall, MaskRule, SlidingWindow
from burnish.model.traced import device_type
from burnish.types import GroupSpan

__all__ = ["PrefixLayout"]

_MAX_SCORES = 1 << 21
"""Most scores of one head in one tile, which bounds the temporary memory of long rows."""
_MAX_QUERIES = 256
"""Most queries of a sequence in a tile: short tiles skip more masked scores, long ones make fewer calls."""
_MIN_BUCKET = 16
"""Completions up to this length share a bucket regardless of padding."""

_Rule = SlidingWindow | MaskRule | None
_Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class _Tile:
    """Queries [B, m] of B sequences that share a prompt, with their keys.

    Attributes:
        queries: [B * m] row indices; sequences shorter than the tile repeat their last token.
        keys: [B * e] row indices of the sequences' own keys, padded in the same way.
        prompt: (start, length) of the prompt's keys; length 0 where the sequences are prompts themselves.
        shape: (B, m, e).
        targets: [valid] row indices of the queries that are not padding.
        kept: [valid] tile indices of these queries; None without padding.
        padding: [padding] tile indices of padding queries; None without padding.
        hidden: [m, h] mask over the last h keys, True where a query must not attend; earlier keys are all visible.
    """

    queries: Tensor
    keys: Tensor
    prompt: tuple[int, int]
    shape: tuple[int, int, int]
    targets: Tensor
    kept: Tensor | None
    padding: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """The layout of packed groups, for `use_layout`.

    Args:
        spans: places of the groups in the row, which they cover. Of a prompt that starts before the row, the first
            tokens have keys and values, which come before the row's, but no queries.
    """

    spans: tuple[GroupSpan, ...]
    _cache: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False, compare=False)

    @property
    def position_ids(self) -> Tensor:
        """[1, T] position of each token in its own sequence, on the host."""
        return torch.tensor(_row_positions(self.spans)[self._num_kept :])[None]

    @property
    def _num_kept(self) -> int:
        """Keys before the row."""
        return max(-self.spans[0].prompt[0], 0)

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention output [1, T, heads, D] of one layer; differentiable in query, key, value and sinks."""
        # Under autocast, rotary embeddings leave queries and keys in fp32.
        autocast, query = torch.is_autocast_enabled(call.query.device.type), call.query
        dtype = torch.get_autocast_dtype(query.device.type) if autocast else query.dtype
        query, key, value = (tensor.to(dtype) for tensor in (call.query, call.key, call.value))
        assert query.shape[0] == 1 and query.shape[2] + self._num_kept == key.shape[2]
        with torch.autocast(query.device.type, enabled=False):
            # FlexAttention's kernels take neither float64 nor heads smaller than 16.
            fits_flex = query.dtype != torch.float64 and min(query.shape[-1], value.shape[-1]) >= 16
            if device_type(query) == "cuda" and call.sinks is None and fits_flex:
                if is_fake(query):
                    return cast(Tensor, _KernelAttention.apply(query, key, value))
                return self._attend_flex(call, query, key, value)
            if call.is_plain and device_type(query) == "cpu" and attends_rows(query, key, value):
                window = call.sliding_window
                return attend_rows(query, key, value, self._table(), scaling=call.scaling, window=window)
            tiles = self._tiles(call.rule, query.device)
            attended = _TileAttention.apply(query, key, value, call.sinks, tiles, call.scaling, call.softcap)
            return cast(Tensor, attended)

    def _table(self) -> RowTable:
        if "table" not in self._cache:
            self._cache["table"] = RowTable.of(self.spans)
        return cast(RowTable, self._cache["table"])

    def _tiles(self, rule: _Rule, device: torch.device) -> list[_Tile]:
        if (rule, device) not in self._cache:
            positions, kept = _row_positions(self.spans), self._num_kept
            tiles = [
                tile
                for span in self.spans
                for tile in _group_tiles(_shifted(span, kept), positions, rule, device, kept)
            ]
            self._cache[rule, device] = [
                replace(tile, queries=tile.queries - kept, targets=tile.targets - kept) if kept else tile
                for tile in tiles
            ]
        return cast("list[_Tile]", self._cache[rule, device])

    def _attend_flex(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        block_key = ("flex", call.rule, query.device)
        if block_key not in self._cache:
            mask_mod = _mask_mod(self.spans, query.device, call.rule, self._num_kept)
            lengths = query.shape[2], key.shape[2]
            self._cache[block_key] = create_block_mask(mask_mod, None, None, *lengths, device=str(query.device))
        cap = call.softcap

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return score if cap is None else cap * torch.tanh(score / cap)

        attended = _compiled_flex()(
            query,
            key,
            value,
            score_mod=None if cap is None else capped,
            block_mask=self._cache[block_key],
            scale=call.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).contiguous()


class _KernelAttention(torch.autograd.Function):
    """Allocate what FlexAttention's kernels allocate, on fake tensors: output, log normalisers, gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Inductor's kernel keeps the query's order of dimensions, which rotary embeddings leave as tokens, heads.
        rows, heads, tokens, _ = query.shape
        if query.transpose(1, 2).is_contiguous():
            output = query.new_empty(rows, tokens, heads, value.shape[3]).transpose(1, 2)
        else:
            output = query.new_empty(rows, heads, tokens, value.shape[3])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, _, norm = ctx.saved_tensors
        _delta = torch.empty_like(norm)
        return tuple(torch.empty_like(x) for x in (query, key, value))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Compile FlexAttention once, for lengths that vary from batch to batch."""
    from torch.nn.attention.flex_attention import flex_attention

    return cast("Callable[..., Tensor]", torch.compile(flex_attention, dynamic=True))


def _row_positions(spans: Sequence[GroupSpan]) -> _Ints:
    """Return the [T] position of each token of a row in its own sequence: completions continue their prompt."""
    parts = [np.arange(0)]
    for span in spans:
        parts.append(np.arange(span.prompt[1]))
        parts += [np.arange(span.prompt[1], span.prompt[1] + length) for _, length in span.completions]
    return np.concatenate(parts)


def _shifted(span: GroupSpan, by: int) -> GroupSpan:
    (start, length), completions = span.prompt, span.completions
    return GroupSpan((start + by, length), tuple((first + by, number) for first, number in completions))


def _mask_mod(
    spans: Sequence[GroupSpan], device: torch.device, rule: _Rule, num_kept: int = 0
) -> Callable[..., Tensor]:
    """Build FlexAttention's mask_mod of the row: (batch, head, query index, key index) -> mask."""
    # By number, not by place: an empty prompt starts where its first completion does.
    owners: list[int] = []
    prompts: list[int] = []
    number = 0
    for span in spans:
        for part, (_, length) in enumerate((span.prompt, *span.completions)):
            owners += [number + part] * length
            prompts += [number] * length
        number += 1 + len(span.completions)
    own, prompt, positions = (torch.tensor(x, device=device) for x in (owners, prompts, _row_positions(spans)))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = query + num_kept
        seen = (key <= query) & ((own[key] == own[query]) | (own[key] == prompt[query]))
        if isinstance(rule, SlidingWindow):
            return seen & (positions[query] - positions[key] < rule.window)
        if rule is not None:
            return seen & rule.mask_function(batch, head, positions[query], positions[key])
        return seen

    return mask_mod


def _group_tiles(
    span: GroupSpan, positions: _Ints, rule: _Rule, device: torch.device, num_kept: int = 0
) -> list[_Tile]:
    """Tile one group: the prompt after its kept tokens, then its completions in buckets of similar length."""
    start, length = span.prompt
    asking = [(start + num_kept, length - num_kept)]
    tiles = _bucket_tiles(asking, (start, num_kept), positions, rule, device) if length else []
    bucket: list[tuple[int, int]] = []
    for sequence in sorted((c for c in span.completions if c[1]), key=lambda c: -c[1]):
        longest = bucket[0][1] if bucket else 0
        # Bounds the work wasted on padding by a third; for short completions, another call would cost more.
        if longest > _MIN_BUCKET and 4 * sequence[1] < 3 * longest:
            tiles += _bucket_tiles(bucket, span.prompt, positions, rule, device)
            bucket = []
        bucket.append(sequence)
    return tiles + _bucket_tiles(bucket, span.prompt, positions, rule, device) if bucket else tiles


def _bucket_tiles(
    bucket: Sequence[tuple[int, int]], prompt: tuple[int, int], positions: _Ints, rule: _Rule, device: torch.device
) -> list[_Tile]:
    """Tile sequences (longest first) of one prompt, within the bounds on queries and scores."""
    longest = bucket[0][1]
    num_keys = prompt[1] + longest
    num_queries = max(1, min(longest, _MAX_QUERIES, _MAX_SCORES // num_keys))
    num_sequences = max(1, _MAX_SCORES // (num_queries * num_keys))
    tiles: list[_Tile] = []
    for low in range(0, len(bucket), num_sequences):
        part = bucket[low : low + num_sequences]
        for first in range(0, part[0][1], num_queries):
            block = (first, min(first + num_queries, part[0][1]))
            tiles.append(_tile([s for s in part if s[1] > first], block, prompt, positions, rule, device))
    return tiles


def _tile(
    sequences: Sequence[tuple[int, int]],
    block: tuple[int, int],
    prompt: tuple[int, int],
    positions: _Ints,
    rule: _Rule,
    device: torch.device,
) -> _Tile:
    """Build the tile of queries `block` of each sequence, with prompt keys and own keys up to the block's end.

    The indices are made on the host, from lengths alone: a device would have to be waited for.
    """
    first, last = block
    # Keys beyond the window of the block's first query are skipped.
    unseen = max(0, prompt[1] + first - rule.window + 1) if isinstance(rule, SlidingWindow) else 0
    skipped = min(unseen, prompt[1])
    prompt = (prompt[0] + skipped, prompt[1] - skipped)
    low = unseen - skipped
    offset = np.arange(last)
    own = np.stack([start + np.minimum(offset, length - 1) for start, length in sequences])
    valid = np.stack([offset[first:] < length for _, length in sequences]).ravel()
    queries, padded = own[:, first:].ravel(), not valid.all()

    def placed(values: _Ints) -> Tensor:
        return torch.tensor(values, device=device)

    if rule is None:
        hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=device).triu(1)
    else:
        longest = own[0]
        visible = np.concatenate((np.arange(prompt[0], prompt[0] + prompt[1]), longest[low:]))
        hidden = ~rule(placed(positions[longest[first:]]), placed(positions[visible]))
    return _Tile(
        queries=placed(queries),
        keys=placed(own[:, low:].ravel()),
        prompt=prompt,
        shape=(len(sequences), last - first, last - low),
        targets=placed(queries[valid]),
        kept=placed(valid.nonzero()[0]) if padded else None,
        padding=placed((~valid).nonzero()[0]) if padded else None,
        hidden=hidden,
    )


@dataclass(frozen=True)
class _Operands:
    """Operands of a tile: kv_heads first, with the R query heads of each folded into the queries.

    Attributes:
        query: [kv_heads, B * R * m, D], scaled.
        prompt_key: [kv_heads, P, D].
        own_key: [kv_heads * B, e, D].
        prompt_value: [kv_heads, P, Dv].
        own_value: [kv_heads * B, e, Dv].
    """

    query: Tensor
    prompt_key: Tensor
    own_key: Tensor
    prompt_value: Tensor
    own_value: Tensor


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype to accumulate in: fp32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _fold_queries(rows: Tensor, tile: _Tile, kv_heads: int, *, zero_padding: bool = False) -> Tensor:
    """Gather the tile's queries: [T, heads, D] -> [kv_heads, B * R * m, D]."""
    num_sequences, num_queries, _ = tile.shape
    picked = rows.index_select(0, tile.queries)
    if zero_padding and tile.padding is not None:
        picked.index_fill_(0, tile.padding, 0)
    picked = picked.unflatten(1, (kv_heads, -1)).unflatten(0, (num_sequences, num_queries))
    return picked.permute(2, 0, 3, 1, 4).reshape(kv_heads, -1, rows.shape[-1])


def _unfold_queries(folded: Tensor, tile: _Tile) -> Tensor:
    """Invert `_fold_queries`, dropping padding: [kv_heads, B * R * m, D] -> [valid, heads, D]."""
    num_sequences, num_queries, _ = tile.shape
    kv_heads, _, dim = folded.shape
    rows = folded.reshape(kv_heads, num_sequences, -1, num_queries, dim).permute(1, 3, 0, 2, 4)
    rows = rows.reshape(num_sequences * num_queries, -1, dim)
    return rows if tile.kept is None else rows.index_select(0, tile.kept)


def _fold_keys(rows: Tensor, tile: _Tile) -> Tensor:
    """Gather the sequences' own keys: [T, kv_heads, D] -> [kv_heads * B, e, D]."""
    num_sequences, _, num_keys = tile.shape
    picked = rows.index_select(0, tile.keys).unflatten(0, (num_sequences, num_keys))
    return picked.permute(2, 0, 1, 3).reshape(-1, num_keys, rows.shape[-1])


def _add_keys(total: Tensor, own: Tensor, prompt: Tensor, tile: _Tile) -> None:
    """Add gradients [kv_heads * B, e, D] and [kv_heads, P, D] to `total` [T, kv_heads, D]."""
    num_sequences = tile.shape[0]
    rows = own.unflatten(0, (-1, num_sequences)).permute(1, 2, 0, 3).flatten(0, 1)
    # Padding repeats indices, but only padding queries attend to it and their gradient is zero.
    total.index_add_(0, tile.keys, rows.to(total.dtype))
    start, length = tile.prompt
    total[start : start + length] += prompt.transpose(0, 1)


def _operands(rows: tuple[Tensor, Tensor, Tensor], tile: _Tile, scaling: float) -> _Operands:
    """Gather the tile's part of [T, heads, D] queries and [T, kv_heads, D] keys and values."""
    query, key, value = rows
    start, length = tile.prompt
    return _Operands(
        query=_fold_queries(query, tile, key.shape[1]) * scaling,
        prompt_key=key[start : start + length].transpose(0, 1),
        own_key=_fold_keys(key, tile),
        prompt_value=value[start : start + length].transpose(0, 1),
        own_value=_fold_keys(value, tile),
    )


def _times_keys(left: Tensor, prompt: Tensor, own: Tensor) -> Tensor:
    """Multiply by the keys: [kv_heads, B * R * m, D] -> [kv_heads * B, R * m, P + e]."""
    folded = left.reshape(own.shape[0], -1, left.shape[-1])
    own_product = torch.bmm(folded, own.mT)
    if not prompt.shape[1]:
        return own_product
    return torch.cat((torch.bmm(left, prompt.mT).view(*folded.shape[:2], -1), own_product), dim=-1)


def _weighted(weights: Tensor, prompt: Tensor, own: Tensor) -> Tensor:
    """Multiply by the values: [kv_heads * B, R * m, P + e] -> [kv_heads, B * R * m, D]."""
    kv_heads, length, _ = prompt.shape
    total = torch.bmm(weights[..., length:], own).view(kv_heads, -1, own.shape[-1])
    if length:
        total.baddbmm_(weights[..., :length].reshape(kv_heads, total.shape[1], length), prompt)
    return total


def _transposed_weighted(weights: Tensor, left: Tensor, prompt: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weights^T left for own keys [kv_heads * B, e, D] and prompt keys [kv_heads, P, D]."""
    kv_heads, length, _ = prompt.shape
    # The product is formed transposed, so that bmm copies the small factor to transpose it and not the large one.
    own_product = torch.bmm(left.reshape(own.shape[0], -1, left.shape[-1]).mT, weights[..., length:]).mT
    from_prompt = weights[..., :length].reshape(kv_heads, left.shape[1], length)
    return own_product, torch.bmm(left.mT, from_prompt).mT


def _probabilities(
    parts: _Operands, tile: _Tile, sinks: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute attention probabilities [kv_heads * B, R * m, P + e], and tanh(score / c) where scores are capped.

    The softmax computes in fp32 or wider whatever its input and output dtype.
    """
    scores = _times_keys(parts.query, parts.prompt_key, parts.own_key)
    if softcap is not None or sinks is not None:
        scores = scores.to(_wide(scores))
    squashed = None if softcap is None else torch.tanh(scores / softcap)
    if squashed is not None and softcap is not None:
        scores = squashed * softcap
    num_queries, num_hidden = tile.hidden.shape
    by_query = scores.unflatten(1, (-1, num_queries))
    by_query[..., -num_hidden:].masked_fill_(tile.hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(dim=-1), squashed
    sink = sinks.to(scores.dtype).view(parts.prompt_key.shape[0], 1, -1, 1, 1)
    sink = sink.expand(-1, tile.shape[0], -1, num_queries, 1).reshape(*scores.shape[:2], 1)
    return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1], squashed


class _TileAttention(torch.autograd.Function):
    """Tiled attention whose backward pass recomputes each tile's probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        tiles: list[_Tile],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Map [1, heads, T, D], [1, kv_heads, T, D] and [1, kv_heads, T, Dv] to [1, T, heads, Dv]."""
        ctx.save_for_backward(query, key, value, sinks)
        ctx.tiles, ctx.scaling, ctx.softcap = tiles, scaling, softcap
        rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        out = query.new_empty(*rows[0].shape[:2], value.shape[-1])
        for tile in tiles:
            parts = _operands(rows, tile, scaling)
            probs = _probabilities(parts, tile, sinks, softcap)[0].to(value.dtype)
            attended = _weighted(probs, parts.prompt_value, parts.own_value)
            out.index_copy_(0, tile.targets, _unfold_queries(attended, tile))
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients tile by tile.

        dV = P^T dO; dP = dO V^T; dS = P (dP - sum P dP); dQ = dS K; dK = dS^T Q; d sink = -P_sink sum P dP.
        """
        query, key, value, sinks = ctx.saved_tensors
        grad_out = cast(Tensor, grad_outputs[0])
        rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
        grad_query = torch.zeros_like(rows[0])
        grad_key, grad_value = (torch.zeros_like(x, dtype=_wide(x)) for x in rows[1:])
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=_wide(sinks))
        for tile in ctx.tiles:
            parts = _operands(rows, tile, ctx.scaling)
            exact_probs, squashed = _probabilities(parts, tile, sinks, ctx.softcap)
            probs = exact_probs.to(value.dtype)
            grad = _fold_queries(grad_out[0], tile, key.shape[1], zero_padding=True)
            grad_probs = _times_keys(grad, parts.prompt_value, parts.own_value)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            if squashed is not None:
                grad_scores = (grad_scores * (1 - squashed.square())).to(probs.dtype)
            if grad_sinks is not None:
                pulled = (exact_probs.sum(-1) - 1) * (exact_probs * grad_probs).sum(-1)
                grad_sinks += pulled.view(key.shape[1], tile.shape[0], -1, tile.shape[1]).sum((1, 3)).flatten()
            folded = _weighted(grad_scores, parts.prompt_key, parts.own_key) * ctx.scaling
            grad_query.index_copy_(0, tile.targets, _unfold_queries(folded, tile))
            _add_keys(grad_key, *_transposed_weighted(grad_scores, parts.query, parts.prompt_key, parts.own_key), tile)
            _add_keys(grad_value, *_transposed_weighted(probs, grad, parts.prompt_value, parts.own_value), tile)
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype))
        return (*(g.transpose(0, 1)[None] for g in grads), grad_sinks, None, None, None)
