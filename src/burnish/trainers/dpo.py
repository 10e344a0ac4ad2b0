"""The public trainer of direct preference optimisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from burnish.config import DPOFields
from burnish.stages.dpo import DPOStage
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import refuse_arguments, resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner

__all__ = ["DPOConfig", "DPOTrainer"]


@checked
@dataclass
class DPOConfig(DPOFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `DPOTrainer`: TRL's names where they mean the same; see `burnish.config.DPOFields`."""


class DPOTrainer(Learner[DPOStage]):
    r"""Direct Preference Optimisation (2305.18290) and its family, with the arguments of TRL's trainer.

    .. math:: \mathcal L = \sum_k \frac{w_k}{P} \sum_{p=1}^{P} \ell_k(\text{pair } p)

    over the P pairs of the whole optimizer step, all micro-batches and ranks; the losses are the rows of
    `burnish.objectives.preference.PREFERENCE_LOSSES`. A pair is a group of two: its prompt is computed once. The
    reference's log-probabilities are computed once for each pair, whatever the number of epochs.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).
        args: `DPOConfig`.
        train_dataset: rows with `chosen` and `rejected`, with or without `prompt`, plain or conversational.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        compute_metrics: a `transformers.EvalPrediction` of an evaluation -> metrics by name. Its `predictions` are
            [P, 2] implicit rewards, chosen and rejected; its `label_ids` are zeros, the index of the better one.
        data_collator: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
        CheckFailed: the reference is not the initial policy, or a gradient is not finite.
    """

    args: DPOConfig
    config_class = DPOConfig
    stage_class = DPOStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
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
        args = resolve_args(args, DPOConfig, model, quantization_config)
        super().__init__(
            model,
            DPOStage(args, resolve_tokenizer(model, processing_class, args), ref_model, compute_metrics),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
