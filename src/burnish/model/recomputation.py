"""Activations that are cheaper to compute again than to keep: norms and gated activations.

`save_less(model)` changes what a model's backward pass keeps, not what it computes: values and gradients stay bit for
bit the same. A norm keeps its input alone, a gated MLP its two projections before the gate; their outputs, which the
linear layers behind them need for the gradients of their weights, are computed again when those layers ask for them. No
matrix product is repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputing", "save_less"]


@dataclass(slots=True)
class _Recipe:
    """How to compute a tensor again.

    Attributes:
        make: inputs -> the tensor.
        inputs: detached.
        asked: times that a layer behind it has put it away and has not asked for it yet.
        value: the tensor, between the first and the last time it is asked for.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    asked: int = 0
    value: Tensor | None = None

    def cook(self) -> Tensor:
        """The tensor; layers that share an input run their backward passes one after another and share it again."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.make(*self.inputs)
        made = self.value
        self.asked -= 1
        if self.asked <= 0:
            self.value = None
        return made


@dataclass(frozen=True, slots=True)
class _Put:
    """What a layer keeps instead of a tensor that has a recipe."""

    recipe: _Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Pantry:
    """Recipes of tensors that are alive, by address."""

    recipes: dict[int, tuple[weakref.ref[Tensor], int, _Recipe]] = field(
        default_factory=dict[int, tuple[weakref.ref[Tensor], int, _Recipe]]
    )

    def add(self, tensor: Tensor, recipe: _Recipe) -> None:
        """Know how to make a tensor."""
        key = tensor.untyped_storage().data_ptr()
        self.recipes[key] = (weakref.ref(tensor), tensor._version, recipe)

    def put(self, tensor: Tensor) -> Any:
        """What autograd keeps of a tensor."""
        found = self.recipes.get(tensor.untyped_storage().data_ptr())
        # A dead tensor's address may be another's by now, and one changed in place is not what its recipe makes.
        if found is None or (alive := found[0]()) is None or tensor._version != found[1] or tensor.dtype != alive.dtype:
            return tensor
        found[2].asked += 1
        return _Put(found[2], tensor.shape, tensor.stride(), int(tensor.storage_offset()))


_pantry: ContextVar[_Pantry | None] = ContextVar("burnish_pantry", default=None)


@contextmanager
def recomputing(model: nn.Module) -> Generator[None]:
    """Forwards of a model that `save_less` prepared keep less inside; their backward pass may come later.

    Nothing changes under gradient checkpointing, which keeps less still and must see the same operations twice.
    """
    if not torch.is_grad_enabled() or any(_checkpoints(module) for module in model.modules()):
        yield
        return
    pantry = _Pantry()
    token = _pantry.set(pantry)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pantry.put, _take):
            yield
    finally:
        _pantry.reset(token)


def _checkpoints(module: nn.Module) -> bool:
    return getattr(module, "gradient_checkpointing", False) is True or type(module).__name__ == "CheckpointWrapper"


def _take(kept: Any) -> Tensor:
    if isinstance(kept, _Put):
        return kept.recipe.cook().as_strided(kept.shape, kept.stride, kept.offset)
    return cast(Tensor, kept)


def _again(make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """make(*inputs), of which only the inputs are kept."""
    made = cast(Tensor, checkpoint(make, *inputs, use_reentrant=False, preserve_rng_state=False))
    pantry = _pantry.get()
    if pantry is not None and made.is_contiguous() and made.storage_offset() == 0:
        pantry.add(made, _Recipe(make, tuple(x.detach() for x in inputs)))
    return made


def save_less(model: nn.Module) -> None:
    """Prepare a model's norms and gated MLPs for `recomputing`; other modules stay as they are.

    A gated MLP is known by its attributes and by computing exactly down(act(gate(x)) * up(x)) on a random input.

    Args:
        model: changed in place; outside `recomputing` it does what it did.
    """
    gated: dict[type[nn.Module], bool] = {}
    # Quantised weights are whole numbers; what goes in and out of them has the dtype of the rest.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if _is_norm(module):
            module.forward = MethodType(_norm_forward, module)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
            kind = type(module)
            if kind not in gated:
                gated[kind] = _is_gated(cast(Any, module), dtype)
            if gated[kind]:
                module.forward = MethodType(_gated_forward, module)


_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")


def _is_norm(module: nn.Module) -> bool:
    name, parameters = type(module).__name__, list(module.parameters())
    alone = not list(module.children())
    return name.endswith("Norm") and "Batch" not in name and alone and all(p.ndim == 1 for p in parameters)


@torch.no_grad()
def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    weight = next(module.gate_proj.parameters())
    width = getattr(module.gate_proj, "in_features", None)
    if width is None or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, width, generator=generator).to(weight.device, dtype)
    training = module.training
    module.eval()
    try:
        return torch.equal(module(x), _gated(module, x))
    finally:
        module.train(training)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))


def _active(x: Any) -> bool:
    return _pantry.get() is not None and torch.is_grad_enabled() and isinstance(x, Tensor)


def _norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    own = type(self).forward
    if len(args) != 1 or kwargs or not _active(args[0]):
        return own(self, *args, **kwargs)
    return _again(MethodType(own, self), args[0])


def _gated_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not _active(args[0]):
        return type(self).forward(self, *args, **kwargs)

    def gate(gate_x: Tensor, up_x: Tensor) -> Tensor:
        return self.act_fn(gate_x) * up_x

    return self.down_proj(_again(gate, self.gate_proj(args[0]), self.up_proj(args[0])))
