"""Describe in one line how long a run will be, since a bare command takes the default of every field."""

from __future__ import annotations

import math
from typing import Any

from burnish.config.online_fields import micro_batches_per_rollout

__all__ = ["describe_run_length"]

_SEQUENCES_PER_ROW = {"dpo": 2, "reward": 2}


def describe_run_length(args: Any, *, first_step: int, max_steps: int) -> str:
    """Describe the steps of a run, the rows or completions of each, and the largest number of tokens in all.

    Args:
        args: the trainer's config.
        first_step: steps already taken by the run that is resumed.
        max_steps: step at which the run ends.
    """
    steps = max(max_steps - first_step, 0)
    taken = f"{steps} steps" if first_step == 0 else f"{steps} steps, {first_step + 1} to {max_steps}"
    micro, accumulation = args.per_device_train_batch_size * args.world_size, args.gradient_accumulation_steps
    if not hasattr(args, "max_completion_length"):
        rows = micro * accumulation
        if args.max_length is None:
            return f"{args.kind}: {taken} of {rows} rows, of any length"
        tokens = steps * rows * _SEQUENCES_PER_ROW.get(args.kind, 1) * args.max_length
        return f"{args.kind}: {taken} of {rows} rows; at most {args.max_length} tokens a sequence, {tokens:,} in all"
    rollout = micro_batches_per_rollout(args.steps_per_generation, accumulation)
    steps_per_rollout = rollout // accumulation * getattr(args, "num_iterations", 1)
    rollouts, limit = math.ceil(steps / steps_per_rollout), args.max_completion_length
    completions = micro * rollout * (args.max_sampling_rounds if args.dynamic_sampling else 1)
    counted = f"up to {completions}" if args.dynamic_sampling else str(completions)
    return (
        f"{args.kind}: {taken}; {rollouts} rollouts of {counted} completions, {args.num_generations} to a prompt; "
        f"at most {limit} tokens each, {rollouts * completions * limit:,} in all"
    )
