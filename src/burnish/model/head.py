"""A model's output embedding on the tiled path: its logit scaling, and its weight, bias and LoRA as tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from burnish.errors import ModelError
from burnish.model.tiled_head import HeadOutput, HeadSpec, tiled_logprobs

__all__ = ["head_logprobs", "head_spec"]


class _Rule(NamedTuple):
    """Configuration fields of a model's logit scaling."""

    multiply: str | None = None
    divide: str | None = None
    softcap: str | None = None


# By model_type of the whole model: a multimodal wrapper may scale differently from its text model alone.
_RULES: dict[str, _Rule] = {
    model_type: rule
    for rule, model_types in (
        (
            _Rule(softcap="final_logit_softcapping"),
            "beam gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text "
            "mistral_large4 nanochat paligemma vaultgemma",
        ),
        (_Rule(softcap="logits_soft_cap"), "recurrent_gemma"),
        (_Rule(softcap="output_logit_soft_cap"), "xlstm"),
        (_Rule(multiply="output_multiplier", softcap="final_logit_softcapping"), "muse_glimmer muse_spark"),
        (_Rule(multiply="logit_scale"), "cohere cohere2 cohere2_moe cohere_compass cohere_compass_text"),
        (_Rule(multiply="lm_head_multiplier"), "falcon_h1"),
        (_Rule(multiply="logits_scaling"), "hyperclovax hyperclovax_vision_v2"),
        (
            _Rule(divide="logits_scaling"),
            "granite granite4_vision granite_docling granite_swa granitemoe granitemoe_swa granitemoehybrid "
            "granitemoeshared",
        ),
    )
    for model_type in model_types.split()
}


def head_spec(config: Any) -> HeadSpec:
    """Look up the scale and softcap that a model applies to its head's output.

    Unknown architectures get the identity; compare with the model's own logits before relying on it. A scale on the
    hidden states *before* the head (MiniCPM3, Inkling) and removed padding columns (Inkling) are not supported.

    Args:
        config: the `PretrainedConfig` of the whole model.

    Returns:
        Scale and softcap.
    """
    rule = _RULES.get(getattr(config, "model_type", ""), _Rule())
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def value(field: str | None) -> float | None:
        found = getattr(text_config, field, None) if field is not None else None
        return None if found is None else float(found)

    multiply, divide, softcap = value(rule.multiply), value(rule.divide), value(rule.softcap)
    return HeadSpec(
        scale=(1.0 if multiply is None else multiply) / (1.0 if divide is None else divide), softcap=softcap or None
    )


def head_logprobs(
    module: nn.Module,
    hidden_NH: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    spec: HeadSpec = HeadSpec(),
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    with_collision: bool = False,
) -> HeadOutput:
    """Compute :func:`tiled_logprobs` of an output embedding.

    The embedding may be an `nn.Linear`, LoRA around one, a copy in `modules_to_save`, or one with trained rows
    (`trainable_token_indices`, also of a tied embedding).

    Args:
        module: `model.get_output_embeddings()`.
        hidden_NH: [N, H] input of the module.
        target_N: [N] tokens.
        temperature: positive.
        spec: the model's scale and softcap on the module's output.
        with_entropy: also return the entropy.
        entropy_gradient: False returns an entropy without a gradient.
        with_collision: also return the log collision probability.

    Returns:
        As :func:`tiled_logprobs`.

    Raises:
        ModelError: the module's weight is not a plain matrix.
        ConfigError: the temperature is not positive.
    """
    if torch.is_autocast_enabled(device := hidden_NH.device.type):
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(device))
    weight_VH, low_rank, bias_V = _read_head(module, hidden_NH)
    options: dict[str, Any] = {"temperature": temperature, "spec": spec}
    options |= {"with_entropy": with_entropy, "entropy_gradient": entropy_gradient, "with_collision": with_collision}
    return tiled_logprobs(hidden_NH, weight_VH, target_N, bias_V=bias_V, low_rank=low_rank, **options)


