"""The public trainer of group relative policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config import GRPOFields
from burnish.environments.setup import Factory
from burnish.rewards import Rubric
from burnish.rollout import Engine
from burnish.stages.agents import Agents
from burnish.stages.online import OnlineStage
from burnish.stages.policy_gradient import PolicyGradient
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner
from burnish.training.reward_funcs import RewardFunction
from burnish.types import Group

__all__ = ["GRPOConfig", "GRPOTrainer"]


@checked
@dataclass
class GRPOConfig(GRPOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `GRPOTrainer`: TRL's names where they mean the same; see `burnish.config.GRPOFields`."""


class GRPOTrainer(Learner[OnlineStage]):
    r"""Group Relative Policy Optimisation (2402.03300) and its relatives, with the arguments of TRL's trainer.

    .. math::
        \mathcal L = -\frac1D \sum_{t} \min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t\big)
        + \beta\, \mathrm{KL}(\pi \| \pi_{ref})

    Each optimizer step takes its share of a rollout: P prompts, G completions each, sampled by the engine with the
    trainer's own weights. A completion whose reward failed is excluded from the loss; a group without reward variance
    costs no forward.
    `algorithm` in the config takes a row of `burnish.algorithms.ALGORITHMS`; every part of it is a field of its own.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        reward_funcs: a `Rubric`, functions `f(prompts, completions, **columns) -> list[float | None]`, or reward models
            by name or in memory.
        args: `GRPOConfig`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        tools: typed functions that the policy may call over several turns.
        rollout_func: `f(prompts, trainer)` that returns the completions of a rollout itself: columns `prompt_ids`,
            `completion_ids`, `logprobs` and optionally `env_mask`, G rows for each prompt.
        environment_factory: makes an episode's environment: a `burnish.environments.Environment`, or an object with
            `reset(**row)`, public methods that are tools, and `get_reward()` where it owns the reward; a dictionary of
            several is chosen from by the column `environment`.
        engine: samples completions; the native in-process engine if None.
        ref_model: the reference of the KL term; if None, the model as it was given (adapters off, or a frozen copy).
        reward_processing_classes: tokenizers of reward models; their own if None.
        compute_metrics: the groups of an evaluation, sampled and scored -> metrics by name.

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient is not finite.
    """

    args: GRPOConfig
    config_class = GRPOConfig
    stage_class = OnlineStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: Rubric | RewardFunction | Sequence[RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        rollout_func: Callable[[list[Any], Any], Mapping[str, Sequence[Any]]] | None = None,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        *,
        engine: Engine | None = None,
        ref_model: PreTrainedModel | None = None,
        compute_metrics: Callable[[Sequence[Group]], Mapping[str, float]] | None = None,
    ) -> None:
        args = resolve_args(args, self.config_class, model, quantization_config)
        stage = OnlineStage(
            args,
            resolve_tokenizer(model, processing_class, args),
            PolicyGradient(args),
            reward_funcs,
            reward_processing_classes=reward_processing_classes,
            engine=engine,
            ref_model=ref_model,
            compute_metrics=compute_metrics,
            agents=Agents(
                model, tools, environment_factory, rollout_func and (lambda prompts: rollout_func(prompts, self))
            ),
        )
        super().__init__(
            model,
            stage,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
