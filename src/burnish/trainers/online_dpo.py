"""The public trainer of online DPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config import OnlineDPOFields
from burnish.environments.setup import Factory
from burnish.rewards import Rubric
from burnish.rollout import Engine
from burnish.stages.agents import Agents
from burnish.stages.online import OnlineStage
from burnish.stages.online_dpo import OnlinePairs
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner
from burnish.training.reward_funcs import RewardFunction
from burnish.types import Group

__all__ = ["OnlineDPOConfig", "OnlineDPOTrainer"]


@checked
@dataclass
class OnlineDPOConfig(OnlineDPOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `OnlineDPOTrainer`: TRL's names where they mean the same; see `burnish.config.OnlineDPOFields`."""


class OnlineDPOTrainer(Learner[OnlineStage]):
    r"""Online DPO (2402.04792): sample, score, prefer the best of a prompt's completions to the worst.

    .. math:: \mathcal L = \frac1P \sum_p \ell(y_w^{(p)}, y_l^{(p)})

    with a loss of `burnish.objectives.preference.PREFERENCE_LOSSES`, over the P pairs of the whole optimizer step. A
    prompt whose rewards are all equal makes no pair and costs no update.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        reward_funcs: a `Rubric`, or functions `f(prompts, completions, **columns) -> list[float | None]`.
        args: `OnlineDPOConfig`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        reward_processing_classes: tokenizers of reward models; their own if None.
        tools, rollout_func, environment_factory: episodes of several turns, as in `GRPOTrainer`.
        engine: samples completions; the native in-process engine if None.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).
        compute_metrics: the groups of an evaluation, sampled and scored -> metrics by name.

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient is not finite.
    """

    args: OnlineDPOConfig
    config_class = OnlineDPOConfig
    stage_class = OnlineStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: Rubric | RewardFunction | Sequence[RewardFunction] | None = None,
        args: OnlineDPOConfig | None = None,
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
        args = resolve_args(args, OnlineDPOConfig, model, quantization_config)
        stage = OnlineStage(
            args,
            resolve_tokenizer(model, processing_class, args),
            OnlinePairs(args),
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
