"""RMS norms and gates of SiLU on a CPU, in bf16: `elementwise.cpp` as differentiable functions.

A norm of transformers' is seven operators, each of which reads and writes all rows; with its gradient it is twenty.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable

from burnish.kernels.compiling import compiled

__all__ = ["fuses", "gated_silu", "rms_norm"]

_CHUNK = 256
"""Rows of a sum in `rms_norm_backward`."""


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled("elementwise", "Norms and gates")
    if library is not None:
        address, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        library.rms_norm.argtypes = [*[address] * 3, number, number, real]
        library.rms_norm_backward.argtypes = [*[address] * 6, number, number, real]
        library.gated_silu.argtypes = [*[address] * 3, number]
        library.gated_silu_backward.argtypes = [*[address] * 5, number]
    return library


def fuses(*tensors: Tensor) -> bool:
    """Return whether the functions below take these tensors: in bf16, on a CPU, with kernels that could be compiled."""
    return (
        all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
        and _library() is not None
    )


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight * hidden / sqrt(mean(hidden^2) + epsilon) over the last dimension, saving only its inputs."""
    assert hidden.shape[-1:] == weight.shape  # the library trusts it
    hidden = hidden.contiguous()
    if not torch.is_grad_enabled():
        return _normed(hidden, weight, epsilon)
    return cast(Tensor, _Norm.apply(hidden, weight, epsilon))


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, saving only its inputs."""
    assert gate.shape == up.shape
    return cast(Tensor, _Gate.apply(gate.contiguous(), up.contiguous()))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.epsilon = epsilon
        return _normed(hidden, weight, epsilon)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor | None, ...]:
        """Compute dx = r (w dy - x r^2 mean(w dy x)) with r = 1 / sqrt(mean(x^2) + epsilon), and dw = sum dy x r."""
        hidden, weight = ctx.saved_tensors
        grad, (rows, size) = grads[0].contiguous(), _sizes(hidden)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        sums = None if grad_weight is None else weight.new_zeros(-(-rows // _CHUNK), size, dtype=torch.float32)
        operands = (hidden, weight, grad, grad_hidden, grad_weight, sums)
        _call("rms_norm_backward", *operands, numbers=(rows, size, ctx.epsilon))
        return grad_hidden, grad_weight, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _call("gated_silu", gate, up, out, numbers=(gate.numel(),))
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Any
    ) -> tuple[Tensor, Tensor]:
        """Compute d gate = dy up s (1 + gate (1 - s)) and d up = dy gate s, with s = sigmoid(gate)."""
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        operands = (gate, up, grads[0].contiguous(), grad_gate, grad_up)
        _call("gated_silu_backward", *operands, numbers=(gate.numel(),))
        return grad_gate, grad_up


def _normed(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(hidden)
    _call("rms_norm", hidden, weight, out, numbers=(*_sizes(hidden), epsilon))
    return out


def _sizes(hidden: Tensor) -> tuple[int, int]:
    return hidden.numel() // hidden.shape[-1], hidden.shape[-1]


def _call(name: str, *tensors: Tensor | None, numbers: tuple[float, ...]) -> None:
    """Call a function of the library; a trace, whose tensors have no values, calls nothing."""
    if not any(x is not None and is_fake(x) for x in tensors):
        getattr(_library(), name)(*(None if x is None else x.data_ptr() for x in tensors), *numbers)
