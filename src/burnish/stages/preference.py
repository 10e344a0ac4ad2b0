"""What stages share that compare a policy with its reference on rows of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from burnish.errors import ConfigError, user_code
from burnish.training.reference import Reference, check_reference
from burnish.training.sequence_scores import SequenceScores
from burnish.training.stage import Run, Stage
from burnish.types import Group, PackedBatch

__all__ = ["ComputeMetrics", "PreferenceStage"]

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
"""A `transformers.EvalPrediction` of implicit rewards and labels -> metrics by name."""


class PreferenceStage(Stage):
    """Learn from whole completions by their log-probability under the policy and under its reference.

    Args:
        args: the trainer's config.
        tokenizer: of the model.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).
        compute_metrics: adds metrics to those of an evaluation.
        needs_reference: whether the configured loss uses a reference.

    Raises:
        ConfigError: a reference that the loss does not use.
    """

    whole_groups = True
    asks_reference_anew = False
    """Whether steps ask the reference for more than the rows of the data sets."""

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        ref_model: Any = None,
        compute_metrics: ComputeMetrics | None = None,
        *,
        needs_reference: bool = True,
    ) -> None:
        super().__init__(args, tokenizer)
        check_reference(ref_model)
        if ref_model is not None and not needs_reference:
            raise ConfigError(f"loss_type = {args.loss_type!r} reads no reference: remove ref_model.")
        self.scores = SequenceScores(self, ref_model, self.token_weights)
        self.compute_metrics = compute_metrics
        self._needs_reference = needs_reference
        self._train_dataset: list[Group] = []

    @property
    def reference(self) -> Reference | None:
        """The reference, once the stage has joined a run."""
        return self.scores.reference

    def token_weights(self, batch: PackedBatch) -> torch.Tensor | None:
        """Return the [N] weights of tokens in their sequence's log-probability; None for 1."""
        return None

    def training_set(self, dataset: Any) -> list[Group]:
        """Encode the rows to train on, which the reference scores."""
        self._train_dataset = self.encode(dataset, "train_dataset")
        return self._train_dataset

    def join(self, run: Run) -> None:
        """Take the reference of the policy as it is now."""
        super().join(run)
        self.scores.join(run, self._train_dataset, needs_reference=self._needs_reference)

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return what moves the reference, where it moves."""
        return self.scores.callbacks()

    def begin_training(self) -> None:
        """With `precompute_ref_log_probs`, score the data sets with the reference, or read the cache."""
        if self.args.precompute_ref_log_probs:
            self.scores.precompute(keep_model=self.asks_reference_anew)

    def metrics_of_rewards(self, rewards: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Ask the user's function for metrics of implicit rewards, over the held-out groups of all ranks."""
        if self.compute_metrics is None:
            return {}
        with user_code("compute_metrics"):
            found = self.compute_metrics(EvalPrediction(predictions=rewards.numpy(), label_ids=labels.numpy()))
        return {name: float(value) for name, value in found.items()}

    def save_state(self, folder: Path) -> None:
        """Write what the reference is and has said."""
        self.scores.save_state(folder)

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Restore what the reference was and had said."""
        self.scores.load_state(folder)

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the reference where it is a model of its own."""
        return self.scores.other_models()
