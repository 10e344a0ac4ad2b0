"""Decoder layers of a decode forward as two calls of C++ around their attention, in bf16 on a CPU.

With few rows, half of a layer's time is the overhead of twenty small operators between its products. A layer of
Llama's form (Mistral, Qwen2, Qwen3, SmolLM ...) is computed by the kernels `project` and `transform`; its attention
stays that of the layout. Forms are recognised by the names of modules, and each class is compared with its own forward
before use.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.kernels.decoding import CPUKernels, LayerWeights, cpu_kernels
from burnish.model.attention import IMPLEMENTATION, BoundMask
from burnish.model.fused import epsilon_of
from burnish.rollout.packed_linears import MOST_ROWS, PackedProduct

__all__ = ["FusedLayers"]

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_CHILDREN = {
    "": ({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},),
    "self_attn": (_PROJECTIONS, _PROJECTIONS | {"q_norm", "k_norm"}),
    "mlp": ({"gate_proj", "up_proj", "down_proj", "act_fn"},),
}
"""Names of the children of a layer, of its attention and of its MLP, in the forms that the kernels compute."""
_MOST_ERROR = 0.02
"""Largest difference of a layer's change of its input, relative to the change: bf16 rounds to 0.004, some times."""


class FusedLayers:
    """Fuses the layers of a model while an engine samples from it.

    Args:
        model: a causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._agree: dict[type[nn.Module], bool] = {}

    @contextmanager
    def running(self, products: Mapping[nn.Module, PackedProduct], run: Callable[[], Any]) -> Generator[int]:
        """Fuse the layers whose products are packed; autograd must be off.

        Args:
            products: packed products by layer.
            run: runs a short forward with a layout, in which layers of a new class are compared.

        Yields:
            The number of fused layers.
        """
        kernels = cpu_kernels() if products else None
        layers = [] if kernels is None else list(_layers(self._model, products, kernels))
        new = {type(layer.module): layer for layer in layers if type(layer.module) not in self._agree}
        try:
            if new:
                for kind, layer in new.items():
                    self._agree[kind] = False  # a layer that the forward does not reach
                    layer.module.__dict__["forward"] = layer.compare
                run()
                self._agree |= {kind: layer.error <= _MOST_ERROR for kind, layer in new.items()}
            for layer in layers:
                layer.module.__dict__.pop("forward", None)
                if self._agree[type(layer.module)]:
                    layer.module.__dict__["forward"] = layer
            yield sum(self._agree[type(layer.module)] for layer in layers)
        finally:
            for layer in layers:
                layer.module.__dict__.pop("forward", None)


def _layers(
    model: nn.Module, products: Mapping[nn.Module, PackedProduct], kernels: CPUKernels
) -> Iterator[_FusedLayer]:
    """Find the layers of a form that the kernels compute."""
    for module in model.modules():
        if "forward" in module.__dict__ or not all(
            {name for name, _ in module.get_submodule(path).named_children()} in forms
            for path, forms in _CHILDREN.items()
            if not path or hasattr(module, path)
        ):
            continue
        weights = _weights(module, products)
        if weights is not None:
            yield _FusedLayer(module, weights, kernels)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Addresses of a layer's weights, and the tensors that live there."""

    struct: LayerWeights
    tensors: tuple[Tensor | None, ...]


def _weights(module: Any, products: Mapping[nn.Module, PackedProduct]) -> _Weights | None:
    """Collect the weights of a layer; None where a product is packed otherwise, or a norm is another one."""
    attention, mlp, size = module.self_attn, module.mlp, getattr(module.self_attn, "head_dim", 0)
    groups = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    found = [products.get(group[0]) for group in groups]
    packed = [p for p, group in zip(found, groups, strict=True) if p and p.is_by_kernel and p.computes(group)]
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if len(packed) < len(groups) or not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)) or size % 2 or not size:
        return None
    if any(getattr(norm, "bias", None) is not None or norm.weight.dtype != torch.bfloat16 for norm in norms):
        return None
    first, output, gates, down = packed
    before, after, *of_heads = norms
    tensors = (
        before.weight, first.weight, first.bias, *([n.weight for n in of_heads] or [None, None]),
        output.weight, output.bias, after.weight, gates.weight, gates.bias, down.weight, down.bias,
    )  # fmt: skip
    epsilons = [epsilon_of(norm) for norm in (before, of_heads[0] if of_heads else before, after)]
    hidden, inner = attention.q_proj.in_features, mlp.down_proj.in_features
    queries, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
    shapes = (
        *[(hidden,)] * 2, *[(size,)] * len(of_heads),
        ((queries + 2 * keys) * size, hidden), (hidden, queries * size), (2 * inner, hidden), (hidden, inner),
    )  # fmt: skip
    # The kernels trust these sizes: they would read and write beyond tensors of others.
    if tuple(tuple(x.weight.shape) for x in (*norms, *packed)) != shapes:
        return None
    struct = LayerWeights(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        hidden, queries, keys, size, inner, *epsilons,
    )  # fmt: skip
    return _Weights(struct, tensors)


@dataclass(eq=False)
class _FusedLayer:
    """The kernels in the place of a layer's forward.

    Attributes:
        module: the layer.
        weights: its weights.
        kernels: the compiled kernels.
        error: relative error against the layer's own forward; infinite before a comparison.
    """

    module: Any
    weights: _Weights
    kernels: CPUKernels
    error: float = float("inf")
    _forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self._forward = self.module.forward

    def __call__(self, hidden_states: Tensor, **given: Any) -> Any:
        """Return the layer's output."""
        mask, rotary = given.get("attention_mask"), given.get("position_embeddings")
        if (
            rotary is None
            or not isinstance(mask, BoundMask)
            or not self._takes(hidden_states, *rotary)
            or given.get("past_key_values") is not None
        ):
            return self._forward(hidden_states, **given)
        attention, weights = self.module.self_attn, self.weights.struct
        heads = self.kernels.project(weights, hidden_states, *rotary)
        attended, _ = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](attention, *heads, mask, scaling=attention.scaling)
        return self.kernels.transform(weights, hidden_states, attended)

    def _takes(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Return whether this is a row of few tokens, in bf16, whose rotary embedding spans a head."""
        shape = (1, hidden.shape[1], self.weights.struct.head)
        return (
            not isinstance(hidden, FakeTensor)  # a traced forward is fused by the compiler
            and hidden.dtype == cos.dtype == sin.dtype == torch.bfloat16
            and cos.shape == sin.shape == shape
            and hidden.shape[0] == 1
            and hidden.shape[1] <= MOST_ROWS
        )

    def compare(self, hidden_states: Tensor, **given: Any) -> Any:
        """Return the output of the layer's own forward, and note how far the kernels' is from it."""
        expected = self._forward(hidden_states, **given)
        found = self(hidden_states, **given)
        if isinstance(expected, Tensor) and isinstance(found, Tensor):
            change = (expected.float() - hidden_states.float()).norm()
            self.error = float((found.float() - expected.float()).norm() / change)
        return expected
