"""Quantised weights: configurations for transformers, and 4-bit layers that stay differentiable."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import BitsAndBytesConfig

from burnish.config.quantization import check_quantization
from burnish.errors import ConfigError, ModelError

__all__ = ["is_quantized", "keep_layout", "mark_quantized", "resolve_quantization"]

logger = logging.getLogger(__name__)

_MARKS = (
    "hf_quantizer",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "quantization_method",
    "_is_quantized_training_enabled",
    "hf_device_map",
)
"""Attributes by which transformers, accelerate and peft recognise a quantised model."""


def resolve_quantization(value: Any, dtype: torch.dtype) -> Any:
    """Resolve the `quantization_config` for `from_pretrained`.

    Args:
        value: `"nf4"`, `"int8"`, the arguments of `BitsAndBytesConfig`, or a configuration object of transformers,
            which is returned unchanged.
        dtype: compute dtype of the model, and of 4-bit products unless `value` has a `bnb_4bit_compute_dtype`.

    Returns:
        A configuration object or table for transformers.

    Raises:
        ConfigError: a bad word or table, or bitsandbytes is not installed.
    """
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        if str(fields.get("quant_method", "bitsandbytes")) != "bitsandbytes":
            return value
    if isinstance(value, str | Mapping):
        if isinstance(value, Mapping):
            # The check takes dtypes by name, as in a run file.
            fields = cast("Mapping[str, Any]", value).items()
            value = {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in fields}
        fields = check_quantization(cast("str | dict[str, Any]", value))
        arguments: dict[str, Any] = {"bnb_4bit_compute_dtype": dtype, **fields}
        value = BitsAndBytesConfig(**arguments)
    if not isinstance(value, BitsAndBytesConfig):
        return value
    if find_spec("bitsandbytes") is None:
        raise ConfigError("quantization_config needs the package bitsandbytes: pip install 'burnish[quant]'.")
    if value.load_in_4bit and dtype != torch.float32 and value.bnb_4bit_compute_dtype == torch.float32:
        logger.warning(
            "quantization_config.bnb_4bit_compute_dtype = float32 (transformers' default) while the model computes in "
            "%s: 4-bit layers multiply in fp32, which is slower. Set it to %s, or pass quantization_config='nf4'.",
            dtype,
            str(dtype).removeprefix("torch."),
        )
    return value


def is_quantized(model: torch.nn.Module) -> bool:
    """Tell whether transformers loaded the weights quantised."""
    return bool(getattr(model, "is_quantized", False))


def mark_quantized(model: Any, like: Any) -> None:
    """Mark a model built from another's quantised layers as quantised the same way."""
    for name in _MARKS:
        if hasattr(like, name):
            setattr(model, name, getattr(like, name))


def keep_layout(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs with bf16 products, a 4-bit layer repacks its weight in place at its first forward in evaluation mode. From
    then on its product has no gradient by its input, even in training mode: gradients flow only through adapters and
    residual connections, so new adapters of query, key, value, gate and up projections get exactly zero and the others
    a wrong gradient. Repacking also rounds the constants to bf16, so scores would shift at the first evaluation.

    Args:
        model: any model; 4-bit layers are changed in place.

    Raises:
        ModelError: a weight is already repacked.
    """
    for name, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: bitsandbytes has repacked its 4-bit weight for inference, which rounds it and cuts gradients."
                " Load the model again and do not run it before the trainer gets it, or pass its path."
            )
        cast("Any", module).support_avx512bf16_for_cpu = False
