"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from burnish.config.tips import toml_line
from burnish.data import EncodeStats, as_row, as_rows, encode_rows, finite_rows, sft_groups
from burnish.data.columns import meant_columns
from burnish.errors import DataError, user_code
from burnish.model.scoring import causal_lm, noisy_embeddings, score
from burnish.objectives.aggregate import aggregate
from burnish.objectives.supervised import SUPERVISED_LOSSES
from burnish.training.stage import Run, Stage
from burnish.training.step import Loss, Step, collate, read_groups, scored_tokens
from burnish.training.stream import GroupStream
from burnish.types import Group, PackedBatch

__all__ = ["SFTStage"]


class SFTStage(Stage):
    """Train on the scored tokens of conversations or plain text; the loss is their mean over the whole step.

    Args:
        args: `SFTConfig`.
        tokenizer: the model's tokenizer.
        formatting_func: turns a row into plain text, which is then trained on in full.
    """

    columns = "`text`, `messages`, or `prompt` and `completion`"

    def __init__(
        self, args: Any, tokenizer: PreTrainedTokenizerBase, formatting_func: Callable[[Any], str] | None = None
    ) -> None:
        super().__init__(args, tokenizer)
        self._format = formatting_func
        self._encoding = {
            name: getattr(args, name)
            for name in ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss")
        }
        self._stream: GroupStream | None = None

    @property
    def uses_dropout(self) -> bool:
        """Always True: `disable_dropout` does not apply to SFT."""
        return True

    def training_set(self, dataset: Any) -> list[Group] | GroupStream:
        """Encode the training rows; those without a length are encoded as they are read."""
        rows = as_rows(dataset, "train_dataset")
        if isinstance(rows, Sized):
            return self.encode(rows, "train_dataset")
        GroupStream.check(self.args)
        self._stream = GroupStream(rows, self._encode_row, self.tokenizer, self._encoding)
        return self._stream

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode conversations, prompts with completions, or texts."""
        rows = finite_rows(dataset, name)
        return encode_rows(self._encode_row, rows, self.tokenizer, stats=stats, name=name, **self._encoding)

    def _encode_row(self, row: Mapping[str, Any], processing_class: Any, **options: Any) -> list[Group]:
        index, column = options["index"], self.args.dataset_text_field
        if self._format is not None:
            with user_code("formatting_func"):
                text = self._format(as_row(row, index))
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DataError(
                    f"row {index}: formatting_func returned {type(text).__name__}: return one string for one row."
                )
            row = {"text": text}
        elif column != "text":
            if column not in as_row(row, index):
                names = meant_columns(row, [("text",)])
                tip = f"set {toml_line('dataset_text_field', next(iter(names)))}" if names else ""
                fix = tip or "name the one with the text"
                raise DataError(f"dataset_text_field = {column!r}: row {index} has the columns {sorted(row)}; {fix}.")
            row = {**row, "text": row[column]}
        return sft_groups(row, processing_class, **options)

    def join(self, run: Run) -> None:
        """Set the loss of a uniform distribution, and the shard of a stream that this rank reads."""
        super().join(run)
        run.learning_monitor.uniform_loss = math.log(causal_lm(run.model).config.get_text_config().vocab_size)
        if self._stream is not None:
            self._stream.rank, self._stream.world = run.ranks.index, run.ranks.count

    def train_dataloader(self, batch_size: int) -> DataLoader[Any] | None:
        """Return a dataloader of this rank's shard of a stream; None for a data set with a length."""
        if self._stream is None:
            return None
        return DataLoader(self._stream, batch_size=batch_size, collate_fn=cast(Any, collate))

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> Step | None:
        """Return the next rows; a stream that ends on one rank ends on all."""
        ranks, groups = self.run.ranks, read_groups(batches, num_batches)
        if self._stream is not None and ranks.max(float(groups is None)):
            return None
        if groups is None:
            return None
        self.run.num_tokens += sum(group.num_tokens for group in groups)
        return Step(groups, count=ranks.sum(float(sum(map(scored_tokens, groups)))))

    def end_training(self) -> None:
        """Report the rows that were skipped in a stream."""
        if self._stream is not None:
            self._stream.report()

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the configured loss, averaged over scored tokens."""
        alpha = self.args.neftune_noise_alpha if model.training else None
        with nullcontext() if alpha is None else noisy_embeddings(model, batch, alpha):
            scores = score(model, batch, with_entropy=True, entropy_gradient=False)
        assert scores.entropy is not None
        value = aggregate(
            SUPERVISED_LOSSES[self.args.loss_type](scores.logprobs),
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
            reduction="token",
            denominator=step.denominator,
        )
        return Loss(
            value,
            means={"entropy": scores.entropy, "mean_token_accuracy": scores.correct.float()},
            # dft weighs improbable tokens with 0, so its own loss would hide a divergence.
            watched=-scores.logprobs.detach().sum() / step.denominator,
        )

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Compute the loss, entropy and accuracy, averaged over all scored tokens."""
        sums, tokens, ranks = {"loss": 0.0, "entropy": 0.0, "mean_token_accuracy": 0.0}, 0, self.run.ranks
        for part in self.held_out_parts(groups):
            scores = score(self.run.model, self.pack(part).to(self.args.device), with_entropy=True)
            assert scores.entropy is not None
            sums["loss"] += float(SUPERVISED_LOSSES[self.args.loss_type](scores.logprobs).sum())
            sums["entropy"] += float(scores.entropy.sum())
            sums["mean_token_accuracy"] += float(scores.correct.sum())
            tokens += scores.logprobs.numel()
        total = max(ranks.sum(tokens), 1.0)
        means = {name: ranks.sum(value) / total for name, value in sums.items()}
        return {**means, "num_tokens": ranks.sum(float(self.run.num_tokens))}

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Name the metrics of `evaluate`."""
        return ("loss", "entropy", "mean_token_accuracy", "num_tokens")
