"""Numeric self-test of shared-prefix rows, instead of a list of supported architectures.

A tiny random model of the same class runs two groups packed into one row and is compared with one plain eager forward
per sequence, with windows and chunks small enough to matter. State that leaks between completions, lost windows and
masks that bypass transformers' mask interface all show up as differences.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from transformers import PreTrainedConfig, PreTrainedModel

from burnish.errors import BurnishError
from burnish.model.attention import find_pretrained, install, use_layout
from burnish.model.prefix import PrefixLayout
from burnish.types import GroupSpan

__all__ = ["PrefixSupport", "supports_prefix", "without_router_logits"]

_PROMPTS_AND_COMPLETIONS = ((9, (5, 3, 6)), (7, (4, 4)))
_MAX_NATS = 3e-4
"""Supported architectures differ by at most 9e-5 nats in fp32, unsupported ones by at least 8e-4."""
_MAX_NATS_HALF = 0.25
"""Bound for 16-bit weights, where a lost window (at least 0.7 nats) still shows."""
_WINDOWS = ("sliding_window", "attention_chunk_size")
_WINDOW = 4

_SMALL_SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 4,
    "n_head": 4,
    "head_dim": 16,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "state_size": 4,
    "sliding_window": _WINDOW,
    "attention_chunk_size": _WINDOW,
}
"""Upper bounds of configuration fields in the tiny model."""
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class PrefixSupport:
    """Outcome of the self-test.

    Attributes:
        ok: True where shared-prefix rows are exact for this model.
        reason: why they are not; empty where ok.
    """

    ok: bool
    reason: str = ""


_cache: dict[tuple[type, str], PrefixSupport] = {}


def supports_prefix(model: nn.Module) -> PrefixSupport:
    """Test packed shared-prefix rows against separate forwards for this model's class and configuration.

    Where no tiny model of the class has all of its layer types, the test runs on the model itself. The model and the
    global random state are left unchanged.

    Args:
        model: a transformers model or a wrapper that contains one.

    Returns:
        The outcome; where not ok, padded rows are needed.
    """
    pretrained = find_pretrained(model)
    if not pretrained._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        return PrefixSupport(False, f"{type(pretrained).__name__} does not use transformers' attention interface")
    try:
        tiny_config = _shrunk(pretrained.config)
    except Exception:  # a configuration may not allow it; the model itself is then tested
        tiny_config = pretrained.config
    key = (type(pretrained), tiny_config.to_json_string(use_diff=False))
    if key not in _cache:
        with _disable_current_modes():  # a trace of fake tensors needs the outcome too
            tiny = None if tiny_config is pretrained.config else _tiny_model(type(pretrained), tiny_config)
            is_representative = tiny is not None and _architecture(pretrained) <= _architecture(tiny)
            with _prepared(tiny if tiny is not None and is_representative else pretrained) as ready:
                support = _test(ready)
        if not is_representative:
            return support
        _cache[key] = support
    return _cache[key]


def _architecture(model: nn.Module) -> set[type]:
    """Collect the module types from transformers' model code; a tiny model must have all of the real one's."""
    return {type(m) for m in model.modules() if type(m).__module__.startswith("transformers.models.")}


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink a configuration to few small layers, one of each type."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for holder in (config, text):
        if hasattr(holder, "quantization_config"):
            delattr(holder, "quantization_config")
    heads, kv_heads = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    for name, small in _SMALL_SIZES.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not isinstance(size, bool) and size > small:
            setattr(text, name, small)
    if isinstance(heads, int) and isinstance(kv_heads, int):
        small_heads = text.num_attention_heads
        text.num_key_value_heads = small_heads if kv_heads == heads else min(kv_heads, max(1, small_heads // 2))
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, token, None)
    _shrink_depth(text)
    return config


def _shrink_depth(text: PreTrainedConfig) -> None:
    """Keep the first layer of each type, at least two in all, and the same entries of per-layer lists."""
    depth_name = next((name for name in _DEPTHS if isinstance(getattr(text, name, None), int)), None)
    if depth_name is None:
        return
    depth = getattr(text, depth_name)
    types = getattr(text, "layer_types", None) or [None] * depth
    kept = sorted({types.index(kind) for kind in types})
    kept += [index for index in range(depth) if index not in kept][: max(0, 2 - len(kept))]
    for name, listed in list(vars(text).items()):
        if isinstance(listed, list) and len(cast("list[Any]", listed)) == depth:
            setattr(text, name, [cast("list[Any]", listed)[index] for index in sorted(kept)])
    setattr(text, depth_name, len(kept))


def _tiny_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build a random fp32 model on the CPU; None where the architecture rejects the shrunk configuration."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            model = kind._from_config(config, dtype=torch.float32)  # pyright: ignore[reportPrivateUsage]
        except Exception:  # architectures reject sizes in many ways; the caller then tests the real model
            return None
        # Norms, biases and sinks are initialised to constants, which would hide errors.
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@contextmanager
def without_router_logits(model: nn.Module) -> Generator[None]:
    """Disable a mixture of experts' router logits, whose load-balancing loss expects one row per sequence."""
    text: Any = cast("PreTrainedModel", model).config.get_text_config()
    before = getattr(text, "output_router_logits", False)
    if not before:
        yield
        return
    text.output_router_logits = False
    try:
        yield
    finally:
        text.output_router_logits = before


