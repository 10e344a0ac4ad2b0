"""KTO: preference optimisation on single labelled completions."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from burnish.data import EncodeStats, as_row, encode_rows, errors_of, finite_rows, unpair, unpaired_group
from burnish.errors import DataError
from burnish.model.scoring import score
from burnish.objectives.preference import kto_losses
from burnish.stages.preference import ComputeMetrics, PreferenceStage
from burnish.training.step import Loss, Selected, Step, read_groups, with_streams
from burnish.types import Group, PackedBatch

__all__ = ["KTOStage"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KTOStep(Step):
    """A step on labelled completions.

    Attributes:
        kl: estimate of KL(policy || reference) over all ranks.
    """

    kl: float = 0.0


class KTOStage(PreferenceStage):
    """Raise the probability of desirable completions and lower that of others, relative to the KL of the step.

    Args:
        args: `KTOConfig`.
        tokenizer: the model's tokenizer.
        ref_model: the reference; None for the initial policy (adapters off, or a frozen copy).
        compute_metrics: returns further metrics of an evaluation.
    """

    columns = "`prompt`, `completion` and `label`"

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        ref_model: Any = None,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        super().__init__(args, tokenizer, ref_model, compute_metrics)
        # The KL is estimated on mismatched pairs, which differ in every step.
        self.scores_new_rows = args.loss_type == "kto"
        if self.scores_new_rows and args.per_device_train_batch_size * args.gradient_accumulation_steps == 1:
            logger.warning(
                "per_device_train_batch_size = 1, gradient_accumulation_steps = 1: one row in a step has no other "
                "completion to estimate the KL with, so it counts as 0; raise one of them, or use loss_type "
                "apo_zero_unpaired, which needs no estimate."
            )

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode labelled completions; a pair becomes two."""
        found = enumerate(finite_rows(dataset, name))
        with errors_of(name):
            expanded = [(index, row) for index, given in found for row in _unpaired(given, index)]

        def encode(row: Any, processing_class: Any, *, index: int, **options: Any) -> Group:
            # Errors name the row of the data set, while groups are numbered after pairs are split.
            group = unpaired_group(row, processing_class, index=expanded[index][0], **options)
            group.index = index
            return group

        rows, limit = [row for _, row in expanded], self.args.max_length
        return encode_rows(encode, rows, self.tokenizer, stats=stats, name=name, max_length=limit)

    def training_set(self, dataset: Any) -> list[Group]:
        """Encode the training rows; warn if they have only one label."""
        groups = super().training_set(dataset)
        if self.scores_new_rows and len(groups) < 2:
            raise DataError(
                "train_dataset: one row has no other completion to estimate the KL with; use loss_type "
                "apo_zero_unpaired, or more rows."
            )
        labels = {bool(group.row["label"]) for group in groups}
        if len(labels) == 1:
            logger.warning(
                "train_dataset: every label is %s, so nothing pulls the other way; add rows with the other label, or "
                "use SFTTrainer for desirable completions only.",
                labels.pop(),
            )
        return groups

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> KTOStep | None:
        """Return the next rows, with their reference log-probabilities and the estimate of the KL."""
        if (groups := read_groups(batches, num_batches)) is None:
            return None
        run, kl = self.run, 0.0
        run.num_tokens += sum(group.num_tokens for group in groups)
        reference = self.scores.known_of(groups)
        if self.scores_new_rows:
            kl = self._divergence(groups)
            run.metrics.add("kl", float(torch.tensor(kl)))
        desirable = [[float(bool(group.row.get("label")))] for group in groups]
        step_groups = with_streams(groups, reference=reference, desirable=desirable)
        return KTOStep(step_groups, count=run.ranks.sum(float(len(groups))), kl=kl)

    def _divergence(self, groups: Sequence[Group]) -> float:
        """Estimate the KL from mismatched pairs: each prompt with the completion of the row before it."""
        before = [groups[-1], *groups[:-1]]
        mismatched = [
            Group(group.prompt_ids, [other.completions[0]], group.row, group.index)
            for group, other in zip(groups, before, strict=True)
            if len(groups) > 1
        ]
        policy, reference = self.scores.of_policy(mismatched), self.scores.of_reference(mismatched)
        ratios = [own[0] - other[0] for own, other in zip(policy, reference, strict=True)]
        total, count = self.run.ranks.sum(sum(ratios)), self.run.ranks.sum(float(len(ratios)))
        return max(0.0, total / count) if count else 0.0

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the mean loss over completions."""
        assert isinstance(step, KTOStep)
        logprobs_N = score(model, batch).logprobs
        if batch.num_scored_tokens == 0:
            return Loss(logprobs_N.sum())
        sums_S = self.scores.sums(batch, logprobs_N)
        self.scores.check_start(sums_S.detach(), batch)
        ratio_S, desirable_S = sums_S - batch.sequence["reference"], batch.sequence["desirable"] > 0
        value = self._losses(ratio_S, desirable_S, torch.tensor(step.kl).to(ratio_S)).sum() / step.denominator
        return Loss(value, means=self._metrics(sums_S.detach(), ratio_S.detach(), desirable_S))

    def _losses(self, ratio_S: torch.Tensor, desirable_S: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        return kto_losses(
            ratio_S,
            desirable_S,
            kl,
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
        )

    def _metrics(self, sums_S: torch.Tensor, ratio_S: torch.Tensor, desirable_S: torch.Tensor) -> dict[str, Selected]:
        rewards_S = self.args.beta * ratio_S
        return {
            "rewards/chosen": Selected(rewards_S, desirable_S),
            "rewards/rejected": Selected(rewards_S, ~desirable_S),
            "logps/chosen": Selected(sums_S, desirable_S),
            "logps/rejected": Selected(sums_S, ~desirable_S),
        }

    def step_metrics(self) -> dict[str, float]:
        """Add the margin between the rewards of desirable and other completions."""
        return _with_margin(super().step_metrics())

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Compute the loss, at the KL of the evaluation rows, and the metrics."""
        found = self.scores.held_out(groups, self.own(groups))
        kl = self._divergence([group for group, _, _ in found]) if self.scores_new_rows else 0.0
        policy_S = torch.tensor([policy[0] for _, policy, _ in found], dtype=torch.float64)
        reference_S = torch.tensor([reference[0] for _, _, reference in found], dtype=torch.float64)
        desirable_S = torch.tensor([bool(group.row["label"]) for group, _, _ in found])
        losses_S = self._losses(policy_S - reference_S, desirable_S, torch.tensor(kl, dtype=torch.float64))
        values = self._metrics(policy_S, policy_S - reference_S, desirable_S)
        selected = {name: own.values[own.chosen] for name, own in values.items()}
        means = {name: float(own.mean()) for name, own in selected.items() if own.numel()}
        rewards_S = self.args.beta * (policy_S - reference_S)
        own = self.metrics_of_rewards(rewards_S, desirable_S.long())
        return {"loss": float(losses_S.mean()), "kl": kl, **_with_margin(means), **own}

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Name the metrics of `evaluate`; rows with a single label have no margin."""
        if self.compute_metrics is not None:
            return None
        labels = {bool(group.row["label"]) for group in groups}
        sides = [side for side, label in (("chosen", True), ("rejected", False)) if label in labels]
        margins = ["rewards/margins"] if len(sides) == 2 else []
        return ("loss", "kl", *margins, *(f"{of}/{side}" for of in ("rewards", "logps") for side in sides))


def _unpaired(row: Any, index: int) -> list[Any]:
    """Split a pair into two labelled rows; return any other row as it is, for the encoder to check."""
    present = {name for name, value in as_row(row, index).items() if value is not None}
    if not {"prompt", "chosen", "rejected"} <= present:
        return [row]
    if "completion" in present:
        raise DataError(
            f"row {index} has chosen, rejected and completion: drop the columns that you do not mean, so that it is "
            "either a pair or a labelled completion."
        )
    return list(unpair(row))


def _with_margin(means: dict[str, float]) -> dict[str, float]:
    if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return means
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
