"""Products, attention and whole decoder layers of a decode forward on a CPU, in C++ that is compiled here.

torch's own kernels are made for many rows: a product of a few rows reads its weight at half of the memory's rate, and
attention of one token to a few hundred keys is mostly overhead. `cpu_kernels.cpp` is compiled in two seconds by the
system's C++ compiler, for this very processor, and kept in the user's cache. Without a compiler, torch's kernels run.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["CPUKernels", "LayerWeights", "cpu_kernels"]

_logger = logging.getLogger(__name__)

_FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fPIC",
    # What lets sums be vectorised; -ffast-math itself would change how the whole process rounds tiny numbers.
    "-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip
_X86_FLAGS = ("-mprefer-vector-width=512",)
_COMPILING_SECONDS = 120
_BLOCK = 32
"""Sizes of packed weights are multiples of this."""


class LayerWeights(ctypes.Structure):
    """The `Layer` of `cpu_kernels.cpp`: addresses of a decoder layer's weights, and its sizes.

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
        library: shared library made of `cpu_kernels.cpp`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._has_product = bool(library.has_product())
        if self._has_product:
            library.pack.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
            library.product.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
            library.project.argtypes = [ctypes.POINTER(LayerWeights)] + [ctypes.c_void_p] * 5 + [ctypes.c_int64]
            library.transform.argtypes = [ctypes.POINTER(LayerWeights)] + [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        library.rms_norm.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float]
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

    def rms_norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return weight * hidden / sqrt(mean(hidden^2) + epsilon) over the last dimension, in bf16."""
        size = len(weight)
        assert hidden.dtype == weight.dtype == torch.bfloat16
        assert hidden.shape[-1] == size
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        rows = hidden.numel() // size
        self._library.rms_norm(hidden.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, epsilon)
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
    if platform.system() != "Linux":
        return None
    try:
        return CPUKernels(ctypes.CDLL(str(_compiled())))
    # A missing compiler, one that fails, no home or one that cannot be written, a library of other OpenMP functions.
    except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
        _logger.warning("Rollouts use torch's kernels: %s. A C++ compiler (g++ or clang) makes them faster.", error)
        return None


def _compiled() -> Path:
    """Return the library for this processor, compiler and source."""
    source = files("burnish.rollout").joinpath("cpu_kernels.cpp").read_bytes()
    compiler = os.environ.get("CXX", "c++")
    flags = _FLAGS + (_X86_FLAGS if platform.machine() == "x86_64" else ())
    run = partial(subprocess.run, capture_output=True, check=True, timeout=_COMPILING_SECONDS)
    version = run([compiler, "--version"]).stdout
    # What tells this processor's instructions from another's: a home may be shared by several machines.
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    processor = b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features"))}))
    key = hashlib.sha256(b"\0".join([source, version, " ".join(flags).encode(), processor])).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "burnish" / "kernels"
    library = home / f"{key}.so"
    if library.exists():
        return library
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        text, compiled, linked = (Path(folder) / f"kernels.{ending}" for ending in ("cpp", "o", "so"))
        text.write_bytes(source)
        # Linked without an OpenMP library of its own: its functions are found in the one that torch has loaded, whose
        # threads wait already. A second one would start more of them.
        for command in ([*flags, "-c", str(text), "-o", str(compiled)], ["-shared", str(compiled), "-o", str(linked)]):
            run([compiler, *command])
        linked.replace(library)  # whole or not at all, whoever else compiles
    return library
