"""What TRL calls `reward_funcs`, as a rubric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from burnish.errors import ConfigError
from burnish.model.reward_model import RewardModel
from burnish.rewards import Rubric

__all__ = ["RewardFunction", "as_rubric"]

RewardFunction: TypeAlias = Callable[..., Any] | str | Path | PreTrainedModel


def as_rubric(rewards: Any, weights: Sequence[float] | None, processing_classes: Any = None) -> Rubric:
    """A rubric of what TRL calls `reward_funcs`: functions, and reward models by name or in memory.

    Args:
        rewards: a Rubric, or one or several functions, names of reward models, or sequence classifiers.
        weights: one for each; None for 1.
        processing_classes: tokenizers of the reward models, one or a list; None: their own.

    Raises:
        ConfigError: weights beside a Rubric, or lists of different lengths.
    """
    if isinstance(rewards, Rubric):
        if weights is not None:
            raise ConfigError(f"reward_weights = {list(weights)!r} beside a Rubric: set the weights in its criteria.")
        return rewards
    listed: list[Any] = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    tokenizers: list[Any] = (
        list(processing_classes) if isinstance(processing_classes, list | tuple) else [processing_classes] * len(listed)
    )
    if len(tokenizers) != len(listed):
        raise ConfigError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(listed)} reward_funcs: give one each."
        )
    models = (str, Path, PreTrainedModel)
    functions = [RewardModel(f, t) if isinstance(f, models) else f for f, t in zip(listed, tokenizers, strict=True)]
    return Rubric.from_functions(functions, weights)