@contextmanager
def _prepared(model: PreTrainedModel) -> Generator[PreTrainedModel]:
    """Put the model in eval mode with small windows; restore both on exit."""
    text = model.config.get_text_config()
    training = model.training
    implementation = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    windows = {name: getattr(text, name) for name in _WINDOWS if isinstance(getattr(text, name, None), int)}
    try:
        model.eval()
        for name in windows:
            setattr(text, name, _WINDOW)
        with without_router_logits(model):
            yield model
    finally:
        for name, size in windows.items():
            setattr(text, name, size)
        model.set_attn_implementation(implementation or "eager")
        model.train(training)


@torch.no_grad()
def _test(model: PreTrainedModel) -> PrefixSupport:
    """Compare a packed row with separate eager forwards, and with itself after changing one completion."""
    name = type(model).__name__
    tokens, layout, sequences = _test_row(model)
    changed = tokens.clone()
    first, sibling = layout.spans[0].completions[:2]
    changed[0, first[0] : sum(first)] = (changed[0, first[0] : sum(first)] + 1) % int(tokens.max())
    try:
        model.set_attn_implementation("eager")
        expected = [_logprobs(model(tokens[:, index], use_cache=False)) for index in sequences]
        install(model)
        ones, positions = torch.ones_like(tokens), layout.position_ids.to(model.device)
        with use_layout(layout, model):
            actual, after = (
                _logprobs(model(row, attention_mask=ones, position_ids=positions, use_cache=False))
                for row in (tokens, changed)
            )
    except BurnishError as error:
        return PrefixSupport(False, f"{name}: {error}")
    except Exception as error:  # third-party model code may fail in any way; the reason is the result
        return PrefixSupport(False, f"{name} failed on a packed row: {type(error).__name__}: {error}")
    limit = _MAX_NATS if actual.dtype == torch.float32 and model.dtype == torch.float32 else _MAX_NATS_HALF
    unchanged = slice(sibling[0], sum(sibling))
    leaked = float((actual[unchanged] - after[unchanged]).abs().max())
    # Exactly zero except in mixtures of experts, whose products are grouped by the routing of all tokens.
    if not leaked <= limit / 10:
        return PrefixSupport(False, f"{name}: changing one completion changes another by {leaked:.2g} nats")
    worst = max(float((actual[i] - e).abs().max()) for i, e in zip(sequences, expected, strict=True))
    if not worst <= limit:
        return PrefixSupport(False, f"{name}: a packed row differs from separate forwards by {worst:.2g} nats")
    return PrefixSupport(True)


def _logprobs(output: Any) -> Tensor:
    """Return [T, V] log-probabilities in fp32 (or the hidden states of a model without a head)."""
    logits = cast(Tensor, output[0])[0].float()
    return logits.log_softmax(-1) if logits.ndim == 2 else logits


def _test_row(model: PreTrainedModel) -> tuple[Tensor, PrefixLayout, list[Tensor]]:
    """Build tokens [1, T], their layout, and the row indices of each sequence, on the model's device."""
    spans: list[GroupSpan] = []
    sequences: list[Tensor] = []
    end = 0
    for prompt_length, lengths in _PROMPTS_AND_COMPLETIONS:
        prompt = torch.arange(end, end + prompt_length)
        end += prompt_length
        completions: list[tuple[int, int]] = []
        for length in lengths:
            completions.append((end, length))
            sequences.append(torch.cat((prompt, torch.arange(end, end + length))))
            end += length
        spans.append(GroupSpan((int(prompt[0]), prompt_length), tuple(completions)))
    vocabulary = min(int(model.config.get_text_config().vocab_size), 64)
    tokens = torch.randint(vocabulary, (1, end), generator=torch.Generator().manual_seed(0))
    layout = PrefixLayout(tuple(spans))
    return tokens.to(model.device), layout, sequences
