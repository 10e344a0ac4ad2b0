"""Base of the stages that compare a policy with its reference on the rows of a data set."""

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
"""Function from a `transformers.EvalPrediction` of implicit rewards and labels to metrics by name."""


class PreferenceStage(Stage):
    """Learn from the log-probabilities of whole completions under the policy and its reference.

    Args:
        args: the trainer's config.
        tokenizer: the model's tokenizer.
        ref_model: the reference; None for the initial policy (adapters off, or a frozen copy).
        compute_metrics: returns further metrics of an evaluation.
        needs_reference: whether the configured loss uses a reference.

    Raises:
        ConfigError: `ref_model` with a loss that does not use one.
    """

    whole_groups = True
    token_phases = ("scoring", "update")
    scores_new_rows = False
    """True if steps score rows under the reference that are not in the data sets."""

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
            raise ConfigError(f"loss_type = {args.loss_type!r} does not use a reference: remove ref_model.")
        self.scores = SequenceScores(self, ref_model, self.token_weights)
        self.compute_metrics = compute_metrics
        self._needs_reference = needs_reference
        self._train_dataset: list[Group] = []

    @property
    def reference(self) -> Reference | None:
        """The reference; None before `join`, and for losses without one."""
        return self.scores.reference

    def token_weights(self, batch: PackedBatch) -> torch.Tensor | None:
        """Return [N] weights of tokens in the log-probability of their sequence; None for 1."""
        return None

    def training_set(self, dataset: Any) -> list[Group]:
        """Encode the training rows, which the reference scores."""
        self._train_dataset = self.encode(dataset, "train_dataset")
        return self._train_dataset

    def join(self, run: Run) -> None:
        """Create the reference from the policy as it is now."""
        super().join(run)
        self.scores.join(run, self._train_dataset, needs_reference=self._needs_reference)

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return the callback that syncs the reference, if configured."""
        return self.scores.callbacks()

    def begin_training(self) -> None:
        """Precompute the reference log-probabilities, or read their cache, if configured."""
        if self.args.precompute_ref_log_probs:
            self.scores.precompute(keep_model=self.scores_new_rows)

    def metrics_of_rewards(self, rewards: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Call `compute_metrics` on the implicit rewards of all ranks' evaluation groups."""
        if self.compute_metrics is None:
            return {}
        with user_code("compute_metrics"):
            found = self.compute_metrics(EvalPrediction(predictions=rewards.numpy(), label_ids=labels.numpy()))
        return {name: float(value) for name, value in found.items()}

    def save_state(self, folder: Path) -> None:
        """Save the reference and its log-probabilities."""
        self.scores.save_state(folder)

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Load the reference and its log-probabilities."""
        self.scores.load_state(folder)

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the reference if it is a separate model."""
        return self.scores.other_models()
