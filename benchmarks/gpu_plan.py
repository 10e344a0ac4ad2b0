"""What the planner says of the runs of `gpu.py`: their bytes, their FLOPs, and the shapes they have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from burnish.planner.cost import update_flops
from burnish.planner.devices import Device, detect_device, find_device
from burnish.planner.memory import Part
from burnish.planner.models import FoundModel, known_models
from burnish.planner.plan import CONTEXT_BYTES, estimate
from burnish.planner.run import Request, read_run

__all__ = ["CONTEXT_BYTES", "flops", "planned", "request_of", "shape_of"]

TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear"}


def shape_of(model: str, *, tiny: bool) -> dict[str, Any]:
    """Return the configuration of a well-known model, or a small one of its kind."""
    return known_models()[model] | (TINY if tiny else {})


@functools.cache
def _device(kind: str) -> Device:
    """Describe the device; nvidia-smi is asked once."""
    return detect_device() if kind == "cuda" else find_device("cpu")


def request_of(settings: Mapping[str, Any], device: str) -> Request:
    """Ask the planner for the run of a worker; TRL's batch is that of all its micro-batches."""
    training = dict(settings["training"])
    if settings["side"] == "trl":
        training = {"gradient_checkpointing": training["gradient_checkpointing"]} | {
            "per_device_train_batch_size": training["completions"]
        }
    fixed = {
        "num_generations": settings["num_generations"],
        "max_completion_length": settings["completion"],
        "bf16": True,
    }
    return Request(
        "grpo",
        FoundModel.of(dict(settings["config"]), "config", "config"),
        _device(device),
        training | fixed,
        LORA if settings["lora"] else None,
        {"quantization_config": "nf4"} if settings["quantized"] else {},
        settings["prompt"],
    )


def planned(request: Request) -> dict[str, Any]:
    """Predict the bytes of each phase, with the CUDA context and without, and the seconds of a step."""
    plan = estimate(request)
    context = plan.fixed.get("context", 0)
    return {
        "phases": {phase.name: plan.total(phase) - context for phase in plan.phases},
        "context_bytes": context,
        "peak_bytes": plan.peak_bytes,
        "seconds_per_step": plan.seconds,
    }


def flops(request: Request, *, by_sequence: bool) -> tuple[float, float]:
    """Count the FLOPs of a step's forward and backward passes.

    Args:
        request: the run.
        by_sequence: each completion goes through the model with a prompt of its own, as in TRL.

    Returns:
        Those that the step needs, with each prompt once and nothing computed twice but the head's tiles, and those
        that are executed. Model FLOPs utilisation is of the former, so that it compares steps as seconds do.
    """
    run = read_run(request)
    plain = dataclasses.replace(
        run.method, gradient_checkpointing=False, activation_offloading=False, mlp_tiles=1, embedding_offloading=False
    )
    whole = Part.of(run.prompt_tokens, run.completion_tokens, run.group, run.completions // run.group)
    parts = run.parts
    if by_sequence:
        parts = (Part.of(run.prompt_tokens, run.completion_tokens, 1, run.completions),)
    executed = sum(update_flops(run.shape, run.method, part) for part in parts)
    return update_flops(run.shape, plain, whole) * run.accumulation, executed * run.accumulation
