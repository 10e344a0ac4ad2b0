"""AdamW over bf16 weights with fp32 masters on a CPU: `adamw.cpp`, which reads and writes each number once.

torch's AdamW would need every master and gradient in fp32 beside the weights, and would read and write them four times.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from burnish.kernels.compiling import compiled

__all__ = ["step_adamw"]

_OTHER_RULES = ("amsgrad", "maximize", "differentiable", "capturable")


class _Options(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_float)
        for name in ("rate", "beta1", "beta2", "epsilon", "decay", "correction1", "correction2", "scale")
    ]


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled("adamw", "Optimizer steps")
    if library is not None:
        for function in (library.adamw_bf16, library.adamw_fp32):
            function.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.POINTER(_Options)]
    return library


def step_adamw(
    weight: Tensor, rest: Tensor, gradient: Tensor, *, state: Mapping[str, Any], group: Mapping[str, Any], scale: Tensor
) -> bool:
    """Step torch's AdamW of one parameter, if its kernel can: x <- (1 - r d) x - r m' / (sqrt(v') + eps).

    m' = m / (1 - b1^t) and v' = v / (1 - b2^t), with m <- b1 m + (1 - b1) g and v <- b2 v + (1 - b2) g^2 (1711.05101).

    Args:
        weight: bf16 weights, in place.
        rest: what their fp32 masters have beside the upper halves of their bits, as int16, in place.
        gradient: in bf16 or fp32.
        state: torch's state of the master, in place; without moments, nothing is done, since torch makes them.
        group: torch's options: lr, betas, eps, weight_decay.
        scale: [] factor of the gradient; it is not read for tensors on an accelerator, which would wait for it.

    Returns:
        Whether the step was taken: on a CPU, of dense tensors with moments, where `fused` asks for it and no other
        rule than the plain one.
    """
    if "exp_avg" not in state or not group.get("fused") or any(group.get(rule) for rule in _OTHER_RULES):
        return False
    moments = cast("list[Tensor]", [state["exp_avg"], state["exp_avg_sq"]])
    tensors = [weight, rest, gradient, *moments]
    if any(x.device.type != "cpu" or not x.is_contiguous() for x in tensors):
        return False
    if [x.dtype for x in (weight, rest, *moments)] != [torch.bfloat16, torch.int16, torch.float32, torch.float32]:
        return False
    if gradient.dtype not in (torch.bfloat16, torch.float32) or (library := _library()) is None:
        return False
    steps = cast(Tensor, state["step"]).add_(1)
    if is_fake(weight):
        return True
    (beta1, beta2), count = map(float, group["betas"]), float(steps)
    corrections = 1 - beta1**count, 1 - beta2**count
    options = _Options(
        float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], *corrections, float(scale)
    )
    step = library.adamw_bf16 if gradient.dtype == torch.bfloat16 else library.adamw_fp32
    step(*(x.data_ptr() for x in tensors), weight.numel(), options)
    return True
