"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from burnish.config.tips import toml_line
from burnish.data import as_row, as_rows, encode_rows, finite_rows, sft_groups
from burnish.data.columns import meant_columns
from burnish.errors import DataError, user_code
from burnish.model.scoring import causal_lm, eval_mode, noisy_embeddings, score
from burnish.objectives.aggregate import aggregate
from burnish.objectives.supervised import SUPERVISED_LOSSES
from burnish.trainers.configs import SFTConfig
from burnish.training.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.training.base import GroupTrainer
from burnish.training.batches import collate
from burnish.training.checks import resolve_tokenizer
from burnish.training.held_out import encode_sets
from burnish.training.stream import GroupStream
from burnish.types import Group, PackedBatch

__all__ = ["SFTTrainer"]


class SFTTrainer(GroupTrainer):
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
        args = with_quantization(resolve_args(args, SFTConfig), model, quantization_config)
        if train_dataset is None:
            raise DataError("train_dataset = None: pass rows with `text`, `messages`, or `prompt` and `completion`.")
        self.args = cast("SFTConfig", args)
        self._format = formatting_func
        self.tokenizer = resolve_tokenizer(model, processing_class, args)
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self._training_groups(train_dataset),
            eval_dataset=encode_sets(eval_dataset, self.encode),
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        # transformers would scale the noise by the length of the whole packed row.
        self.neftune_noise_alpha = None

    def _training_groups(self, dataset: Any) -> list[Group] | GroupStream:
        rows = as_rows(dataset, "train_dataset")
        if isinstance(rows, Sized):
            return self.encode(rows, "train_dataset")
        GroupStream.check(self.args)
        return GroupStream(rows, self._encode_row, self.tokenizer, self._encoding())

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        return encode_rows(self._encode_row, finite_rows(dataset, name), self.tokenizer, name=name, **self._encoding())

    def _encoding(self) -> dict[str, Any]:
        names = ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss")
        return {name: getattr(self.args, name) for name in names}

    def _encode_row(self, row: Mapping[str, Any], processing_class: Any, **options: Any) -> list[Group]:
        if self._format is not None:
            row = {"text": _formatted(self._format, as_row(row, options["index"]), options["index"])}
        elif (column := self.args.dataset_text_field) != "text":
            if column not in as_row(row, options["index"]):
                names = meant_columns(row, [("text",)])
                fix = (
                    f"set {toml_line('dataset_text_field', next(iter(names)))}"
                    if names
                    else "name the one with the text"
                )
                raise DataError(
                    f"dataset_text_field = {column!r}: row {options['index']} has the columns {sorted(row)}; {fix}."
                )
            row = {**row, "text": row[column]}
        return sft_groups(row, processing_class, **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Over the groups; each process reads its own share of a stream."""
        stream = self.train_dataset
        if not isinstance(stream, GroupStream):
            return super().get_train_dataloader()
        stream.rank, stream.world = self.accelerator.process_index, self.accelerator.num_processes
        return DataLoader(stream, batch_size=self._train_batch_size, collate_fn=cast(Any, collate))

    def step_groups(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Group] | None:
        """This rank's groups of one optimizer step; a stream that ends on one rank ends on all."""
        groups = super().step_groups(epoch_iterator, num_batches)
        if isinstance(self.train_dataset, GroupStream) and self.max_over_ranks(float(groups is None)):
            return None
        return groups

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards the log says what was skipped of a data set without a length."""
        result = super().train(*args, **kwargs)
        if isinstance(self.train_dataset, GroupStream):
            self.train_dataset.report()
        return result

    def uniform_loss(self) -> float:
        """Ln V."""
        return math.log(causal_lm(self.model).config.get_text_config().vocab_size)

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """This batch's share of the loss."""
        alpha = self.args.neftune_noise_alpha if model.training else None
        with nullcontext() if alpha is None else noisy_embeddings(model, batch, alpha):
            scores = score(model, batch, with_entropy=True)
        assert scores.entropy is not None
        self._metrics.add_tokens("entropy", scores.entropy)
        self._metrics.add_tokens("mean_token_accuracy", scores.correct.float())
        # dft weighs tokens that are lost with 0, so its own loss would hide that they are.
        self.liveness.watch(-scores.logprobs.detach().sum() * self.data_parallel_size / denominator)
        return aggregate(
            SUPERVISED_LOSSES[self.args.loss_type](scores.logprobs),
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
            reduction="token",
            denominator=denominator,
        )

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Names of the metrics below."""
        return ("loss", "entropy", "mean_token_accuracy", "num_tokens")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means of the loss, the entropy and the accuracy over all scored tokens of all ranks."""
        sums, tokens, rows = {"loss": 0.0, "entropy": 0.0, "mean_token_accuracy": 0.0}, 0, 0
        with torch.no_grad(), eval_mode(self.model):
            for groups in dataloader:
                for part in self.split(groups):
                    scores = score(self.model, self.pack_groups(part).to(self.args.device), with_entropy=True)
                    assert scores.entropy is not None
                    sums["loss"] += float(SUPERVISED_LOSSES[self.args.loss_type](scores.logprobs).sum())
                    sums["entropy"] += float(scores.entropy.sum())
                    sums["mean_token_accuracy"] += float(scores.correct.sum())
                    tokens += scores.logprobs.numel()
                    rows += len(part)
        total = max(self.sum_over_ranks(tokens), 1.0)
        metrics = {f"{metric_key_prefix}_{name}": self.sum_over_ranks(value) / total for name, value in sums.items()}
        metrics[f"{metric_key_prefix}_num_tokens"] = self.total_tokens()
        empty: Any = None
        return EvalLoopOutput(
            predictions=empty, label_ids=empty, metrics=metrics, num_samples=int(self.sum_over_ranks(rows))
        )


def _formatted(formatting_func: Callable[[Any], str], row: Mapping[str, Any], index: int) -> str:
    with user_code("formatting_func"):
        text = formatting_func(row)
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"row {index}: formatting_func returned {type(text).__name__}: return one string for one row.")
    return text
