"""Log-probabilities of whole completions under the policy and its reference."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from burnish.errors import CheckFailed, ConfigError
from burnish.model.packing import pack
from burnish.model.positions import check_lengths
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.model.traced import is_traced
from burnish.objectives.aggregate import sequence_sums
from burnish.training.checks import check_vocabulary
from burnish.training.reference import MovingReference, Reference
from burnish.training.reference_sums import ReferenceSums
from burnish.training.stage import Run, Stage
from burnish.types import Group, PackedBatch

__all__ = ["SequenceScores"]

logger = logging.getLogger(__name__)

_OTHER_ROWS = "other rows"
"""Name of evaluation rows that are not a set of the trainer."""


class SequenceScores:
    """Score completions of a stage; the reference scores each completion of the trainer's data sets once.

    Args:
        stage: the stage, which splits groups by the token budget.
        ref_model: the reference; None for the initial policy.
        token_weights: returns the [N] weights of tokens in the log-probability of their sequence, or None for 1.
    """

    def __init__(
        self,
        stage: Stage,
        ref_model: Any,
        token_weights: Callable[[PackedBatch], torch.Tensor | None] = lambda batch: None,
    ) -> None:
        self._stage, self._args = stage, stage.args
        self._ref_model = ref_model
        self._token_weights = token_weights
        self.reference: Reference | None = None
        self.known: dict[str, ReferenceSums] = {}
        """Reference log-probabilities of each data set, by name."""

    def join(self, run: Run, train_dataset: Sequence[Group], *, needs_reference: bool) -> None:
        """Create the reference from the policy as it is now.

        Raises:
            ConfigError: `sync_ref_model` with a reference that cannot be synced.
            ModelError: the reference lacks the data's tokens or lengths.
        """
        self._run, self._train_dataset = run, train_dataset
        self.known = {name: ReferenceSums() for name in ("train", *run.eval_sets)}
        if needs_reference:
            self.reference = Reference.of(run.model, self._ref_model)
        if self._ref_model is not None:
            name = "ref_model on train_dataset"
            check_vocabulary(self._ref_model, train_dataset, name)
            check_lengths(causal_lm(self._ref_model), train_dataset, name, "set max_length")
        if self._args.sync_ref_model and (self.reference is None or self.reference.model is None):
            raise ConfigError("sync_ref_model = True: adapters that are switched off cannot be synced; pass ref_model.")

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that syncs the reference, if configured."""
        args = self._args
        if not args.sync_ref_model:
            return []
        assert self.reference is not None
        assert self.reference.model is not None
        return [
            MovingReference(
                self.reference.model,
                args.ref_model_mixup_alpha,
                args.ref_model_sync_steps,
                moved=lambda: [known.clear() for known in self.known.values()],
            )
        ]

    def sums(self, batch: PackedBatch, values_N: torch.Tensor) -> torch.Tensor:
        """Compute the [S] weighted sums of per-token log-probabilities."""
        weights_N = self._token_weights(batch)
        weighted_N = values_N if weights_N is None else values_N * weights_N
        return sequence_sums(weighted_N, batch.sequence_index, batch.num_sequences)

    @torch.no_grad()
    def of_model(self, groups: Sequence[Group], model: torch.nn.Module) -> list[list[float]]:
        """Compute the log-probabilities of each group's completions under a model, without gradients."""
        found: dict[int, list[float]] = {}
        self._run.phases.add_tokens("scoring", sum(group.num_tokens for group in groups))
        with self._run.phases.phase("scoring"), eval_mode(model):
            for part in self._stage.parts(groups):
                batch = pack(part).to(self._args.device)
                sums_S = self.sums(batch, score(model, batch).logprobs)
                # Fake tensors have no values; what a trace counts does not depend on them.
                values = iter([0.0] * len(sums_S) if is_traced(model) else sums_S.tolist())
                found |= {group.index: [next(values) for _ in group.completions] for group in part}
        return [found[group.index] for group in groups]

    def of_policy(self, groups: Sequence[Group]) -> list[list[float]]:
        """Compute the log-probabilities under the current policy."""
        return self.of_model(groups, self._run.model)

    def of_reference(self, groups: Sequence[Group]) -> list[list[float]]:
        """Compute the log-probabilities under the reference; 0 for losses without one."""
        if self.reference is None:
            return [[0.0] * len(group.completions) for group in groups]
        if self.reference.released:
            raise ConfigError(
                "precompute_ref_log_probs = True: the reference's weights have been freed, and these rows were not "
                "scored; pass them to the trainer as eval_dataset."
            )
        with self.reference.active(self._run.model) as reference:
            return self.of_model(groups, reference)

    def known_of(self, groups: Sequence[Group], split: str = "train") -> list[list[float]]:
        """Return the reference log-probabilities of groups of a data set; each is computed once."""
        known = self.known[split]
        missing = [group for group in groups if group.index not in known]
        if missing:
            known.add(missing, self.of_reference(missing))
        return [known[group.index] for group in groups]

    def held_out(self, groups: Sequence[Group], own: Sequence[Group]) -> list[tuple[Group, list[float], list[float]]]:
        """Score evaluation groups under policy and reference.

        Args:
            groups: groups of all ranks; the trainer's evaluation sets are recognised by identity and cached.
            own: this rank's shard.

        Returns:
            Each group of all ranks, with its completions' log-probabilities under policy and reference.
        """
        split = next((name for name, rows in self._run.eval_sets.items() if rows is groups), _OTHER_ROWS)
        if split == _OTHER_ROWS:
            self.known[_OTHER_ROWS] = ReferenceSums()
        reference = self.known_of(own, split)
        return self._run.ranks.gathered(list(zip(own, self.of_policy(own), reference, strict=True)))

    def precompute(self, *, keep_model: bool) -> None:
        """Score all data sets with the reference, or read the cache; then free its weights if possible.

        Args:
            keep_model: whether steps score rows that are not in the data sets.
        """
        if self.reference is None or self.reference.released:  # an earlier train() has precomputed all
            return
        ranks = self._run.ranks
        for split, groups in {"train": self._train_dataset, **self._run.eval_sets}.items():
            name = re.sub(r"[^\w.-]", "_", split)
            self.known[split].load_or_compute(
                Path(self._args.output_dir) / f"reference_log_probs_{name}.json",
                groups,
                groups[ranks.index :: ranks.count],
                fingerprint=self.reference.fingerprint(self._run.model),
                options={"ld_alpha": getattr(self._args, "ld_alpha", None)},
                compute=self.of_reference,
                ranks=ranks,
            )
        if self.reference.model is not None and not keep_model:
            logger.info("reference log-probabilities are precomputed: its weights are freed")
            self.reference = dataclasses.replace(self.reference, model=None, released=True)

    def check_start(self, sums_S: torch.Tensor, batch: PackedBatch) -> None:
        """Refuse a reference that differs from the policy before the first update.

        Raises:
            CheckFailed: they differ by more than rounding.
        """
        is_initial = self.reference is not None and self.reference.is_initial_policy
        if not self._run.is_untouched or not is_initial or is_traced(self._run.model):
            return
        difference = float((sums_S - batch.sequence["reference"]).abs().sum()) / max(batch.num_scored_tokens, 1)
        bound = 1e-3 if self._run.model.dtype in (torch.float32, torch.float64) else 0.1
        if not difference <= bound:
            raise CheckFailed(
                f"before the first update the reference differs from the policy by {difference:.3g} nats per token "
                f"(bound {bound:g}): dropout is on, the cache is of another model, or the policy was changed."
            )

    def save_state(self, folder: Path) -> None:
        """Save a synced reference, and this rank's cached log-probabilities."""
        if self._args.sync_ref_model and self._run.ranks.is_first:
            assert self.reference is not None
            self.reference.save(folder)
        if not self._args.precompute_ref_log_probs:  # those have their own file
            self.known["train"].save(folder / f"reference_sums_{self._run.ranks.index}.json")

    def load_state(self, folder: Path) -> None:
        """Load what `save_state` saved."""
        if self._args.sync_ref_model:
            assert self.reference is not None
            self.reference.load(folder)
            for known in self.known.values():
                known.clear()
        if not self._args.precompute_ref_log_probs:
            self.known["train"].load(folder / f"reference_sums_{self._run.ranks.index}.json")

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the reference if it is a separate model."""
        return {} if self.reference is None else self.reference.given_models()
