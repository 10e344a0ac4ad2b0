"""Convert TRL's `reward_funcs` to a rubric, and add the overlong penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from burnish.errors import ConfigError
from burnish.model.reward_model import RewardModel
from burnish.model.sources import find_model
from burnish.rewards import Criterion, Rubric
from burnish.rewards.episodes import EnvironmentReward
from burnish.rewards.verifiers import soft_overlong
from burnish.types import Group

__all__ = ["RewardFunction", "as_rubric", "penalise_overlong"]

RewardFunction: TypeAlias = Callable[..., Any] | str | Path | PreTrainedModel


def as_rubric(
    rewards: Any,
    weights: Sequence[float] | None,
    processing_classes: Any = None,
    *,
    environments: Sequence[str] = (),
) -> Rubric:
    """Convert TRL's `reward_funcs`, functions and reward models, to a rubric.

    Args:
        rewards: a Rubric, or one or several functions, names of reward models, or sequence classifiers.
        weights: weight of each; None for 1.
        processing_classes: tokenizers of the reward models, one or a list; None for their own.
        environments: names of environments with a reward of their own, each a criterion of weight 1 unless the rubric
            has one of the kind.

    Raises:
        ConfigError: there is no reward, weights are given with a Rubric, or lists have different lengths.
        ModelError: a reward model does not exist.
    """
    if isinstance(rewards, Rubric):
        if weights is not None:
            raise ConfigError(f"reward_weights = {list(weights)!r} beside a Rubric: set the weights in its criteria.")
        return _with_environments(rewards.criteria, environments)
    if rewards is None:
        if not environments:
            raise ConfigError(
                "reward_funcs = None: pass a callable, a Rubric, or an environment that gives a reward (get_reward())."
            )
        return _with_environments((), environments)
    listed: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    tokenizers: list[Any] = (
        list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes] * len(listed)
    )
    if len(tokenizers) != len(listed):
        raise ConfigError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(listed)} reward_funcs: give one each."
        )
    for name in listed:
        if isinstance(name, str | Path):
            find_model(name, "reward_funcs")
    models = (str, Path, PreTrainedModel)
    functions = [RewardModel(f, t) if isinstance(f, models) else f for f, t in zip(listed, tokenizers, strict=True)]
    return _with_environments(Rubric.from_functions(functions, weights).criteria, environments)


def _with_environments(criteria: Sequence[Criterion], environments: Sequence[str]) -> Rubric:
    """Return a rubric that counts what environments say."""
    if any(isinstance(criterion.function, EnvironmentReward) for criterion in criteria):
        return Rubric(criteria)
    return Rubric([*criteria, *(Criterion(name, EnvironmentReward(name)) for name in environments)])


def penalise_overlong(groups: Sequence[Group], args: Any) -> list[float]:
    """Add DAPO's soft overlong penalty (2503.14476) to scored completions, as the criterion `overlong`.

    Args:
        groups: scored groups.
        args: `overlong_buffer`, `overlong_penalty` and `max_completion_length`.

    Returns:
        The penalty of each completion that has a score.
    """
    buffer, limit = args.overlong_buffer, args.max_completion_length
    tokens = max(1, round(buffer * limit if buffer < 1 else buffer))
    scored = [(c.score, c.token_ids) for group in groups for c in group.completions if c.score is not None]
    penalty = soft_overlong(max_completion_length=limit, cache=tokens)
    values = [args.overlong_penalty * value for value in penalty(completion_ids=[ids for _, ids in scored])]
    for (own, _), value in zip(scored, values, strict=True):
        own.criteria["overlong"] = value
        own.total = None if own.total is None else own.total + value
    return values
