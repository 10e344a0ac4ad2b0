"""Supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from burnish.data import as_rows, encode_rows, sft_group
from burnish.errors import DataError
from burnish.model.scoring import eval_mode, score
from burnish.objectives.aggregate import aggregate
from burnish.objectives.supervised import nll
from burnish.trainers.base import GroupTrainer, resolve_tokenizer
from burnish.trainers.configs import SFTConfig
from burnish.types import Group, PackedBatch

__all__ = ["SFTTrainer"]


class SFTTrainer(GroupTrainer):
    r"""Supervised fine-tuning with the arguments of TRL's trainer; rows are always packed, never padded.

    .. math:: \mathcal L = -\frac1N \sum_{t} \log \pi(y_t \mid y_{<t})

    with N the scored tokens of the whole optimizer step, over all micro-batches and ranks.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        args: `SFTConfig`.
        train_dataset: rows with `text`, `messages`, or `prompt` and `completion`, plain or conversational.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        peft_config: train these adapters instead of the weights.

    Raises:
        ConfigError, DataError, ModelError: before training starts.
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = args if args is not None else SFTConfig()
        if train_dataset is None:
            raise DataError("train_dataset = None: pass rows with `text`, `messages`, or `prompt` and `completion`.")
        self.args = args
        self.tokenizer = resolve_tokenizer(model, processing_class)
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self._encode(train_dataset),
            eval_dataset=None if eval_dataset is None else self._encode(eval_dataset),
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _encode(self, dataset: Any) -> list[Group]:
        args = self.args
        if args.eos_token is not None:
            self.tokenizer.eos_token = args.eos_token
        rows = as_rows(dataset)
        if args.dataset_text_field != "text":
            rows = [{**row, "text": row[args.dataset_text_field]} for row in rows]
        return encode_rows(
            sft_group,
            rows,
            self.tokenizer,
            max_length=args.max_length,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            chat_template=args.chat_template,
        )

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """This batch's share of the mean negative log-likelihood."""
        losses_N = nll(score(model, batch).logprobs)
        return aggregate(
            losses_N,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
            reduction="token",
            denominator=denominator,
        )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean negative log-likelihood and entropy over all scored tokens of all ranks."""
        loss, entropy, tokens, rows = 0.0, 0.0, 0, 0
        with torch.no_grad(), eval_mode(self.model):
            for groups in dataloader:
                for part in self.split(groups):
                    scores = score(self.model, self.pack_groups(part).to(self.args.device), with_entropy=True)
                    assert scores.entropy is not None
                    loss += float(nll(scores.logprobs).sum())
                    entropy += float(scores.entropy.sum())
                    tokens += scores.logprobs.numel()
                    rows += len(part)
        total = max(self.sum_over_ranks(tokens), 1.0)
        metrics = {
            f"{metric_key_prefix}_loss": self.sum_over_ranks(loss) / total,
            f"{metric_key_prefix}_entropy": self.sum_over_ranks(entropy) / total,
            f"{metric_key_prefix}_num_tokens": total,
        }
        empty: Any = None
        return EvalLoopOutput(
            predictions=empty, label_ids=empty, metrics=metrics, num_samples=int(self.sum_over_ranks(rows))
        )
