"""Filling groups with sampled completions."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.rollout.engine import Engine, Request, SamplingParams
from burnish.rollout.validation import generate
from burnish.types import Group

__all__ = ["collect"]


def collect(
    engine: Engine, groups: Sequence[Group], *, num_generations: int, params: SamplingParams, seed: int, step: int
) -> None:
    """Sample the completions of every group, in place of any it has.

    Args:
        engine: samples.
        groups: prompts; `index` keys each one's random numbers.
        num_generations: G.
        params: how to sample.
        seed: seed of the run.
        step: training step.

    Raises:
        EngineError: the engine broke its contract.
    """
    requests = [Request(group.prompt_ids, num_generations, params, group.index) for group in groups]
    for group, completions in zip(groups, generate(engine, requests, seed=seed, step=step), strict=True):
        group.completions = completions
