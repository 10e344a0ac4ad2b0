"""Attention layouts: packed rows through transformers' attention interface.

`install(model)` switches a model to the attention implementation `burnish`. Inside `use_layout`, the
registered mask function passes it to every layer as `attention_mask`, and the registered attention function calls
`layout.attend`. The mask is never materialised; training (`PrefixLayout`) and decoding (the native engine's cache) are
two layouts.

Without an active layout the implementation is transformers' own SDPA, or `math_attention` for soft-capped scores and
attention sinks, which SDPA does not support. The name is never written to a saved configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from burnish.errors import CheckFailed, ModelError

__all__ = [
    "IMPLEMENTATION",
    "AttentionCall",
    "BoundMask",
    "Layout",
    "MaskRule",
    "SlidingWindow",
    "find_pretrained",
    "install",
    "math_attention",
    "use_layout",
]

IMPLEMENTATION = "burnish"
"""Registered name of the implementation (it must not contain "flash", "sdpa" or "flex_attention")."""

_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "num_items_in_batch"})
"""Tensors that models pass to the attention function although it does not need them."""


@dataclass(frozen=True)
class SlidingWindow:
    """Causal window: a query attends to k in (q - window, q]."""

    window: int

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Map [Q] and [K] true positions to a [Q, K] mask, True where the query attends to the key."""
        distance = query_positions[:, None] - key_positions[None, :]
        return (distance >= 0) & (distance < self.window)


@dataclass(frozen=True)
class MaskRule:
    """Any other mask function of transformers (chunks, ...), evaluated at true positions."""

    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Map [Q] and [K] true positions to a [Q, K] mask, True where the query attends to the key."""
        zero = query_positions.new_zeros((1, 1))
        seen = self.mask_function(zero, zero, query_positions[:, None], key_positions[None, :])
        return seen.expand(query_positions.shape[0], key_positions.shape[0])


@dataclass(frozen=True)
class AttentionCall:
    """Inputs of one layer's attention.

    Attributes:
        module: the attention module.
        layer_index: index of the layer; None where the module does not have one.
        query: [1, heads, T, D].
        key: [1, kv_heads, T, D]; kv_heads divides heads.
        value: [1, kv_heads, T, D] (the last dimension may differ from the query's).
        scaling: factor on the scores.
        softcap: c in c * tanh(score / c), or None.
        sinks: [heads] logit of a virtual key without a value, or None.
        rule: mask within a token's own sequence; None for plain causal. Hashable, so that equal rules share masks.
    """

    module: nn.Module
    layer_index: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    rule: SlidingWindow | MaskRule | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a softmax over a causal mask, or a window, alone."""
        return self.softcap is None and self.sinks is None and not isinstance(self.rule, MaskRule)

    @property
    def sliding_window(self) -> int | None:
        """Window length in tokens if the rule is a sliding window, else None."""
        return self.rule.window if isinstance(self.rule, SlidingWindow) else None


class Layout(Protocol):
    """Which tokens of a row attend to which, given by computing the attention."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return the attention output [1, T, heads, D] of one layer."""
        ...


@dataclass(slots=True)
class _Active:
    """A layout in use, with a count of the layers that attended through it."""

    layout: Layout
    model: nn.Module | None
    checks_mask: bool
    calls: int = 0


@dataclass(frozen=True)
class BoundMask:
    """The `attention_mask` that layers receive: the layout with the mask rule of that layer."""

    active: _Active
    rule: SlidingWindow | MaskRule | None

    def __getitem__(self, index: Any) -> BoundMask:
        """Return itself: layers that share keys and values slice their mask, and the rule holds for any slice."""
        return self


_active: ContextVar[_Active | None] = ContextVar("burnish_layout", default=None)


@contextmanager
def use_layout(layout: Layout, model: nn.Module | None = None, *, checks_mask: bool = True) -> Generator[None]:
    """Run the forwards inside with `layout`; the backward pass, with recomputation, may come later.

    Pass an all-ones two-dimensional `attention_mask` and `use_cache=False` to the forward: without a mask,
    transformers takes restarting positions for packed sequences.

    Args:
        layout: computes the attention of every layer.
        model: named in the error only.
        checks_mask: refuse an `attention_mask` with zeros, for which the host waits for the device.

    Raises:
        CheckFailed: no layer attended through the layout, so the model ran with another attention implementation.
    """
    active = _Active(layout, model, checks_mask)
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)
    if not active.calls:
        name = "the model" if model is None else type(find_pretrained(model)).__name__
        raise CheckFailed(
            f"use_layout: {name} never called the attention implementation {IMPLEMENTATION!r}, so its tokens did not "
            "attend by the layout. Call burnish.model.attention.install(model) before the forward, and do not change "
            "attn_implementation afterwards."
        )


def find_pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the outermost transformers model inside any wrapper (peft, DDP).

    Raises:
        ModelError: the module contains none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(f"model = {type(model).__name__}: it contains no transformers model; pass a PreTrainedModel.")


def install(model: nn.Module) -> None:
    """Switch a model (bare or wrapped by peft) to the attention implementation `burnish`.

    Args:
        model: a transformers model or a wrapper that contains one.

    Raises:
        ModelError: the model does not use transformers' attention interface, or repeats a layer.
    """
    pretrained = find_pretrained(model)
    name = type(pretrained).__name__
    for path, layers in pretrained.named_modules():
        if isinstance(layers, nn.ModuleList):
            _refuse_repeated(path, layers)
    fix = "use a model whose attention goes through transformers' AttentionInterface, or train it with padded rows"
    if not pretrained._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        raise ModelError(f"install: {name} does not let its attention implementation be chosen: {fix}.")
    try:
        pretrained.set_attn_implementation(IMPLEMENTATION)
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"install: {name} refused the attention implementation {IMPLEMENTATION!r}: {fix}.") from error
    chosen = pretrained.config.get_text_config()._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if chosen != IMPLEMENTATION:
        raise ModelError(f"install: {name} kept the attention implementation {chosen!r}: {fix}.")
    for module in pretrained.modules():
        # Deep-copied layers (depth up-scaling, 2312.15166) hold copies of the configuration.
        copied = cast("Any", getattr(module, "config", None))
        if type(copied) is type(pretrained.config.get_text_config()):
            copied._attn_implementation_internal = IMPLEMENTATION  # pyright: ignore[reportPrivateUsage]


