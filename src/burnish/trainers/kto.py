"""The public trainer of KTO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from burnish.config import KTOFields
from burnish.stages.kto import KTOStage
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import refuse_arguments, resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner

__all__ = ["KTOConfig", "KTOTrainer"]


@checked
@dataclass
class KTOConfig(KTOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `KTOTrainer`: TRL's names where they mean the same; see `burnish.config.KTOFields`."""


class KTOTrainer(Learner[KTOStage]):
    r"""Kahneman-Tversky Optimisation (2402.01306): completions labelled desirable or not, with TRL's arguments.

    The KL divergence that `kto_losses` subtracts is estimated from mismatched pairs, each prompt with the completion of
    the row before it, over the whole optimizer step and all ranks, so it depends on no split:

    .. math:: z = \max\Big(0, \frac1S \sum_s \log\frac{\pi(y_{s-1}|x_s)}{\pi_{ref}(y_{s-1}|x_s)}\Big)

    A step or a held-out set of a single row has no mismatched pair, and z = 0.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).
        args: `KTOConfig`.
        train_dataset: rows with `prompt`, `completion` and `label`; preference rows count as two.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        compute_metrics: a `transformers.EvalPrediction` of an evaluation -> metrics by name. Its `predictions` are
            [S] implicit rewards, its `label_ids` 1 where a completion is desirable and 0 elsewhere.
        data_collator: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
        CheckFailed: the reference is not the initial policy, or a gradient is not finite.
    """

    args: KTOConfig
    config_class = KTOConfig
    stage_class = KTOStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        refuse_arguments(data_collator=data_collator)
        args = resolve_args(args, KTOConfig, model, quantization_config)
        super().__init__(
            model,
            KTOStage(args, resolve_tokenizer(model, processing_class, args), ref_model, compute_metrics),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
