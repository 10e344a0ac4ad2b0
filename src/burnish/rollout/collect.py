"""Sample completions through an engine and validate what it returns."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.rollout.engine import Engine, Request, SamplingParams
from burnish.rollout.validation import check_completions
from burnish.types import Completion, Group

__all__ = ["collect", "generate"]


def generate(
    engine: Engine, requests: Sequence[Request], *, seed: int, step: int, vocab_size: int | None = None
) -> list[list[Completion]]:
    """Sample completions and validate them.

    Args:
        engine: samples.
        requests: prompts with their sampling parameters.
        seed: seed of the run.
        step: training step, or round of sampling.
        vocab_size: vocabulary size of the trained model; None where no model reads the tokens.

    Raises:
        EngineError: the engine broke its contract.
    """
    found = engine.generate(requests, seed=seed, step=step)
    check_completions(requests, found, engine=type(engine).__name__, vocab_size=vocab_size)
    return found


def collect(
    engine: Engine, groups: Sequence[Group], *, num_generations: int, params: SamplingParams, seed: int, step: int
) -> None:
    """Sample the completions of every group, replacing any it has.

    Args:
        engine: samples.
        groups: prompts; `index` keys each one's random numbers.
        num_generations: G.
        params: sampling parameters.
        seed: seed of the run.
        step: training step.

    Raises:
        EngineError: the engine broke its contract.
    """
    requests = [Request(g.prompt_ids, num_generations, params, g.index, row=g.row) for g in groups]
    for group, completions in zip(groups, generate(engine, requests, seed=seed, step=step), strict=True):
        group.completions = completions
