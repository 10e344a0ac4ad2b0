"""Training arguments: `transformers.TrainingArguments` plus the fields of `burnish.schema`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from burnish.errors import ConfigError
from burnish.model.precision import fast_bf16
from burnish.schema import DPOFields, GRPOFields, KTOFields, OnlineDPOFields, RewardFields, SFTFields, check_keywords

__all__ = ["DPOConfig", "GRPOConfig", "KTOConfig", "OnlineDPOConfig", "RewardConfig", "SFTConfig"]

T = TypeVar("T", bound=type[Any])


def _with_checked_arguments(config: T) -> T:
    """Let a wrong name or type raise a ConfigError that says what to do, where a dataclass raises a bare TypeError."""
    own_init: Any = config.__init__
    names = [field.name for field in fields(config)]

    @wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, **check_keywords(config.kind, dict(zip(names, args, strict=False)) | kwargs))

    config.__init__ = init
    return config


def _finish(config: Any) -> None:
    """Check the fields, resolve `bf16` and `token_budget`, switch off what hides errors or wraps the model twice."""
    config.check()
    if config.output_dir is not None and Path(config.output_dir).is_file():
        raise ConfigError(f"output_dir = {config.output_dir!r}: that is a file; name a folder.")
    requested = config.bf16
    # bf16 means bf16 weights with fp32 masters here; accelerate's autocast would add a second cast and fp32 outputs.
    config.bf16 = False
    try:
        TrainingArguments.__post_init__(config)
        get_reporting_integration_callbacks(config.report_to)
    except (AttributeError, ImportError, OSError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"transformers refuses the configuration: {' '.join(str(error).split())}") from error
    config.bf16 = fast_bf16(config.device) if requested is None else bool(requested)
    if config.token_budget is None:
        config.token_budget = 2048 if config.device.type == "cpu" else 16384
    config.dataloader_pin_memory = False


@_with_checked_arguments
@dataclass
class SFTConfig(SFTFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `SFTTrainer`: TRL's names where they mean the same; see `burnish.schema.SFTFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_arguments
@dataclass
class RewardConfig(RewardFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `RewardTrainer`: TRL's names where they mean the same; see `burnish.schema.RewardFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_arguments
@dataclass
class DPOConfig(DPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `DPOTrainer`: TRL's names where they mean the same; see `burnish.schema.DPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_arguments
@dataclass
class KTOConfig(KTOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `KTOTrainer`: TRL's names where they mean the same; see `burnish.schema.KTOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_arguments
@dataclass
class OnlineDPOConfig(OnlineDPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `OnlineDPOTrainer`: TRL's names where they mean the same; see `burnish.schema.OnlineDPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)


@_with_checked_arguments
@dataclass
class GRPOConfig(GRPOFields, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `GRPOTrainer`: TRL's names where they mean the same; see `burnish.schema.GRPOFields`."""

    def __post_init__(self) -> None:
        _finish(self)
