"""Plan a run's memory before its weights are loaded, choose settings that fit, and compare with what it took."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from burnish.config.stages import known_fields
from burnish.errors import ConfigError, ModelError
from burnish.model.checkpointing import checkpointing_field
from burnish.planner.budget import keep_budget, refuse_too_large
from burnish.planner.devices import Device, find_device, gpu_like, host_memory
from burnish.planner.models import FoundModel, find_shape
from burnish.planner.plan import Plan, estimate, format_size
from burnish.planner.run import Request
from burnish.training.process_memory import HeldMemory, held_memory, return_freed_blocks
from burnish.types import Group

__all__ = ["compare_with_plan", "plan_memory"]

logger = logging.getLogger(__name__)


def plan_memory(model: Any, args: Any, training_set: Any, peft_config: Any) -> Plan | None:
    """Plan a run, and set the fields of `args` that `memory_budget` chooses.

    Args:
        model: name, path, or model in memory.
        args: the stage's config.
        training_set: encoded rows; the longest decides the lengths that are planned.
        peft_config: adapters to train, or None.

    Returns:
        The plan of what will run; None for a model whose dimensions the planner does not know.

    Raises:
        ConfigError: the run does not fit.
    """
    try:
        request = _request(model, args, training_set, peft_config)
    except ModelError as error:
        if args.memory_budget is None:
            return None
        raise ConfigError(
            f"memory_budget = {args.memory_budget!r}: the planner does not know the model's dimensions; leave the "
            f"field out. {error}"
        ) from error
    if args.memory_budget is None and args.check_memory:
        refuse_too_large(request)
    budgeted = keep_budget(request)
    _choose(args, budgeted.chosen)
    for line in budgeted.reasons:
        logger.info(line)
    if args.memory_budget is not None and request.device.is_cpu:
        return_freed_blocks()
    return estimate(budgeted.request)


def _choose(args: Any, chosen: Mapping[str, Any]) -> None:
    """Set fields as if the config had been made with them."""
    vars(args).update(chosen)
    # transformers derives the name that it reads from the older one when a config is made.
    if "gradient_checkpointing" in chosen:
        vars(args)[checkpointing_field(args)] = args.gradient_checkpointing


def compare_with_plan(plan: Plan | None, device: torch.device, before: HeldMemory | None) -> None:
    """Log the most memory that the run took, the allocator's on a GPU and else the process's, beside the plan.

    Args:
        plan: the run's plan, if there is one.
        device: device of the run.
        before: what the process held when the run was planned.
    """
    if plan is None or before is None or (held := held_memory(device)) is None:
        return
    planned = plan.peak_bytes - (plan.fixed.get("context", 0) if device.type == "cuda" else 0)
    peak = format_size(held.peak)
    # The peak is the process's: one from before hides a lower one of this run. Systems count pages in batches.
    if held.peak > 1.01 * before.peak:
        measured = f"{peak} at most"
    else:
        measured = f"no more than the {peak} that the process took before the run"
    if before.now is not None:
        measured += f" ({format_size(before.now)} as it began)"
    logger.info("memory: %s, %s planned", measured, format_size(planned))


def _request(model: Any, args: Any, training_set: Any, peft_config: Any) -> Request:
    init = dict(args.model_init_kwargs or {})
    in_memory = getattr(getattr(model, "config", None), "quantization_config", None)
    if (quantization := init.pop("quantization_config", in_memory)) is not None:
        init["quantization_config"] = _quantization(quantization)
    if "dtype" in init:
        init["dtype"] = str(init["dtype"]).removeprefix("torch.")
    fields = {name: getattr(args, name) for name in known_fields(args.kind)}
    prompt, length = _longest(training_set)
    if length is not None and "max_length" in fields:
        fields["max_length"] = length
    peft = None if peft_config is None else peft_config.to_dict()
    in_memory = not isinstance(model, str | Path)
    return Request(
        args.kind, _found(model), _device(args), fields, peft, init, prompt, args.world_size, in_memory=in_memory
    )


def _found(model: Any) -> FoundModel:
    """Find the dimensions of a model by its name, or read those of a model in memory."""
    if isinstance(model, str | Path):
        return find_shape(str(model))
    adapters: Any = next(iter(getattr(model, "peft_config", {}).values()), None)
    name = type(model).__name__
    if not hasattr(getattr(model, "config", None), "to_dict"):
        raise ModelError(f"model = {name}: it has no configuration.")
    return FoundModel.of(model.config.to_dict(), name, name, None if adapters is None else adapters.to_dict())


def _quantization(given: Any) -> str | Mapping[str, Any]:
    """Reduce a quantisation, by word, table or object, to what decides its bytes."""
    if isinstance(given, str):
        return given
    fields: Mapping[str, Any] = given if isinstance(given, Mapping) else given.to_dict()
    if fields.get("load_in_8bit"):
        return {"load_in_8bit": True}
    if not fields.get("load_in_4bit"):
        raise ModelError(f"quantization_config: its bytes are not known of {fields.get('quant_method')!r}.")
    return {"load_in_4bit": True, "bnb_4bit_use_double_quant": bool(fields.get("bnb_4bit_use_double_quant"))}


def _longest(training_set: Any) -> tuple[int | None, int | None]:
    """Return prompt and row length of the group with most tokens; None each where rows come as a stream."""
    if not isinstance(training_set, list) or not training_set:
        return None, None
    largest = max(cast("list[Group]", training_set), key=lambda group: group.num_tokens)
    prompt = len(largest.prompt_ids)
    return prompt, prompt + max([len(completion.token_ids) for completion in largest.completions] or [1])


def _device(args: Any) -> Device:
    """Describe the device of this rank; ranks on one machine share the host's memory."""
    if args.device.type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        device = gpu_like(properties.name, properties.total_memory).with_host(host_memory())
    else:
        device = find_device("cpu")
    return device.shared_by(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
