"""Fields of TRL's that say in another way what a field here says: rewritten before anything is checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from burnish.config.stages import Kind
from burnish.errors import ConfigError

__all__ = ["ALIASES", "translate", "translated_names"]

ALIASES: dict[Kind, dict[str, str]] = {
    "ppo": {
        "cliprange": "epsilon",
        "kl_coef": "beta",
        "num_ppo_epochs": "num_iterations",
        "response_length": "max_completion_length",
    },
}
"""Names that TRL gave to fields of a stage -> the names here."""

_EVERYWHERE = {"chat_template_path": "chat_template"}

_ONLINE: tuple[Kind, ...] = ("online_dpo", "grpo", "rloo", "ppo")

_GENERATION = {
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Names in `generation_kwargs` -> fields."""

_GENERATION_NEUTRAL: dict[str, Any] = {
    "bos_token_id": None, "disable_compile": True, "do_sample": True, "eos_token_id": None, "num_beams": 1,
    "num_return_sequences": 1, "pad_token_id": None, "use_cache": True,
}  # fmt: skip
"""Names in `generation_kwargs` that ask for what happens anyway."""


def translated_names(kind: Kind) -> tuple[str, ...]:
    """Names that `translate` rewrites in a stage."""
    online = ("generation_kwargs", "generation_batch_size") if kind in _ONLINE else ()
    return ("warmup_ratio", *_EVERYWHERE, *ALIASES.get(kind, {}), *online)


def translate(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their names here.

    Raises:
        ConfigError: one field by two names, or a value that has no counterpart.
    """
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def put(name: str, value: Any, given: str) -> None:
        if value is None and name in renamed:
            return
        if renamed.get(name) is not None and origin[name] != given:
            other = origin[name] if given == name else given
            raise ConfigError(f"{other} and {name} are one field: set {name} alone.")
        renamed[name], origin[name] = value, given

    aliases = _EVERYWHERE | ALIASES.get(kind, {})
    for given, value in values.items():
        put(aliases.get(given, given), value, given)
    ratio = renamed.get("warmup_ratio")
    if isinstance(ratio, float) and 0 < ratio < 1:
        put("warmup_steps", renamed.pop("warmup_ratio"), "warmup_ratio")
    if kind in _ONLINE and renamed.get("generation_kwargs") is not None:
        for name, (value, given) in _sampling(renamed.pop("generation_kwargs")).items():
            put(name, value, given)
    if kind in _ONLINE and renamed.get("generation_batch_size") is not None:
        size = renamed.pop("generation_batch_size")
        put("steps_per_generation", _steps(size, renamed), "generation_batch_size")
    return renamed


def _sampling(kwargs: Any) -> dict[str, tuple[Any, str]]:
    """Fields that `generation_kwargs` set, each with the name it was given by."""
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"generation_kwargs = {kwargs!r:.80}: use a table, such as {{top_p = 0.9}}.")
    fields: dict[str, tuple[Any, str]] = {}
    for name, value in cast("Mapping[str, Any]", kwargs).items():
        if name in _GENERATION_NEUTRAL and _GENERATION_NEUTRAL[name] == value:
            continue
        if name not in _GENERATION:
            raise ConfigError(
                f"generation_kwargs[{name!r}] = {value!r:.80}: not a way of sampling here; use "
                f"{', '.join(sorted(_GENERATION))}."
            )
        listed = [value] if _GENERATION[name] == "stop" and isinstance(value, str) else value
        fields[_GENERATION[name]] = (listed, f"generation_kwargs[{name!r}]")
    return fields


def _steps(size: Any, fields: Mapping[str, Any]) -> int:
    """Micro-batches that a generation batch of so many completions feeds."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = fields.get("per_device_train_batch_size", 8) * processes
    if not isinstance(size, int) or size < 1 or size % batch:
        raise ConfigError(
            f"generation_batch_size = {size!r}: not a multiple of {batch}, per_device_train_batch_size x {processes} "
            "processes; use one, or set steps_per_generation."
        )
    return size // batch