class _Head(NamedTuple):
    """An output embedding as tensors: logits = hidden weight^T + bias + u b^T."""

    weight: Tensor
    low_rank: tuple[Tensor, Tensor] | None
    bias: Tensor | None


def _read_head(module: nn.Module, hidden_NH: Tensor) -> _Head:
    """Read weight, low-rank factors and bias of an output embedding."""
    if not type(module).__module__.startswith("peft."):
        linear = _plain_linear(module)
        return _Head(linear.weight, None, cast("Tensor | None", linear.bias))
    from peft.tuners.lora import Linear as LoraLinear  # already imported: the module is peft's
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        return _read_tokens(cast("Any", module).token_adapter)
    if isinstance(module, ModulesToSaveWrapper):
        wrapper = cast("Any", module)
        active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        use_copy = bool(active) and not wrapper.disable_adapters
        return _read_head(wrapper.modules_to_save[active[0]] if use_copy else wrapper.original_module, hidden_NH)
    if type(module) is LoraLinear:
        return _read_lora(cast("Any", module), hidden_NH)
    raise _unreadable(module, "use a plain LoRA adapter or `modules_to_save` on the head, or exclude it from adapters")


def _read_tokens(layer: Any) -> _Head:
    """Read the base weight with its trained rows (`trainable_token_indices`), as in the layer's own forward."""
    linear = _plain_linear(layer.base_layer)
    off = layer.disable_adapters or not layer.active_adapters
    if off and layer.merged:
        layer.unmerge()
    if off or layer.merged:
        return _Head(linear.weight, None, cast("Tensor | None", linear.bias))
    # peft ignores the bias while rows are replaced.
    return _Head(layer.get_merged_weights(layer.active_adapters), None, None)


def _read_lora(layer: Any, hidden_NH: Tensor) -> _Head:
    """Read base weight and active adapters of a `peft.tuners.lora.Linear`, summed as in its own forward."""
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as in its own forward
    linear = _plain_linear(layer.base_layer)
    bias_V = cast("Tensor | None", linear.bias)
    if layer.disable_adapters or layer.merged:
        return _Head(linear.weight, None, bias_V)
    factors: list[tuple[Tensor, Tensor]] = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in layer.lora_variant:
            variant = type(layer.lora_variant[name]).__name__
            raise _unreadable(
                layer, f"adapter {name!r} is the variant {variant}: use plain LoRA on the head, or exclude it"
            )
        lora_a, lora_b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        u_NR = lora_a(layer.lora_dropout[name](hidden_NH.to(lora_a.weight.dtype))) * scaling
        factors.append((u_NR, lora_b.weight.to(u_NR.dtype)))
        if lora_b.bias is not None:
            bias_V = lora_b.bias * scaling + (0 if bias_V is None else bias_V)
    if len(factors) <= 1:
        return _Head(linear.weight, factors[0] if factors else None, bias_V)
    wide = max((u_NR.dtype for u_NR, _ in factors), key=lambda dtype: dtype.itemsize)
    u_NR, b_VR = (torch.cat([pair[side].to(wide) for pair in factors], dim=1) for side in (0, 1))
    return _Head(linear.weight, (u_NR, b_VR), bias_V)


def _plain_linear(module: nn.Module) -> nn.Linear:
    """Return the module if it multiplies by a dense floating-point weight like `nn.Linear`, else raise."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise _unreadable(module, "exclude the head from quantisation and adapters")
    weight = module.weight
    if (type(weight) not in (nn.Parameter, Tensor) and not is_fake(weight)) or not weight.is_floating_point():
        raise _unreadable(
            module,
            f"its weight is a {type(weight).__name__} of {weight.dtype}: exclude the head from "
            "quantisation, or gather a sharded weight first",
        )
    return module


def _unreadable(module: nn.Module, fix: str) -> ModelError:
    return ModelError(f"output embedding = {type(module).__module__}.{type(module).__name__}: {fix}.")
