"""The base of the trainers' configs: `transformers.TrainingArguments`, checked and completed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from burnish.config import apply_algorithm, check_keywords, known_fields
from burnish.errors import ConfigError, show
from burnish.model.precision import fast_bf16
from burnish.trainers.parsing import given_fields, make_parseable
from burnish.training.processes import check_world_size, needs_cpu

__all__ = ["TrainerConfig", "checked"]

T = TypeVar("T", bound=type[Any])


def checked(config: T) -> T:
    """Let a wrong name or type raise a ConfigError that says what to do, let an `algorithm` set the fields that are not
    given, and let argument parsers fill the class.
    """
    own_init: Any = config.__init__
    names = [item.name for item in dataclasses.fields(config)]

    @functools.wraps(own_init)
    def init(self: Any, /, *args: Any, **kwargs: Any) -> None:
        values = given_fields(config, dict(zip(names, args, strict=False)) | kwargs)
        given = check_keywords(config.kind, values)
        own_init(self, **given, **_set_by_algorithm(config, given))

    config.__init__ = init
    make_parseable(config)
    return config


def _set_by_algorithm(config: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the `algorithm` of a config sets, beside those that are given."""
    values = {name: info.default for name, info in known_fields(config.kind).items()} | dict(given)
    return {
        name: value
        for name, value in apply_algorithm(config.kind, values, given).items()
        if name not in given and value != values[name]
    }


_REFUSALS = (AttributeError, ImportError, LookupError, OSError, OverflowError, RuntimeError, TypeError, ValueError)
"""Errors that transformers and torch raise for arguments that do not fit."""

_NEEDS_THE_MODEL = ("adalomo", "apollo", "galore", "lomo")
"""Optimizers whose arguments transformers reads only beside the model."""


def _check_parts(config: Any) -> None:
    """Make the reporter, the optimizer's arguments and the schedule once, on one number: the real ones come last."""
    name = str(getattr(config.optim, "value", config.optim))
    tried: dict[str, Callable[[], object]] = {
        "report_to": lambda: get_reporting_integration_callbacks(config.report_to),
        "lr_scheduler_kwargs": lambda: _try_schedule(config),
    }
    if not name.startswith(_NEEDS_THE_MODEL):
        tried["optim_args"] = lambda: Trainer.get_optimizer_cls_and_kwargs(config)
    with_type = {"lr_scheduler_kwargs": "lr_scheduler_type", "optim_args": "optim"}
    for field, attempt in tried.items():
        try:
            attempt()
        except _REFUSALS as error:
            kind = with_type.get(field)
            beside = "" if kind is None else f" with {kind} = {str(getattr(config, kind))!r}"
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{field} = {show(getattr(config, field))}{beside}: transformers refuses it ({reason})."
            ) from error


def _try_schedule(config: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: Any = get_scheduler(
        config.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=2,
        num_training_steps=8,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    by_metric = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for _ in range(4):
        optimizer.step()
        schedule.step(*([0.0] if by_metric else []))


@dataclass
class TrainerConfig(TrainingArguments):
    """Arguments of every trainer; a stage's config adds the fields of the stage.

    Raises:
        ConfigError: naming the field, the value and the fix.
    """

    def __post_init__(self) -> None:
        """Check the fields, resolve `bf16` and `token_budget`, switch off what would hide errors."""
        config: Any = self
        config.check()
        config.use_cpu = config.use_cpu or needs_cpu()
        if config.trust_remote_code:
            config.model_init_kwargs = {**(config.model_init_kwargs or {}), "trust_remote_code": True}
        requested = config.bf16
        # bf16 means bf16 weights with fp32 masters; accelerate's autocast would add a second cast and fp32 outputs.
        config.bf16 = False
        try:
            super().__post_init__()
        except _REFUSALS as error:
            raise ConfigError(f"transformers refuses the configuration: {' '.join(str(error).split())}") from error
        _check_parts(config)
        check_world_size(config)
        config.bf16 = fast_bf16(config.device) if requested is None else bool(requested)
        if config.token_budget is None:
            config.token_budget = 2048 if config.device.type == "cpu" else 16384
        config.dataloader_pin_memory = False
