"""Selective activation recomputation: norms and gated activations, which are cheaper to recompute than to keep.

`save_less(model)` changes what the backward pass saves, not what it computes: values and gradients are bit for bit the
same. A norm saves only its input, a gated MLP its two projections before the gate; their outputs, which the following
linear layers need for weight gradients, are recomputed when those layers unpack them. No matrix product is repeated.

Norms and gates that kernels compute (`burnish.kernels.elementwise`: bf16 on a CPU) are left to them, whether or not
their outputs are recomputed; such gradients are rounded once, where torch's operators round after every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import checkpoint

from burnish.errors import ConfigError
from burnish.kernels.elementwise import fuses, gated_silu, rms_norm
from burnish.model.dropout import draws_dropout
from burnish.model.fused import is_silu, norm_epsilon
from burnish.model.offload import Saved, as_saved, restore, saver, storage_key
from burnish.model.traced import device_type

__all__ = ["check_tiles", "norm_forward", "recompute_later", "recomputing", "save_less", "tile_mlps"]


@dataclass(slots=True)
class _Recompute:
    """Recompute function of a tensor.

    Attributes:
        function: inputs -> the tensor.
        inputs: detached inputs.
        num_saved: times that autograd has saved the tensor and not unpacked it yet.
        value: the tensor, from its first to its last unpacking.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    num_saved: int = 0
    value: Tensor | None = None

    def run(self) -> Tensor:
        """Recompute the tensor once for all layers that saved it, whose backward passes follow one another."""
        if self.value is None:
            with torch.no_grad():
                self.value = self.function(*self.inputs)
        value = self.value
        self.num_saved -= 1
        if self.num_saved <= 0:
            self.value = None
        return value


@dataclass(frozen=True, slots=True)
class _Saved:
    """Stand-in that autograd saves for a tensor that can be recomputed."""

    recompute: _Recompute
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _RecomputeCache:
    """Recompute functions of live tensors, by storage; `save` keeps the others."""

    save: Callable[[Tensor], Saved]
    entries: dict[int, tuple[weakref.ref[Tensor], int, _Recompute]] = field(
        default_factory=dict[int, tuple[weakref.ref[Tensor], int, _Recompute]]
    )

    def add(self, tensor: Tensor, recompute: _Recompute) -> None:
        """Remember how to recompute a tensor."""
        self.entries[storage_key(tensor)] = (weakref.ref(tensor), tensor._version, recompute)

    def pack(self, tensor: Tensor) -> Any:
        """Replace a tensor that autograd saves by its recompute function, if it has one."""
        found = self.entries.get(storage_key(tensor))
        # The key of a dead tensor may be reused, and an in-place change is not recomputed.
        if found is None or (alive := found[0]()) is None or tensor._version != found[1] or tensor.dtype != alive.dtype:
            return self.save(tensor)
        found[2].num_saved += 1
        return _Saved(found[2], tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def unpack(saved: Any) -> Tensor:
        """Return what autograd saved, recomputed where it was replaced."""
        if isinstance(saved, _Saved):
            return saved.recompute.run().as_strided(saved.shape, saved.stride, saved.offset)
        return restore(saved)


_cache: ContextVar[_RecomputeCache | None] = ContextVar("burnish_recompute_cache", default=None)


@contextmanager
def recomputing(model: nn.Module) -> Generator[None]:
    """Save fewer activations in forwards of a model prepared by `save_less`; their backward pass may come later.

    Has no effect under gradient checkpointing, which saves less still and must see the same operations twice.
    """
    checkpoints = any(
        getattr(module, "gradient_checkpointing", False) is True or type(module).__name__ == "CheckpointWrapper"
        for module in model.modules()
    )
    save = saver()
    if not torch.is_grad_enabled() or checkpoints:
        with nullcontext() if save is None else torch.autograd.graph.saved_tensors_hooks(save, restore):
            yield
        return
    cache = _RecomputeCache(save or as_saved)
    token = _cache.set(cache)
    try:
        with torch.autograd.graph.saved_tensors_hooks(cache.pack, cache.unpack):
            yield
    finally:
        _cache.reset(token)
        # Whatever autograd saved holds its hooks, and with them the cache, until the end of the whole backward pass.
        cache.entries.clear()


def _recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute function(*inputs), saving only the inputs."""
    value = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return recompute_later(cast(Tensor, value), function, *inputs)


def recompute_later(value: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Where autograd saves `value` inside `recomputing`, let it save the inputs of function(*inputs) instead.

    Returns:
        `value`.
    """
    cache = _cache.get()
    if cache is not None and value.is_contiguous() and value.storage_offset() == 0:
        cache.add(value, _Recompute(function, tuple(x.detach() for x in inputs)))
    return value


def save_less(model: nn.Module) -> None:
    """Prepare a model's norms and gated MLPs for `recomputing`; other modules are left alone.

    A gated MLP is recognised by its attributes and by computing exactly down(act(gate(x)) * up(x)) on a random input.

    Args:
        model: changed in place; outside `recomputing`, in that kernels compute its norms and gates where they can.
    """
    gated: dict[type[nn.Module], bool] = {}
    # Quantised weights are integers; their inputs and outputs have the dtype of the other parameters.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):
            continue
        if kind.__name__.endswith("Norm") and "Batch" not in kind.__name__ and not list(module.children()):
            if all(p.ndim == 1 for p in module.parameters()):
                module.forward = MethodType(norm_forward, module)
        elif _looks_gated(module):
            if kind not in gated:
                gated[kind] = _is_gated(cast(Any, module), dtype)
            if gated[kind]:
                module.forward = MethodType(_gated_forward, module)


def _looks_gated(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


@torch.no_grad()
def _is_gated(module: Any, dtype: torch.dtype) -> bool:
    weight = next(module.gate_proj.parameters())
    if is_fake(weight):  # in a trace, what looks like one is taken for one
        return True
    width = getattr(module.gate_proj, "in_features", None)
    if width is None or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, width, generator=generator).to(weight.device, dtype)
    training = module.training
    module.eval()
    try:
        return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))
    finally:
        module.train(training)