def _refuse_repeated(name: str, layers: nn.ModuleList) -> None:
    """Refuse one layer at two depths: key-value caches and saved files identify a layer by its module."""
    first: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if (earlier := first.setdefault(id(layer), index)) != index:
            raise ModelError(
                f"{name}: layers {earlier} and {index} are one module, whose keys and values a rollout could not "
                "tell apart and which transformers does not save. Repeat layers by copy.deepcopy."
            )


def math_attention(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Compute softmax(cap(Q K^T * scaling)) V with sinks, with the softmax in fp32 or wider.

    Args:
        call: scaling, softcap and sinks.
        query: [B, heads, Q, D].
        key: [B, kv_heads, K, D].
        value: [B, kv_heads, K, D].
        seen: mask, broadcastable to [B, heads, Q, K]; every query must attend to a key.

    Returns:
        [B, heads, Q, D].
    """
    batch, heads, num_queries, _ = query.shape
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.flatten(1, 2).to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.to(scores.dtype).reshape(1, heads, 1, 1).expand(batch, heads, num_queries, 1)
        probs = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probs = scores.softmax(dim=-1)
    probs = probs.to(value.dtype).unflatten(1, (kv_heads, heads // kv_heads))
    return torch.matmul(probs, value[:, :, None]).flatten(1, 2)


def _mask(
    *,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **sizes: Any,
) -> Any:
    """Build a layer's mask: the active layout with the mask rule, or SDPA's mask without a layout."""
    active = _active.get()
    if active is None:
        return sdpa_mask(
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **sizes,
        )
    if not allow_is_causal_skip:
        raise ModelError(
            "attention_mask: the model built a mask that depends on more than positions (bidirectional blocks, an "
            "overlay, or packed sequences guessed from position_ids). Pass an all-ones attention_mask of shape "
            "[1, T] and no cache; a model that overlays its own mask cannot use a layout."
        )
    if active.checks_mask and attention_mask is not None and not bool(attention_mask.all()):
        raise ModelError("attention_mask: it has zeros, but rows of a layout have no padding; pass all ones.")
    return BoundMask(active, _bind_rule(mask_function, local_size, device))


def _bind_rule(
    mask_function: Callable[..., Any], local_size: int | None, device: torch.device | str
) -> SlidingWindow | MaskRule | None:
    """Recover the rule behind a transformers mask function, telling windows from chunks by probing around the edge."""
    if mask_function is causal_mask_function:
        return None
    rule = MaskRule(mask_function)
    if local_size is None:
        return rule
    with _disable_current_modes():  # a traced forward is probed too
        near = torch.tensor([0, 1, 2], device=device)
        positions = torch.cat((near, near + max(local_size - 2, 0), near + 2 * local_size))
        window = SlidingWindow(local_size)
        return window if bool((window(positions, positions) == rule(positions, positions)).all()) else rule


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, from `[1, heads, T, D]` to `[1, T, heads, D]`: by the layout if one is active, else like SDPA."""
    call = AttentionCall(
        module=module,
        layer_index=getattr(module, "layer_idx", None),
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux if s_aux is not None else sinks,
        rule=attention_mask.rule if isinstance(attention_mask, BoundMask) else None,
    )
    if isinstance(attention_mask, BoundMask):
        _refuse_unknown(call, dropout, kwargs)
        attention_mask.active.calls += 1
        return attention_mask.active.layout.attend(call), None
    if _active.get() is not None:
        raise ModelError(
            f"{type(module).__name__}: a layout is active but this layer got "
            f"{'no attention mask' if attention_mask is None else 'a mask of its own'}, so it would ignore the "
            "layout. The model builds masks outside transformers' mask interface and cannot use a layout."
        )
    if softcap is None and call.sinks is None:
        kwargs = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    _refuse_unknown(call, dropout, kwargs)
    if attention_mask is None:
        # SDPA's convention: a single query attends to every key, several are aligned with the first keys.
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = ones if len(ones) == 1 else ones.tril()
    # Padding attends to everything, because a softmax over no key would be NaN.
    seen = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    return math_attention(call, query, key, value, seen).transpose(1, 2).contiguous(), None


def _refuse_unknown(call: AttentionCall, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise on arguments that would change the attention and that layouts do not support."""
    name = type(call.module).__name__
    if dropout:
        raise ModelError(
            f"attention dropout = {dropout} in {name}: layouts attend without dropout; "
            "set the configuration's attention dropout (attention_dropout, attn_pdrop) to 0."
        )
    for argument, given in kwargs.items():
        if isinstance(given, Tensor) and argument not in _HARMLESS_TENSORS:
            raise ModelError(
                f"{argument} (a tensor of shape {tuple(given.shape)}) reached the attention of {name}: layouts do "
                "not support it; train this model with another attention implementation."
            )
    if kwargs.get("is_causal") is False:
        raise ModelError(f"is_causal = False in {name}: layouts support causal attention only.")
    if kwargs.get("output_attentions"):
        raise ModelError("output_attentions = True: attention weights are never materialised; leave it False.")


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, cast("Any", _attention))
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, cast("Any", _mask))
