"""Kept prompts: the keys and values of a long group's prompt, computed once for all pieces of the group.

A group that does not fit one row is cut into pieces of a few completions each. Its prompt's tokens but the last run
through the layers once; every piece attends to the keys and values kept of them, and runs forward and backward alone.
What the pieces' backward passes send back to keys and values adds up, and the prompt's own backward pass, which starts
from the sums, ends the group:

    dL/dtheta = sum_pieces dL_piece/dtheta + sum_layers (sum_pieces dL_piece/d(K, V)) d(K, V)/dtheta

The prompt's last token is in every piece, since the hidden state at its position predicts each first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from burnish.model.attention import AttentionCall, Layout
from burnish.model.prefix import PrefixLayout
from burnish.model.recomputation import recompute_later
from burnish.types import GroupSpan

__all__ = ["KeptPrompt"]


@dataclass(eq=False, slots=True)
class _Kept:
    """Keys or values of a layer.

    Attributes:
        source: [1, kv_heads, P, D] in the prompt's graph.
        gradient: sum over the pieces so far, in fp32 or wider; None before the first.
    """

    source: Tensor
    gradient: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        """Keep a tensor, and nothing else of a storage that it shares, as after a fused projection."""
        return cls(tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone())

    def before(self, own: Tensor) -> Tensor:
        """Return the kept tokens followed by a piece's own."""
        joined = cast(Tensor, _Join.apply(own, self))
        recompute_later(joined, lambda row: torch.cat((self.source.detach(), row), dim=2), own)
        return joined

    def add(self, gradient: Tensor) -> None:
        """Add a piece's gradient."""
        if self.gradient is None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self.gradient = torch.zeros_like(gradient, dtype=wide)
        self.gradient += gradient

    def take_gradient(self) -> Tensor:
        """Return the gradient in the source's dtype, and let go of the sum."""
        assert self.gradient is not None
        taken, self.gradient = self.gradient.to(self.source.dtype), None
        return taken


class _Join(torch.autograd.Function):
    """Concatenate kept tokens and a piece's own; the kept tokens' gradient is added up outside the graph."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: _Kept) -> Tensor:
        ctx.kept = kept
        return torch.cat((kept.source.detach(), own), dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of a piece's own tokens."""
        # A loss that is still read would keep the prompt's graph alive.
        kept, ctx.kept = cast(_Kept, ctx.kept), None
        gradient, length = cast(Tensor, grad_outputs[0]), kept.source.shape[2]
        kept.add(gradient[:, :, :length])
        return gradient[:, :, length:], None


@dataclass(eq=False)
class KeptPrompt:
    """All but the last token of a prompt, for the pieces of its group.

    Args:
        token_ids: [P] tokens.
        num_pieces: pieces that continue it, one after another.
    """

    token_ids: Sequence[int]
    num_pieces: int
    _layers: dict[nn.Module, tuple[_Kept, _Kept]] = field(
        default_factory=dict[nn.Module, tuple[_Kept, _Kept]], repr=False
    )
    _num_done: int = 0

    @property
    def num_tokens(self) -> int:
        """P."""
        return len(self.token_ids)

    @property
    def is_begun(self) -> bool:
        """Whether keys and values are there."""
        return bool(self._layers)

    def layout(self, spans: tuple[GroupSpan, ...]) -> Layout:
        """Return the layout of a piece, or of the prompt's own row."""
        is_piece = spans[0].prompt[0] < 0
        return (_Continuing if is_piece else _Keeping)(PrefixLayout(spans), self)

    def keep(self, call: AttentionCall) -> None:
        """Keep a layer's keys and values, unless the layer runs again for a backward pass."""
        if call.module not in self._layers:
            self._layers[call.module] = _Kept.of(call.key), _Kept.of(call.value)

    def join(self, call: AttentionCall) -> AttentionCall:
        """Put the kept keys and values of a layer before its own."""
        keys, values = self._layers[call.module]
        return dataclasses.replace(call, key=keys.before(call.key), value=values.before(call.value))

    def end_piece(self) -> None:
        """Run the prompt's backward pass after the last piece's."""
        self._num_done += 1
        if self._num_done < self.num_pieces:
            return
        # Adapters on some layers or projections leave others without a gradient.
        found = [kept for layer in self._layers.values() for kept in layer if kept.gradient is not None]
        if found:
            torch.autograd.backward([kept.source for kept in found], [kept.take_gradient() for kept in found])
        # Not before: layers that are recomputed would be kept again.
        self._layers, self._num_done = {}, 0


@dataclass(frozen=True)
class _Keeping:
    """The layout of the prompt's row."""

    row: PrefixLayout
    prompt: KeptPrompt

    def attend(self, call: AttentionCall) -> Tensor:
        self.prompt.keep(call)
        return self.row.attend(call)


@dataclass(frozen=True)
class _Continuing:
    """The layout of a piece's row."""

    row: PrefixLayout
    prompt: KeptPrompt

    def attend(self, call: AttentionCall) -> Tensor:
        return self.row.attend(self.prompt.join(call))
