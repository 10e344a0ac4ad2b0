"""The public trainer of reward models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config import RewardFields
from burnish.model.classifier import classifier_adapters
from burnish.stages.reward_modelling import RewardStage
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import refuse_arguments, resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner

__all__ = ["RewardConfig", "RewardTrainer"]


@checked
@dataclass
class RewardConfig(RewardFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `RewardTrainer`: TRL's names where they mean the same; see `burnish.config.RewardFields`."""


class RewardTrainer(Learner[RewardStage]):
    r"""Reward modelling with the arguments of TRL's trainer; each prompt is computed once, whatever hangs on it.

    .. math::
        \text{pairs: } & -\log\sigma(r_w - r_l - m) + c\,(r_w + r_l)^2 \\
        \text{ranked lists: } & -\sum_i \Big[ r_i - \log\sum_{j \ge i} e^{r_j} \Big] + c\,\Big(\sum_i r_i\Big)^2 \\
        \text{steps: } & -y \log\sigma(r) - (1 - y) \log\sigma(-r)

    each as the mean over the pairs, lists or steps of the whole optimizer step. The model is a sequence classifier with
    one label. Its score is read where transformers reads it, at the last token that is not the padding token, and for
    steps at the last token of each, so `AutoModelForSequenceClassification` gives a saved model's scores.

    `eval_calibration_error` (10 bins) and `eval_brier_score` assess sigma(r_i - r_j) as the probability that the better
    of two completions wins, each pair taken in both orders; of steps sigma(r).

    Args:
        model: path, hub name, package that carries a model, or a model in memory; a causal language model gets a new
            score layer, drawn from `seed`.
        args: `RewardConfig`.
        train_dataset: rows with `chosen` and `rejected` (and `prompt`, `margin`), with `prompt` and `completions` (the
            best first), or with `prompt`, `completions` (steps) and `labels`; one kind in a data set.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        optimizer_cls_and_kwargs: a class and its arguments instead of the configured optimizer.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters, and the score layer, instead of the weights; task_type SEQ_CLS.
        data_collator, compute_metrics, preprocess_logits_for_metrics: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
    """

    args: RewardConfig
    config_class = RewardConfig
    stage_class = RewardStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: RewardConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refuse_arguments(
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args = resolve_args(args, RewardConfig, model, quantization_config)
        super().__init__(
            model,
            RewardStage(args, resolve_tokenizer(model, processing_class, args)),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=None if peft_config is None else classifier_adapters(peft_config),
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
