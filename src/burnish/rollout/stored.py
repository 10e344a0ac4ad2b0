"""Keys and values as the cache holds them: in the model's dtype, or in 8 bits with a scale per token and head.

    x ~ s round(x / s),  s = max |x| / 127

Keys have channels that are far larger than the others (2402.02750), which would set the scale of all. They are rotated
by a Hadamard matrix H first, and queries with them, which leaves their products as they are (2404.00456):
(H q) . (H k) = q . k.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Stored", "bytes_in_8_bits", "rotated_keys", "rotated_queries"]

_MOST = 127
_TILE_BYTES = {"cpu": 8 * 2**20}
_OTHER_TILE_BYTES = 64 * 2**20
"""Most bytes of keys, and of values, that are widened at a time, unless those of a single slot are more."""


class Stored:
    """Keys or values of one layer by slot and token.

    Args:
        slots: number of rows or prompts.
        tokens: tokens of each.
        like: [1, kv_heads, T, D] keys or values to come.
        in_8_bits: hold them in 8 bits.
    """

    def __init__(self, slots: int, tokens: int, like: Tensor, *, in_8_bits: bool) -> None:
        self._dtype = like.dtype
        # Zeros: a masked key or value that is NaN would still make its row NaN.
        size = (slots, tokens, like.shape[1], like.shape[3])
        self.data = like.new_zeros(size, dtype=torch.int8 if in_8_bits else like.dtype)
        """[slots, tokens, kv_heads, D]"""
        self.scales = like.new_zeros(size[:3], dtype=torch.bfloat16) if in_8_bits else None
        """[slots, tokens, kv_heads] scales; None in the model's dtype"""
        self._window = (0, 0)
        self._view: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def resize(self, slots: int, tokens: int) -> None:
        """Change the numbers of slots and tokens, keeping what fits."""
        self.data, self._view = _resized(self.data, slots, tokens), None
        self.scales = None if self.scales is None else _resized(self.scales, slots, tokens)

    def put(self, slot: int, values: Tensor) -> None:
        """Store the first T tokens of a slot, [T, kv_heads, D]."""
        if self.scales is not None:
            values, self.scales[slot, : len(values)] = _quantised(values)
        self.data[slot, : len(values)] = values

    def put_at(self, index: Tensor, values: Tensor) -> None:
        """Store tokens [T, kv_heads, D] at flattened (slot, token) indices [T]."""
        if self.scales is not None:
            values, scales = _quantised(values)
            self.scales.flatten(0, 1).index_copy_(0, index, scales)
        self.data.flatten(0, 1).index_copy_(0, index, values)

    def copy(self, source: Stored, slot: int, slots: slice | int, tokens: int | None = None) -> None:
        """Copy the first tokens of another's slot to slots of this one; all tokens for None."""
        self.data[slots, :tokens] = source.data[slot, :tokens]
        if self.scales is not None and source.scales is not None:
            self.scales[slots, :tokens] = source.scales[slot, :tokens]

    def slots_at_once(self, tokens: int) -> int | None:
        """Return how many slots `read` widens within the bound; None where it returns a view."""
        if self.scales is None:
            return None
        most = _TILE_BYTES.get(self.data.device.type, _OTHER_TILE_BYTES)
        return max(1, most // (tokens * self.data[0, 0].numel() * self._dtype.itemsize))

    def read(self, start: int, stop: int, tokens: int) -> Tensor:
        """Return the first tokens of slots in the model's dtype, [slots, kv_heads, tokens, D]."""
        if self.scales is not None:
            # bf16 scales may be too small for fp16.
            wide = torch.float32 if self._dtype == torch.float16 else self._dtype
            scales = self.scales[start:stop, :tokens, :, None].to(wide)
            return self.data[start:stop, :tokens].to(wide).mul_(scales).to(self._dtype).transpose(1, 2)
        # A decode forward is many small operators: a view stays from one to the next while its shape does.
        if self._view is None or start or self._window != (stop, tokens):
            self._window = (stop, tokens)
            self._view = self.data[start:stop, :tokens].transpose(1, 2)
        return self._view


def bytes_in_8_bits(values: Tensor) -> int:
    """Return the bytes of keys or values [..., D] in 8 bits, with their scales."""
    return values.numel() + 2 * (values.numel() // values.shape[-1])


def rotated_keys(keys: Tensor) -> Tensor:
    """Rotate keys [..., D] for 8 bits."""
    return keys @ _rotation(keys.shape[-1], 0, keys.dtype, keys.device)


def rotated_queries(queries: Tensor) -> Tensor:
    """Rotate queries [..., D] for rotated keys, so that their products stay the same."""
    return queries @ _rotation(queries.shape[-1], 1, queries.dtype, queries.device)


@functools.cache
def _rotation(size: int, rest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a block-diagonal Hadamard matrix, of blocks of the largest power of 2 that divides the size.

    H H^T is the size of a block: a power of 2, of which keys get one part and queries the `rest`, both exact.
    """
    block = size & -size
    power = block.bit_length() - 1
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    whole = torch.block_diag(*[matrix] * (size // block)) * 2.0 ** -((power + rest) // 2)
    return whole.to(device, dtype)


def _quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [T, kv_heads, D] in 8 bits and their scales [T, kv_heads].

    Rounding a scale costs nothing: values are divided by the rounded one. One that is not a number makes all of its
    token's values so.
    """
    wide = values.float()
    scales = (wide.abs().amax(-1) / _MOST).to(torch.bfloat16)
    parts = wide / scales.float().masked_fill(scales == 0, 1)[..., None]
    return parts.round().clamp(-_MOST, _MOST).nan_to_num(0).to(torch.int8), scales


def _resized(buffer: Tensor, slots: int, tokens: int) -> Tensor:
    if buffer.shape[0] == slots and buffer.shape[1] == tokens:
        return buffer
    grown = buffer.new_zeros(slots, tokens, *buffer.shape[2:])
    kept = (slice(min(slots, buffer.shape[0])), slice(min(tokens, buffer.shape[1])))
    grown[kept] = buffer[kept]
    return grown
