"""Training arguments: `transformers.TrainingArguments` plus the fields of `burnish.schema`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from transformers import TrainingArguments

from burnish.model.precision import fast_bf16
from burnish.schema import DPOFields, GRPOFields, KTOFields, OnlineDPOFields, RewardFields, SFTFields, check_names

__all__ = ["DPOConfig", "GRPOConfig", "KTOConfig", "OnlineDPOConfig", "RewardConfig", "SFTConfig"]

T = TypeVar("T", bound=type[Any])


def _with_checked_names(config: T) -> T:
    """Let an unknown keyword raise a ConfigError that says what to do instead of dataclass' bare TypeError."""
    own_init: Any = config.__init__

    @wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **check_names(config.kind, kwargs))

    config.__init__ = init
    return config


def _finish(config: Any) -> None:
    """Check the fields, resolve `bf16` and `token_budget`, switch off what hides errors or wraps the model twice."""
    config.check()
    requested = config.bf16
    # bf16 means bf16 weights with fp32 masters here; accelerate's autocast would add a second cast and fp32 outputs.
    config.bf16 = False
    TrainingArguments.__post_init__(config)
    config.bf16 = fast_bf16(config.device) if requested is None else bool(requested)
    if config.token_budget is None:
        config.token_budget = 2048 if config.device.type == "cpu" else 16384
    config.dataloader_pin_memory = False


@_with_checked_names
@dataclass
class SFTConfig(SFTFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `SFTTrainer`: TRL's names where they mean the same; see `burnish.schema.SFTFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_names
@dataclass
class RewardConfig(RewardFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `RewardTrainer`: TRL's names where they mean the same; see `burnish.schema.RewardFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_names
@dataclass
class DPOConfig(DPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `DPOTrainer`: TRL's names where they mean the same; see `burnish.schema.DPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_names
@dataclass
class KTOConfig(KTOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `KTOTrainer`: TRL's names where they mean the same; see `burnish.schema.KTOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_names
@dataclass
class OnlineDPOConfig(OnlineDPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `OnlineDPOTrainer`: TRL's names where they mean the same; see `burnish.schema.OnlineDPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_names
@dataclass
class GRPOConfig(GRPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `GRPOTrainer`: TRL's names where they mean the same; see `burnish.schema.GRPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)
