"""Check quantisation settings without torch: one word, or the arguments of `BitsAndBytesConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from burnish.config.declare import FieldInfo
from burnish.config.validation import check_mapping, did_you_mean
from burnish.errors import ConfigError, show

__all__ = ["QUANTIZATION_FIELDS", "check_quantization"]

_WORDS: dict[str, dict[str, Any]] = {
    # QLoRA's data type and double quantisation (2305.14314).
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
_DTYPES = Literal["bfloat16", "float16", "float32"]

QUANTIZATION_FIELDS: dict[str, FieldInfo] = {
    name: FieldInfo(name, hint)
    for name, hint in {
        "load_in_4bit": bool,
        "load_in_8bit": bool,
        "bnb_4bit_compute_dtype": _DTYPES,
        "bnb_4bit_quant_storage": str,
        "bnb_4bit_quant_type": Literal["nf4", "fp4"],
        "bnb_4bit_use_double_quant": bool,
        "llm_int8_enable_fp32_cpu_offload": bool,
        "llm_int8_has_fp16_weight": bool,
        "llm_int8_skip_modules": list[str],
        "llm_int8_threshold": float,
        "quant_method": Literal["bitsandbytes"],
    }.items()
}
"""Arguments of transformers' `BitsAndBytesConfig`."""


def check_quantization(value: str | Mapping[str, Any], where: str = "quantization_config") -> dict[str, Any]:
    """Check a quantisation setting and return the arguments of transformers' `BitsAndBytesConfig`.

    Args:
        value: `"nf4"` (NF4 with double quantisation, as in QLoRA), `"int8"`, or the arguments themselves.
        where: name of the table in messages.

    Raises:
        ConfigError: an unknown word, name, type or value, or neither 4 nor 8 bits.
    """
    if isinstance(value, str):
        if value not in _WORDS:
            raise ConfigError(
                f"{where} = {show(value)}: {did_you_mean(value, _WORDS)}, or give a table, such as "
                "{ load_in_4bit = true }."
            )
        return dict(_WORDS[value])
    fields = check_mapping(QUANTIZATION_FIELDS, value, where)
    if bool(fields.get("load_in_4bit")) == bool(fields.get("load_in_8bit")):
        raise ConfigError(f"[{where}] {show(dict(value))}: set one of load_in_4bit and load_in_8bit to true.")
    return fields
