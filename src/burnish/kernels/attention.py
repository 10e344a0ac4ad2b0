"""Attention of packed rows on a CPU with AMX, in bf16: `attention.cpp` as a differentiable function.

Each score is computed, weighted and multiplied while it is in a core's cache, forward and backward; torch's operators
would write and read all scores of a tile a dozen times.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from burnish.kernels.compiling import compiled
from burnish.types import GroupSpan

__all__ = ["PromptTable", "RowTable", "attend_prompts", "attend_rows", "attends_rows"]

_BLOCK = 32
"""Sequences are padded to multiples of this, and head sizes are multiples of it."""
_FEW_TASKS = 8
"""With fewer pairs of a group and a head of keys than this, each head of queries is a task of its own."""
_NO_WINDOW = 1 << 40


class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Work(ctypes.Structure):
    _fields_ = [
        ("sequences", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in (
            "num_sequences", "heads", "repeats", "size", "value_size", "padded", "window",
        )),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


class _Prompts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "lengths", "first", "tokens")),
        *((name, ctypes.c_int64) for name in ("num_prompts", "room")),
    ]  # fmt: skip


@dataclass(frozen=True)
class PromptTable:
    """The tokens of a decode forward by the cached prompt that they continue.

    Attributes:
        lengths: [P] length of each prompt.
        first: [P + 1] number of tokens that continue an earlier prompt.
        tokens: [T] tokens, those of a prompt together.
        longest: length of the longest prompt.
    """

    lengths: Tensor
    first: Tensor
    tokens: Tensor
    longest: int

    @classmethod
    def of(cls, members: Sequence[Sequence[int]], lengths: Sequence[int]) -> PromptTable:
        """Make the table.

        Args:
            members: tokens that continue each prompt.
            lengths: length of each prompt; of one that none continues, any.
        """
        first = [0, *itertools.accumulate(map(len, members))]
        tokens = [token for part in members for token in part]
        tables = (torch.tensor(x, dtype=torch.int64) for x in (lengths, first, tokens))
        return cls(*tables, longest=max(lengths))


@dataclass(frozen=True)
class RowTable:
    """Places of a row's sequences.

    Attributes:
        sequences: [S, 6] start, length, first query, place in the packed copies; length and place of its prompt, or
            zeros.
        blocks: [B, 2] sequence and first query of each block of queries.
        groups: [G + 1] first sequence of each group, and S.
        padded: tokens of the packed copies.
        kept: keys before the row: those of the first tokens of a prompt that starts there.
    """

    sequences: Tensor
    blocks: Tensor
    groups: Tensor
    padded: int
    kept: int

    @classmethod
    def of(cls, spans: Sequence[GroupSpan]) -> RowTable:
        """Make the table of a row of these groups."""
        sequences: list[tuple[int, ...]] = []
        groups, place = [0], 0
        for span in spans:
            prompt = (span.prompt[1], place)
            for number, (start, length) in enumerate((span.prompt, *span.completions)):
                if length:
                    sequences.append((start, length, max(-start, 0), place, *(prompt if number else (0, 0))))
                    place += -(-length // _BLOCK) * _BLOCK
            groups.append(len(sequences))
        blocks = [(n, first) for n, own in enumerate(sequences) for first in range(own[2], own[1], _BLOCK)]
        tables = (torch.tensor(x, dtype=torch.int64) for x in (sequences, blocks, groups))
        return cls(*tables, padded=place, kept=max(-spans[0].prompt[0], 0))


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled("attention", "Attention layers")
    if library is None or not library.has_attention():
        return None
    work, strided, address, number = ctypes.POINTER(_Work), ctypes.POINTER(_Strided), ctypes.c_void_p, ctypes.c_int64
    library.attend_rows.argtypes = [work, address, number, *[strided] * 3, *[address] * 4, number]
    library.attend_prompts.argtypes = [work, ctypes.POINTER(_Prompts), strided, *[address] * 2]
    library.attend_rows_backward.argtypes = [
        work, address, number, *[strided] * 5, *[address] * 6, number, *[address] * 3, number,
    ]  # fmt: skip
    return library


def attends_rows(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `attend_rows` takes tensors of these types and sizes, on this machine."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.shape[3] % _BLOCK == value.shape[3] % _BLOCK == 0
        and _library() is not None
    )


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, table: RowTable, *, scaling: float, window: int | None
) -> Tensor:
    """Return softmax(scaling Q K^T + mask) V of a row: [1, T, heads, Dv]; differentiable in Q, K and V.

    Args:
        query: [1, heads, T, D] in bf16.
        key: [1, kv_heads, T', D] with T' = T + table.kept.
        value: [1, kv_heads, T', Dv].
        table: of the row's sequences.
        scaling: factor of the scores.
        window: most positions that a query sees, its own among them; None for all.
    """
    return cast(Tensor, _RowAttention.apply(query, key, value, table, scaling, window or _NO_WINDOW))


def attend_prompts(
    query: Tensor, keys: Tensor, values: Tensor, table: PromptTable, out: Tensor, norms: Tensor, *, scaling: float
) -> None:
    """Merge attention to prompts into that to rows' own tokens, in place.

    out <- out + sigmoid(l - norms) (softmax(scaling Q K^T) V - out), with l the log normaliser of that softmax.

    Args:
        query: [1, heads, T, D] in bf16.
        keys: [P, room, kv_heads, D] cache of the prompts.
        values: [P, room, kv_heads, Dv].
        table: tokens by prompt.
        out: [T, heads, Dv], or its heads in two dimensions.
        norms: [T, heads] in fp32, its log normalisers.
        scaling: factor of the scores.
    """
    query, (slots, room, kv_heads, size) = _dense(query), keys.shape
    heads, tokens = query.shape[1:3]
    # The library reads and writes bytes, of whatever they are.
    assert query.dtype == keys.dtype == values.dtype == out.dtype == torch.bfloat16 and norms.dtype == torch.float32
    assert all(x.is_contiguous() for x in (keys, values, out, norms))
    assert (out.numel(), norms.numel()) == (tokens * heads * values.shape[3], tokens * heads)
    assert values.shape[:3] == keys.shape[:3] and query.shape[3] == size
    assert len(table.lengths) <= slots and table.longest <= room and len(table.tokens) == tokens
    padded = -(-table.longest // _BLOCK) * _BLOCK
    work = _Work(None, 0, heads, heads // kv_heads, size, values.shape[3], padded, _NO_WINDOW, scaling)
    prompts = _Prompts(*_addresses(keys, values, table.lengths, table.first, table.tokens), len(table.lengths), room)
    cast(ctypes.CDLL, _library()).attend_prompts(work, prompts, _strided(query), *_addresses(norms, out))


class _RowAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and the log normaliser of each query."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: RowTable, scaling: float, window: int
    ) -> Tensor:
        query, key, value = (_dense(x) for x in (query, key, value))
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[3])
        norms = query.new_empty(heads, tokens, dtype=torch.float32)
        packed = [_packed(x, table) for x in (key, value)]
        ctx.save_for_backward(query, key, value, out, norms)
        ctx.table, ctx.scaling, ctx.window = table, scaling, window
        if not is_fake(query):
            strided = [_strided(query), _strided(key, table.kept), _strided(value, table.kept)]
            results = _addresses(*packed, out, norms)
            cast(ctypes.CDLL, _library()).attend_rows(
                _work(ctx, query, key, value), *_addresses(table.blocks), len(table.blocks), *strided, *results, tokens
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Compute gradients block by block.

        dV = P^T dO; dS = P (dO V^T - sum O dO); dQ = scaling dS K; dK = scaling dS^T Q.
        """
        query, key, value, out, norms = ctx.saved_tensors
        grad_out, table = _dense(grad_outputs[0].transpose(1, 2)), cast(RowTable, ctx.table)
        (_, heads, tokens, _), kv_heads = query.shape, key.shape[1]
        groups = len(table.groups) - 1
        together = 1 if kv_heads * groups < _FEW_TASKS else heads // kv_heads
        packed = [_packed(x, table) for x in (key, key, value)]
        sums = [norms.new_zeros(heads // together, table.padded, x.shape[3]) for x in (key, value)]
        grads = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
        if not is_fake(query):
            shifts = (0, table.kept, table.kept)
            strided = [_strided(x, shift) for x, shift in zip((query, key, value), shifts, strict=True)]
            strided += [_strided(out.transpose(1, 2)), _strided(grad_out)]
            scratch = _addresses(norms, *packed, *sums)
            results = [x[0, shift:].data_ptr() for x, shift in zip(grads, shifts, strict=True)]
            cast(ctypes.CDLL, _library()).attend_rows_backward(
                _work(ctx, query, key, value), *_addresses(table.groups), groups, *strided, *scratch, together,
                *results, tokens,
            )  # fmt: skip
        return (*(x.transpose(1, 2) for x in grads), None, None, None)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _packed(tensor: Tensor, table: RowTable) -> Tensor:
    """Make room for keys or values of [1, kv_heads, T, size], padded to blocks, as rows or as columns."""
    return tensor.new_empty(tensor.shape[1], table.padded, tensor.shape[3])


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _strided(tensor: Tensor, shift: int = 0) -> _Strided:
    """Describe a tensor [1, heads, T, size] whose token `shift` is called 0."""
    return _Strided(tensor[:, :, shift:].data_ptr(), tensor.stride(2), tensor.stride(1))


def _work(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> _Work:
    table, heads, kv_heads = cast(RowTable, ctx.table), query.shape[1], key.shape[1]
    return _Work(
        table.sequences.data_ptr(), len(table.sequences), heads, heads // kv_heads, query.shape[3], value.shape[3],
        table.padded, ctx.window, ctx.scaling,
    )  # fmt: skip
