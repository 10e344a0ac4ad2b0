"""Products, attention and whole decoder layers of a decode forward on a CPU, in C++ that is compiled here.

torch's own kernels are made for many rows: a product of a few rows reads its weight at half of the memory's rate, and
attention of one token to a few hundred keys is mostly overhead. `decoding.cpp` is compiled in two seconds by the
system's C++ compiler. Without one, torch's kernels run.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from burnish.kernels.compiling import compiled

__all__ = ["CPUKernels", "LayerWeights", "cpu_kernels"]

_BLOCK = 32
"""Sizes of packed weights are multiples of this."""


class LayerWeights(ctypes.Structure):
    """The `Layer` of `decoding.cpp`: addresses of a decoder layer's weights, and its sizes.

    Whoever makes one keeps the tensors alive. Biases and norms of heads may be None.
    """

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "input_norm", "query_key_value", "query_key_value_bias", "query_norm", "key_norm", "output", "output_bias",
            "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias",
        )),
        *((name, ctypes.c_int64) for name in ("hidden", "query_heads", "kv_heads", "head", "intermediate")),
        *((name, ctypes.c_float) for name in ("input_epsilon", "head_epsilon", "mlp_epsilon")),
    ]  # fmt: skip


class CPUKernels:
    """The compiled functions.

    Args:
        library: shared library made of `decoding.cpp`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._has_product = bool(library.has_product())
        if self._has_product:
            library.pack.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
            library.product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
            library.project.argtypes = [ctypes.POINTER(LayerWeights)] + [ctypes.c_void_p] * 5 + [ctypes.c_int64]
            library.transform.argtypes = [ctypes.POINTER(LayerWeights)] + [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        tensor, strided = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        arguments = strided * 3 + tensor * 7 + [ctypes.c_int64] * 7 + [ctypes.c_float]
        half, full, eight = torch.bfloat16, torch.float32, torch.int8
        self._attend = {
            (half, half): library.attend_bf16, (half, eight): library.attend_bf16_int8,
            (full, full): library.attend_fp32, (full, eight): library.attend_fp32_int8,
        }  # fmt: skip
        for function in self._attend.values():
            function.argtypes = arguments

    def packs(self, weight: Tensor) -> bool:
        """Return whether `product` takes this weight: bf16, with AMX, of sizes that are multiples of 32."""
        return self._has_product and weight.dtype == torch.bfloat16 and not any(n % _BLOCK for n in weight.shape)

    def pack(self, weight: Tensor) -> Tensor:
        """Return a copy of a weight [N, K] in the order in which `product` reads it."""
        weight = weight.contiguous()
        packed = torch.empty_like(weight)
        self._library.pack(weight.data_ptr(), packed.data_ptr(), *weight.shape)
        return packed

    def product(self, hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Return hidden W^T + bias, summed in fp32.

        Args:
            hidden: [..., K] in bf16.
            packed: [N, K] from `pack`.
            bias: [N] in bf16, or None.
        """
        assert hidden.dtype == torch.bfloat16, hidden.dtype  # the library reads bytes, of whatever they are
        hidden = hidden.contiguous()
        size, depth = packed.shape
        out = hidden.new_empty(*hidden.shape[:-1], size)
        added = None if bias is None else bias.data_ptr()
        rows = hidden.numel() // depth
        self._library.product(hidden.data_ptr(), packed.data_ptr(), added, out.data_ptr(), rows, size, depth)
        return out

    def project(
        self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return a layer's queries [1, heads, T, D], keys and values [1, kv_heads, T, D], rotated.

        Args:
            layer: its weights.
            hidden: [1, T, H] in bf16.
            cos: [1, T, D] in bf16, of the rotary embedding.
            sin: [1, T, D] in bf16.
        """
        assert hidden.dtype == cos.dtype == sin.dtype == torch.bfloat16
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
        tokens, heads = hidden.shape[1], (layer.query_heads, layer.kv_heads, layer.kv_heads)
        normed, out = torch.empty_like(hidden), hidden.new_empty(1, tokens, sum(heads), layer.head)
        pointers = (x.data_ptr() for x in (hidden, cos, sin, normed, out))
        self._library.project(layer, *pointers, tokens)
        query, key, value = out.transpose(1, 2).split_with_sizes(heads, dim=1)
        return query, key, value

    def transform(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return a layer's output: h + mlp(norm(h)) with h = hidden + output(attended), the MLP gated by SiLU.

        Args:
            layer: its weights.
            hidden: [1, T, H] input of the layer, in bf16.
            attended: [1, T, heads, D] output of its attention, in bf16.
        """
        assert hidden.dtype == attended.dtype == torch.bfloat16
        hidden, attended = hidden.contiguous(), attended.contiguous()
        tokens, out = hidden.shape[1], torch.empty_like(hidden)
        scratch = hidden.new_empty(tokens * (layer.hidden + 3 * layer.intermediate))
        self._library.transform(layer, *(x.data_ptr() for x in (hidden, attended, scratch, out)), tokens)
        return out

    def attends(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Return whether `attend` takes tensors of these types: one for all, bf16 or fp32."""
        return (query.dtype, key.dtype) in self._attend and query.dtype == key.dtype == value.dtype

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor,
        *, width: int, scale: float, scales: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Store new keys and values of each row; attend to the row's own ones, up to the token itself.

        Args:
            query: [1, heads, T, D] of T = rows * width new tokens, those of a row together.
            key: [1, kv_heads, T, D].
            value: [1, kv_heads, T, Dv].
            keys: [slots, room, kv_heads, D] cache, of which the first slots are the rows'; of the queries' type, or in
                8 bits.
            values: [slots, room, kv_heads, Dv].
            places: [T] flattened (row, place) index of each token in the cache.
            width: tokens of a row.
            scale: factor of the scores.
            scales: [slots, room, kv_heads] scales of keys and values in 8 bits, in bf16.

        Returns:
            The output [T, kv_heads, repeats, Dv] and its log normaliser [T, kv_heads, repeats] in fp32.
        """
        _, heads, tokens, size = query.shape
        _, room, kv_heads, value_size = values.shape
        out = query.new_empty(tokens, kv_heads, heads // kv_heads, value_size)
        norms = torch.empty(tokens, kv_heads, heads // kv_heads)
        strided: list[int] = []
        # Copies stay alive until the call is over.
        dense = [x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value)]
        for x in dense:
            strided += [x.data_ptr(), x.stride(2), x.stride(1)]
        # The library reads bytes, of whatever they are.
        assert values.dtype == keys.dtype
        assert all((s is not None and s.dtype == torch.bfloat16) == (keys.dtype == torch.int8) for s in scales)
        pointers = (None if x is None else x.data_ptr() for x in (keys, values, *scales, places, out, norms))
        self._attend[query.dtype, keys.dtype](
            *strided, *pointers,
            tokens // width, width, kv_heads, heads // kv_heads, size, value_size, room, scale,
        )  # fmt: skip
        return out, norms


@cache
def cpu_kernels() -> CPUKernels | None:
    """Return the kernels, compiled at the first call where the cache has none; None where that is impossible."""
    library = compiled("decoding", "Rollouts")
    return None if library is None else CPUKernels(library)
