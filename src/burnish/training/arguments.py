"""Check the arguments of trainers, and refuse those of TRL that are not supported with what to do instead."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from burnish.config import elsewhere, known_fields
from burnish.config.compat import ALIASES, MOVED_ARGUMENTS, REFUSED_ARGUMENTS
from burnish.config.stages import stages_with
from burnish.config.validation import did_you_mean
from burnish.errors import ConfigError
from burnish.model.adapter_checks import refuse_outside_weights

__all__ = ["check_constructor", "check_parts", "refuse_arguments", "resolve_args"]


def check_constructor(trainer: type[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that a trainer's constructor does not have, naming where they belong.

    Raises:
        ConfigError: an argument is unknown, missing or given twice.
    """
    signature = inspect.signature(trainer.__init__)
    parameters = signature.parameters
    config: Any = getattr(trainer, "config_class", None)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in kwargs.items():
        if name in parameters or takes_any:
            continue
        what = f"{name} = {_short(value)}: {trainer.__name__} has no such argument"
        if name in MOVED_ARGUMENTS:
            raise ConfigError(f"{what}; {MOVED_ARGUMENTS[name]}.")
        if config is not None and (name in known_fields(config.kind) or name in ALIASES.get(config.kind, {})):
            raise ConfigError(f"{what}; it is a field of args: {config.__name__}({name}=...).")
        if config is not None and (there := elsewhere(config.kind).get(name)) is not None:
            raise ConfigError(f"{what}; of args, {there.fix}.")
        if name in REFUSED_ARGUMENTS:
            raise ConfigError(f"{what}; {REFUSED_ARGUMENTS[name]}.")
        if stages := stages_with(name):
            raise ConfigError(f"{what}, and args has no such field; it is a field of {', '.join(stages)}.")
        raise ConfigError(f"{what}; {did_you_mean(name, list(parameters)[1:])}.")
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{trainer.__name__}: {error}; name the arguments.") from None


def resolve_args(args: Any, config_class: type[Any], model: Any, quantization_config: Any = None) -> Any:
    """Return the given config, or the trainer's default one, with the quantisation added.

    Args:
        args: the trainer's `args`, or None.
        config_class: the trainer's config class.
        model: the trainer's `model`.
        quantization_config: added to `model_init_kwargs`.

    Raises:
        ConfigError: `args` is of another class; the quantisation is given twice, or with a model in memory.
    """
    if args is None:
        args = config_class()
    elif not isinstance(args, config_class):
        raise ConfigError(f"args = {type(args).__name__}: use a {config_class.__name__}.")
    if quantization_config is None:
        return args
    kwargs = dict(args.model_init_kwargs or {})
    if "quantization_config" in kwargs:
        raise ConfigError(
            "quantization_config is given to the trainer and in model_init_kwargs: remove it from one of them."
        )
    if not isinstance(model, str | Path):
        raise ConfigError(
            "quantization_config beside a model in memory: quantise it when it is loaded, or pass its path."
        )
    args = copy.copy(args)
    args.model_init_kwargs = {**kwargs, "quantization_config": quantization_config}
    return args


def refuse_arguments(**given: Any) -> None:
    """Refuse arguments of TRL's trainers that are not supported; None counts as not given.

    Raises:
        ConfigError: one of them is given.
    """
    for name, value in given.items():
        if value is None:
            continue
        if name == "data_collator" and not isinstance(value, Callable):
            raise ConfigError(
                f"data_collator = {type(value).__name__}: it comes before train_dataset by position, as in TRL; pass "
                "rows as train_dataset=..."
            )
        raise ConfigError(f"{name} = {_short(value)}: {REFUSED_ARGUMENTS[name]}.")


def _short(value: Any) -> str:
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else f"{value!r:.60}"


def check_parts(
    *, peft_config: Any, callbacks: Any, optimizers: Any, optimizer_cls_and_kwargs: Any, args: Any, eval_dataset: Any
) -> None:
    """Refuse parts of the wrong kind before any weight is read.

    Raises:
        ConfigError: with the name of the argument.
    """
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        raise ConfigError(f"peft_config = {_short(peft_config)}: pass a peft config, such as LoraConfig(r=16).")
    if peft_config is not None:
        refuse_outside_weights(peft_config.peft_type, "peft_config")
    for callback in callbacks or ():
        kind: Any = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ConfigError(f"callbacks: {_short(callback)} is not a transformers.TrainerCallback; subclass it.")
    if not isinstance(optimizers, tuple) or len(cast("tuple[Any, ...]", optimizers)) != 2:
        raise ConfigError(
            f"optimizers = {_short(optimizers)}: pass (optimizer, scheduler), or (optimizer, None) for the "
            "configured scheduler; args.optim selects one of transformers by name."
        )
    if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
        raise ConfigError("optimizers and optimizer_cls_and_kwargs both name an optimizer: pass one of them.")
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    best = str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
    if best and args.metric_for_best_model is None:
        raise ConfigError(
            "save_strategy = 'best' with metric_for_best_model = None: name the metric to track, such as 'loss'."
        )
    if eval_dataset is None and strategy != "no":
        raise ConfigError(f"eval_strategy = {strategy!r} without eval_dataset: pass held-out rows, or remove it.")