def _recomputes(x: Any) -> bool:
    return _cache.get() is not None and torch.is_grad_enabled() and isinstance(x, Tensor)


def _fuses(*tensors: Any) -> bool:
    """Return whether kernels take these tensors; the compiler fuses a traced forward by itself."""
    return (
        all(isinstance(x, Tensor) and device_type(x) == "cpu" for x in tensors)
        and fuses(*tensors)
        and get_proxy_mode() is None
    )


def norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a norm by the kernel if that computes the same, else saving only its input inside `recomputing`."""
    plain = type(self).forward
    if len(args) != 1 or kwargs:
        return plain(self, *args, **kwargs)
    if _fuses(args[0], getattr(self, "weight", None)) and (epsilon := norm_epsilon(self)) is not None:
        function = partial(rms_norm, weight=self.weight, epsilon=epsilon)
        return recompute_later(function(args[0]), function, args[0])
    if not _recomputes(args[0]):
        return plain(self, *args)
    return _recomputed(MethodType(plain, self), args[0])


def tile_mlps(model: nn.Module, tiles: int) -> None:
    """Run the gated MLPs of a model prepared by `save_less` over so many parts of their tokens, one after another.

    The widest activations of a layer, T * M numbers several times over, then exist for a part of the tokens only; the
    backward pass recomputes each part. The number of parts is fixed, since wrappers that gather weights within
    submodules need as many calls on every rank.

    Raises:
        ConfigError: no gated MLP was recognised.
    """
    found = [module for module in model.modules() if getattr(module.forward, "__func__", None) is _gated_forward]
    if tiles > 1 and not found:
        raise _nothing_to_tile(model, tiles)
    for module in found:
        cast(Any, module).burnish_tiles = tiles


def check_tiles(model: nn.Module, tiles: int) -> None:
    """Refuse a model without an MLP that looks gated, if there are to be tiles; it may be one without values.

    Raises:
        ConfigError: no module has the names of a gated MLP.
    """
    if tiles > 1 and not any(map(_looks_gated, model.modules())):
        raise _nothing_to_tile(model, tiles)


def _nothing_to_tile(model: nn.Module, tiles: int) -> ConfigError:
    return ConfigError(
        f"mlp_tiles = {tiles}: {type(model).__name__} has no MLP of gate_proj, up_proj, down_proj and act_fn to tile; "
        "remove mlp_tiles."
    )


def _tiled(module: nn.Module, x: Tensor, tiles: int) -> Tensor:
    mlp = cast("Callable[[Tensor], Tensor]", MethodType(type(module).forward, module))
    rows = x.flatten(0, -2)
    keeps = torch.is_grad_enabled()
    draws = draws_dropout(module)  # the dropout of adapters must be the same in the backward pass
    # Empty parts are run too: see above.
    outputs = [
        checkpoint(mlp, part, use_reentrant=False, preserve_rng_state=draws) if keeps else mlp(part)
        for part in rows.tensor_split(tiles)
    ]
    return torch.cat(outputs).view_as(x)


def _gated_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and getattr(self, "burnish_tiles", 1) > 1:
        return _tiled(self, args[0], self.burnish_tiles)
    if len(args) != 1 or kwargs:
        return type(self).forward(self, *args, **kwargs)
    if _fuses(args[0]) and is_silu(self.act_fn):
        operands = self.gate_proj(args[0]), self.up_proj(args[0])
        return self.down_proj(recompute_later(gated_silu(*operands), gated_silu, *operands))
    if not _recomputes(args[0]):
        return type(self).forward(self, *args)

    def gate(gate_x: Tensor, up_x: Tensor) -> Tensor:
        return self.act_fn(gate_x) * up_x

    return self.down_proj(_recomputed(gate, self.gate_proj(args[0]), self.up_proj(args[0])))
