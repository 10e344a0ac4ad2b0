"""Convert `ModelConfig` to the peft and quantisation configurations that trainers take."""

from __future__ import annotations

import re
from typing import Any

import torch

from burnish.config.lora import check_lora
from burnish.config.quantization import check_quantization
from burnish.errors import ConfigError, show
from burnish.model.precision import fast_bf16
from burnish.model.quantization import resolve_quantization
from burnish.scripts.arguments import ModelConfig

__all__ = ["get_peft_config", "get_quantization_config"]

_LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Fields of `ModelConfig` -> fields of `LoraConfig`."""

_MODULE_NAME = re.compile(r"[\w.]+")


def get_peft_config(model_args: ModelConfig) -> Any:
    """Build the adapter configuration of a script.

    A single `lora_target_modules` that is a plain name is a list of one module; any other is passed to peft as text:
    `all-linear`, or a regular expression.

    Args:
        model_args: model arguments.

    Returns:
        A `LoraConfig`, or None without `use_peft`.

    Raises:
        ConfigError: a value that peft does not take.
    """
    if not model_args.use_peft:
        return None
    fields: dict[str, Any] = {}
    for name, field in _LORA.items():
        value = getattr(model_args, name)
        if field == "target_modules" and value is not None and len(value) == 1 and not _MODULE_NAME.fullmatch(value[0]):
            value = value[0]
        try:
            fields |= check_lora({field: value})
        except ConfigError as error:
            fix = str(error).removeprefix(f"[peft] {field} = {show(value)}: ")
            raise ConfigError(f"{name} = {show(value)}: {fix}") from None
    from peft import LoraConfig

    try:
        return LoraConfig(**fields)
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"use_peft: peft rejects the adapters ({' '.join(str(error).split())}).") from error


def get_quantization_config(model_args: ModelConfig) -> Any:
    """Build the quantisation configuration of a script; 4-bit layers compute in the model's compute dtype.

    Args:
        model_args: model arguments.

    Returns:
        A `BitsAndBytesConfig`, or None without `load_in_4bit` and `load_in_8bit`.

    Raises:
        ConfigError: a bad value, or bitsandbytes is not installed.
    """
    if model_args.load_in_8bit:
        return resolve_quantization({"load_in_8bit": True}, torch.float32)
    if not model_args.load_in_4bit:
        return None
    fields = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": model_args.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": model_args.use_bnb_nested_quant,
    }
    if model_args.bnb_4bit_quant_storage is not None:
        fields["bnb_4bit_quant_storage"] = model_args.bnb_4bit_quant_storage
    if model_args.dtype in (None, "auto"):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        compute_dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    else:
        compute_dtype = getattr(torch, model_args.dtype)
    return resolve_quantization(check_quantization(fields, "ModelConfig"), compute_dtype)
