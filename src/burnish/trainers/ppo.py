"""The public trainer of proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config import PPOFields
from burnish.environments.setup import Factory
from burnish.errors import ConfigError
from burnish.model.sources import find_model
from burnish.rewards import Rubric
from burnish.rollout import Engine
from burnish.stages.actor_critic import ActorCritic
from burnish.stages.agents import Agents
from burnish.stages.online import OnlineStage
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner
from burnish.types import Group

__all__ = ["PPOConfig", "PPOTrainer"]


@checked
@dataclass
class PPOConfig(PPOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `PPOTrainer`: TRL's names where they mean the same; see `burnish.config.PPOFields`."""


class PPOTrainer(Learner[OnlineStage]):
    r"""Proximal Policy Optimisation (1707.06347) with a critic, in the order of arguments that TRL's trainer had.

    .. math::
        \mathcal L = -\frac1N \sum_t \min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon) A_t\big), \qquad
        A_t = \sum_{k \ge 0} (\gamma\lambda)^k (\rho_{t+k} + \gamma V_{t+k+1} - V_{t+k})

    with rho a token's reward: minus beta times its KL divergence from the reference, and at the last token the reward
    of the completion. The critic and the policy are updated in turn, so their activations never add up.

    Without `value_model` the critic is, for a policy with adapters, a score and adapters of its own on the policy's
    frozen base (about one base in memory); else a copy of the policy with a new score.

    Args:
        args: `PPOConfig`.
        processing_class: the tokenizer; the model's own if None.
        model: the policy: path, hub name, package that carries a model, or a model in memory.
        ref_model: the reference of the KL term; if None, the model as it was given (adapters off, or a frozen copy).
        reward_model: what rewards completions: a model by name or in memory. Give it or `reward_funcs`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        value_model: the critic: a model by name or in memory, which is copied; see above for None.
        data_collator: TRL's; refused, since batches are packed.
        eval_dataset: prompts, held out.
        optimizers: an optimizer and a scheduler of the policy instead of the configured ones.
        callbacks: transformers callbacks.
        peft_config: train these adapters of the policy instead of its weights.
        reward_funcs: a `Rubric`, or functions `f(prompts, completions, **columns) -> list[float | None]`.
        value_peft_config: train these adapters of the critic; None: of the policy's kind where it has any.
        engine: samples completions; the native in-process engine if None.
        compute_metrics: the groups of an evaluation, sampled and scored -> metrics by name.
        tools: typed functions that the policy may call over several turns.
        environment_factory: makes an episode's environment, as in `GRPOTrainer`.

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient or a value is not finite.
    """

    args: PPOConfig
    config_class = PPOConfig
    stage_class = OnlineStage

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | Path | PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        reward_model: str | Path | PreTrainedModel | None = None,
        train_dataset: Any = None,
        value_model: str | Path | PreTrainedModel | None = None,
        data_collator: None = None,
        eval_dataset: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        reward_funcs: Rubric | Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        value_peft_config: Any = None,
        engine: Engine | None = None,
        compute_metrics: Callable[[Sequence[Group]], Mapping[str, float]] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
    ) -> None:
        if model is None:
            raise ConfigError("model = None: pass the policy as model=.")
        if (reward_model is None) == (reward_funcs is None):
            given = "neither" if reward_model is None else "both"
            raise ConfigError(f"reward_model, reward_funcs: {given} given; pass the one that rewards completions.")
        if data_collator is not None:
            raise ConfigError("data_collator: batches are packed here; remove it.")
        if isinstance(value_model, str | Path):
            find_model(value_model, "value_model")
        args = resolve_args(args, PPOConfig, model)
        stage = OnlineStage(
            args,
            resolve_tokenizer(model, processing_class, args),
            ActorCritic(args, value_model, value_peft_config),
            reward_funcs if reward_model is None else reward_model,
            engine=engine,
            ref_model=ref_model,
            compute_metrics=compute_metrics,
            agents=Agents(model, tools, environment_factory),
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
