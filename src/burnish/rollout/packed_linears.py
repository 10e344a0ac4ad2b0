"""Linear layers with prepacked weights, for the few rows of a decode forward on a CPU in bf16.

oneDNN reorders a weight into blocks before it multiplies; with few rows that costs as much as the product. A copy that
is already in blocks saves it. Linear layers of one step of a 135M model, one thread: 26 to 17 ms at 8 rows, 69 to 52 at
32, 121 to 105 at 64.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["packed_linears"]

_MOST_ROWS = 128
"""Above it the reordering is a small part of the product, and the packing (made for fewer rows) no longer fits."""


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Generator[None]:
    """Run the plain linear layers inside from packed copies of their weights, which are freed at the end.

    Only `nn.Linear` itself, in bf16 on a CPU that multiplies bf16, is replaced; a layer whose forward something else
    has already replaced is left alone. Costs a second copy of these weights while it lasts. The weights must not change
    meanwhile, and autograd must be off.

    Args:
        model: its layers get another `forward`, and their own back at the end.
        rows: the number of rows that is usual.
    """
    layers = [module for module in model.modules() if _is_packable(module)] if rows <= _MOST_ROWS else []
    try:
        for layer in layers:
            assert isinstance(layer, nn.Linear)
            layer.__dict__["forward"] = _packed_forward(layer, rows)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _is_packable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _packed_forward(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    bias = cast("Tensor | None", layer.bias)
    bias = None if bias is None else bias.detach()
    plain = layer.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.numel() > _MOST_ROWS * hidden.shape[-1]:
            return plain(hidden)
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")

    return forward
