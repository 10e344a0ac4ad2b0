"""The public trainer of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config import SFTFields
from burnish.stages.sft import SFTStage
from burnish.trainers.configs import TrainerConfig, checked
from burnish.training.arguments import refuse_arguments, resolve_args
from burnish.training.checks import resolve_tokenizer
from burnish.training.learner import Learner

__all__ = ["SFTConfig", "SFTTrainer"]


@checked
@dataclass
class SFTConfig(SFTFields, TrainerConfig):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Arguments of `SFTTrainer`: TRL's names where they mean the same; see `burnish.config.SFTFields`."""


class SFTTrainer(Learner[SFTStage]):
    r"""Supervised fine-tuning with the arguments of TRL's trainer; rows are always packed, never padded.

    .. math:: \mathcal L = -\frac1N \sum_{t} w_t \log \pi(y_t \mid y_{<t})

    with N the scored tokens of the whole optimizer step, over all micro-batches and ranks, and w_t = 1 (`nll`) or the
    token's own probability (`dft`). Logs hold `entropy` and `mean_token_accuracy`, means over scored tokens, and
    `num_tokens`, all tokens trained on so far, each prompt counted once.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        args: `SFTConfig`.
        train_dataset: rows with `text`, `messages`, or `prompt` and `completion`, plain or conversational, or with
            `input_ids` (docs/data.md). Without a length (a `datasets.IterableDataset`, a generator) they are encoded
            as they come, in their own order.
        eval_dataset: the same, held out; read whole.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        optimizer_cls_and_kwargs: a class and its arguments instead of the configured optimizer.
        quantization_config: load the model's weights quantised (QLoRA, 2305.14314), as `model_init_kwargs` would;
            "nf4", or a configuration of transformers; needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        formatting_func: turns a row into one plain text, which is then a language modelling row.
        data_collator, compute_loss_func, compute_metrics, preprocess_logits_for_metrics: TRL's; refused.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
    """

    args: SFTConfig
    config_class = SFTConfig
    stage_class = SFTStage

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SFTConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
    ) -> None:
        refuse_arguments(
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args = resolve_args(args, SFTConfig, model, quantization_config)
        super().__init__(
            model,
            SFTStage(args, resolve_tokenizer(model, processing_class, args), formatting_func),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
