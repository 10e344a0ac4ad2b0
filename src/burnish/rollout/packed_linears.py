"""Linear layers with prepacked weights, for decoding a few rows at a time on a CPU in bf16.

oneDNN reorders a weight into blocks before it multiplies; with few rows that costs as much as the product itself, and a
blocked copy saves it. Layers that read the same input (query, key and value; gate and up; a layer and its LoRA A) are
packed into one product, which costs one call and one wait for all threads instead of several.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from burnish.kernels.decoding import cpu_kernels

__all__ = ["MOST_ROWS", "PackedProduct", "num_products", "packed_linears", "siblings"]

MOST_ROWS = 128
"""With more rows, reordering is a small part of the product and a packing made for few rows no longer pays."""


_products: ContextVar[Sequence[PackedProduct]] = ContextVar("burnish_products", default=())
_library = torch.library.Library("burnish", "FRAGMENT")
_library.define("packed_product(Tensor input, int number, int size) -> Tensor")


def _packed_product(hidden: Tensor, number: int, size: int) -> Tensor:
    """Return the outputs of a product in use, for graphs that were traced with another copy of the weights."""
    return _products.get()[number].multiply(hidden)


_library.impl("packed_product", _packed_product, "CompositeExplicitAutograd")
torch.library.register_fake(
    "burnish::packed_product", lambda hidden, number, size: hidden.new_empty(*hidden.shape[:-1], size), lib=_library
)


@contextmanager
def packed_linears(model: nn.Module, rows: int, run: Callable[[], Any]) -> Generator[Mapping[nn.Module, PackedProduct]]:
    """Run plain linear layers from packed copies of their weights, which are freed on exit.

    Only `nn.Linear` itself is replaced, in bf16 on a CPU with bf16 products, and only where nothing else has replaced
    its forward. The copies take as much memory as the weights. The weights must not change inside, and autograd must
    be off.

    Args:
        model: its layers get another `forward`, restored on exit.
        rows: typical number of rows.
        run: runs a forward of the model, however short, which shows the layers that read the same input.

    Yields:
        The product of each layer.
    """
    layers = [layer for layer in model.modules() if rows <= MOST_ROWS and _is_packable(layer)]
    products: list[PackedProduct] = []
    by_layer: dict[nn.Module, PackedProduct] = {}
    token = _products.set(products)
    try:
        for group in siblings(layers, run):
            product = PackedProduct(group, rows, len(products))
            products.append(product)
            for index, layer in enumerate(group):
                layer.__dict__["forward"] = partial(product, index)
                by_layer[layer] = product
        yield by_layer
    finally:
        _products.reset(token)
        for layer in layers:
            layer.__dict__.pop("forward", None)


def num_products() -> int:
    """Return the number of packed products that are in use."""
    return len(_products.get())


def siblings(layers: Sequence[nn.Module], run: Callable[[], Any]) -> list[list[nn.Linear]]:
    """Group layers by the input that they read in a forward; a layer that is not reached is a group of its own.

    Args:
        layers: linear layers.
        run: runs the forward.

    Returns:
        The groups, each in order of execution.
    """
    groups: list[tuple[weakref.ref[Tensor], list[Any]]] = []
    reached: set[nn.Module] = set()

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if layer in reached or not args:
            return
        reached.add(layer)
        group = next((group for read, group in reversed(groups) if read() is args[0]), None)
        if group is None:
            groups.append((weakref.ref(args[0]), group := []))
        group.append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        if layers:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return [group for _, group in groups] + [[layer] for layer in layers if layer not in reached]


def _is_packable(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedProduct:
    """One packed product for layers that read the same input.

    The first layer that is called computes the outputs of all; the others take theirs if they are called with that very
    tensor, unchanged, and else compute again, so that a wrong guess about the model costs time and nothing else.

    Args:
        layers: layers of equal input size.
        rows: typical number of rows.
        number: place among the products in use.
    """

    def __init__(self, layers: Sequence[nn.Linear], rows: int, number: int = 0) -> None:
        weights = [layer.weight.detach() for layer in layers]
        self._layers, self._number = layers, number
        self._sizes = [len(weight) for weight in weights]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        kernels = cpu_kernels()
        self._kernels = kernels if kernels is not None and kernels.packs(weight) else None
        if self._kernels is not None:
            self.weight = self._kernels.pack(weight)
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        biases: list[Any] = [layer.bias for layer in layers]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self.bias = torch.cat([w.new_zeros(len(w)) if b is None else b.detach() for w, b in pairs])
        self._input: Tensor | None = None
        self._version = -1
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, index: int, hidden: Tensor) -> Tensor:
        """Return the output of one layer."""
        if hidden.numel() > MOST_ROWS * hidden.shape[-1]:
            layer = self._layers[index]
            return nn.functional.linear(hidden, layer.weight, layer.bias)
        if len(self._sizes) == 1:
            return self._output(hidden)
        if hidden is not self._input or hidden._version != self._version or index not in self._outputs:
            self._input, self._version = hidden, hidden._version
            self._outputs = dict(enumerate(self._output(hidden).split_with_sizes(self._sizes, dim=-1)))
        output = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return output

    @property
    def is_by_kernel(self) -> bool:
        """Whether the weight is packed for the compiled kernels."""
        return self._kernels is not None

    def computes(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether the product is of these layers, in this order."""
        return list(self._layers) == list(layers)

    def _output(self, hidden: Tensor) -> Tensor:
        if isinstance(hidden, FakeTensor):  # in a traced forward
            return torch.ops.burnish.packed_product(hidden, self._number, sum(self._sizes))
        return self.multiply(hidden)

    def multiply(self, hidden: Tensor) -> Tensor:
        """Return the outputs of all layers, one after another."""
        if self._kernels is not None:
            return self._kernels.product(hidden, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
