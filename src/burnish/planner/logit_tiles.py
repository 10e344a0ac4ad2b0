"""Bytes of a tile of logits, which `burnish.model.tiled_head` cuts."""

from __future__ import annotations

import math

from burnish.planner.shapes import ModelShape

__all__ = ["tile_bytes", "tile_columns", "tile_rows"]


def tile_bytes(shape: ModelShape, scored: int, *, on_cpu: bool, item: int = 2, scratches: int = 0) -> int:
    """Bytes of one tile of logits, cut as `burnish.model.tiled_head` cuts it.

    Args:
        shape: dimensions of the model.
        scored: scored tokens, N.
        on_cpu: whether the device is the CPU, which has smaller tiles.
        item: bytes of a number in the compute dtype; fp32 logits stand beside those of a narrower one.
        scratches: buffers beside the logits, such as one for the entropy.
    """
    _, element = _tile_limits(on_cpu, item, scratches)
    rows = tile_rows(scored, on_cpu=on_cpu, item=item, scratches=scratches)
    return rows * tile_columns(shape, scored, on_cpu=on_cpu, item=item, scratches=scratches) * element


def tile_columns(shape: ModelShape, scored: int, *, on_cpu: bool, item: int = 2, scratches: int = 0) -> int:
    """Tokens of the vocabulary of one tile of logits; arguments as of `tile_bytes`."""
    limit, element = _tile_limits(on_cpu, item, scratches)
    columns = max(min(limit // element // _most_rows(scored, limit // element), limit // (4 * shape.hidden)), 1)
    return _slice(shape.vocabulary, columns, 64)


def tile_rows(scored: int, *, on_cpu: bool, item: int = 2, scratches: int = 0) -> int:
    """Rows of one tile of logits; arguments as of `tile_bytes`."""
    limit, element = _tile_limits(on_cpu, item, scratches)
    return _slice(scored, _most_rows(scored, limit // element))


def _tile_limits(on_cpu: bool, item: int, scratches: int) -> tuple[int, int]:
    """Bytes of a tile at most, and of each of its logits."""
    return (16 if on_cpu else 256) * 2**20, 4 * (1 + scratches) + (2 if item == 2 else 0)


def _most_rows(scored: int, logits: int) -> int:
    return min(max(scored, 1), max(4, math.isqrt(logits)))


def _slice(size: int, limit: int, multiple: int = 1) -> int:
    """Size of the equal slices, each of at most `limit`, into which `burnish.model.tiled_head` cuts."""
    step = math.ceil(max(size, 1) / math.ceil(max(size, 1) / limit))
    return min(math.ceil(step / multiple) * multiple, limit)
