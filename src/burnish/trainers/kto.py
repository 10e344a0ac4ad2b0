"""Learning from single labelled completions: KTO."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from burnish.data import as_row, errors_of, finite_rows, unpair, unpaired_group
from burnish.errors import DataError
from burnish.model.scoring import score
from burnish.objectives.preference import kto_losses
from burnish.trainers.configs import KTOConfig
from burnish.trainers.preference import ReferenceTrainer
from burnish.types import Group, PackedBatch

__all__ = ["KTOTrainer"]

logger = logging.getLogger(__name__)


class KTOTrainer(ReferenceTrainer):
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
    encoder = staticmethod(unpaired_group)
    columns = "`prompt`, `completion` and `label`"

    def set_up(self) -> None:
        """No estimate of the KL before the first step."""
        self._kl = torch.zeros(())
        args = self.args
        if args.loss_type == "kto" and args.per_device_train_batch_size * args.gradient_accumulation_steps == 1:
            logger.warning(
                "per_device_train_batch_size = 1, gradient_accumulation_steps = 1: one row in a step has no other "
                "completion to estimate the KL with, so it counts as 0; raise one of them, or use loss_type "
                "apo_zero_unpaired, which needs no estimate."
            )

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        found = enumerate(finite_rows(dataset, name))
        with errors_of(name):
            expanded = [(place, row) for place, given in found for row in _unpaired(given, place)]

        def encode(row: Any, processing_class: Any, *, index: int, **options: Any) -> Group:
            # Errors name the row as it was given, groups are counted as they are.
            group = unpaired_group(row, processing_class, index=expanded[index][0], **options)
            group.index = index
            return group

        groups = self._encoded(encode, [row for _, row in expanded], name)
        if name == "train_dataset":
            self._check_labels(groups)
        return groups

    def _check_labels(self, groups: Sequence[Group]) -> None:
        """One row has no other to estimate the KL with, one label nothing to hold against."""
        if self.args.loss_type == "kto" and len(groups) < 2:
            raise DataError(
                "train_dataset: one row has no other completion to estimate the KL with; use loss_type "
                "apo_zero_unpaired, or more rows."
            )
        labels = {bool(group.row["label"]) for group in groups}
        if len(labels) == 1:
            logger.warning(
                "train_dataset: every label is %s, so nothing holds the other way; add rows of the other kind, or use "
                "SFTTrainer for good completions alone.",
                labels.pop(),
            )

    @property
    def asks_reference_anew(self) -> bool:
        """For the KL estimate of kto, completions meet other prompts in every step."""
        return self.args.loss_type == "kto"

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """Reference log-probabilities, and the KL estimate of the whole step."""
        super().prepare_groups(groups)
        if self.args.loss_type == "kto":
            self._kl = torch.tensor(self._divergence(groups))
            self._metrics.add("kl", float(self._kl))

    def _divergence(self, groups: Sequence[Group]) -> float:
        """Estimate of z from these groups and those of the other ranks."""
        before = [groups[-1], *groups[:-1]]
        mismatched = [
            Group(group.prompt_ids, [other.completions[0]], group.row, group.index)
            for group, other in zip(groups, before, strict=True)
            if len(groups) > 1
        ]
        ratios = [
            policy[0] - reference[0]
            for policy, reference in zip(
                self.group_sums(mismatched, self.model), self.reference_sums(mismatched), strict=True
            )
        ]
        total, count = self.sum_over_ranks(sum(ratios)), self.sum_over_ranks(float(len(ratios)))
        return max(0.0, total / count) if count else 0.0

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """Completions with their labels and the reference's log-probabilities."""
        labels = {id(c): float(bool(group.row.get("label"))) for group in groups for c in group.completions}
        return self.packed(groups, desirable=lambda completion: labels[id(completion)])

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """These completions' share of the mean loss."""
        logprobs_N = score(model, batch).logprobs
        if batch.num_scored_tokens == 0:
            return logprobs_N.sum()
        sums_S = self.sums(batch, logprobs_N)
        self.check_start(sums_S.detach(), batch)
        ratio_S, desirable_S = sums_S - batch.sequence["reference"], batch.sequence["desirable"] > 0
        for name, values in self._metrics_of(sums_S.detach(), ratio_S.detach(), desirable_S).items():
            self._metrics.add_tokens(name, values)
        return self._losses(ratio_S, desirable_S, self._kl.to(ratio_S)).sum() / denominator

    def _losses(self, ratio_S: torch.Tensor, desirable_S: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        return kto_losses(
            ratio_S,
            desirable_S,
            kl,
            beta=self.args.beta,
            desirable_weight=self.args.desirable_weight,
            undesirable_weight=self.args.undesirable_weight,
        )

    def _metrics_of(
        self, sums_S: torch.Tensor, ratio_S: torch.Tensor, desirable_S: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        rewards_S = self.args.beta * ratio_S
        return {
            "rewards/chosen": rewards_S[desirable_S],
            "rewards/rejected": rewards_S[~desirable_S],
            "logps/chosen": sums_S[desirable_S],
            "logps/rejected": sums_S[~desirable_S],
        }

    def step_metrics(self) -> dict[str, float]:
        """Those of the steps, and how far apart desirable and other completions are rewarded."""
        return _with_margin(super().step_metrics())

    def metric_names(self, groups: Sequence[Group]) -> Collection[str]:
        """Names of the metrics below; rows of one label alone have one side and no margin."""
        labels = {bool(group.row["label"]) for group in groups}
        sides = [side for side, label in (("chosen", True), ("rejected", False)) if label in labels]
        margins = ["rewards/margins"] if len(sides) == 2 else []
        return ("loss", "kl", *margins, *(f"{of}/{side}" for of in ("rewards", "logps") for side in sides))

    def evaluate_records(
        self, groups: Sequence[Group], policy: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        """Loss at the KL of the held-out rows themselves, and metrics."""
        kl = self._divergence(groups) if self.args.loss_type == "kto" else 0.0
        policy_S, reference_S = (
            torch.tensor([row[0] for row in rows], dtype=torch.float64) for rows in (policy, reference)
        )
        desirable_S = torch.tensor([bool(group.row["label"]) for group in groups])
        losses_S = self._losses(policy_S - reference_S, desirable_S, torch.tensor(kl, dtype=torch.float64))
        values = self._metrics_of(policy_S, policy_S - reference_S, desirable_S)
        means = {name: float(found.mean()) for name, found in values.items() if found.numel()}
        own = self.own_metrics(self.args.beta * (policy_S - reference_S), desirable_S.long())
        return {"loss": float(losses_S.mean()), "kl": kl, **_with_margin(means), **own}


def _unpaired(row: Any, index: int) -> list[Any]:
    """The row, or both halves of one that is a pair; odd ones as they are, for the encoder to name."""
    present = {name for name, value in as_row(row, index).items() if value is not None}
    if not {"prompt", "chosen", "rejected"} <= present:
        return [row]
    if "completion" in present:
        raise DataError(
            f"row {index} has chosen, rejected and completion: drop the columns that you do not mean, so that it is a "
            "pair or a labelled completion."
        )
    return list(unpair(row))


def _with_margin(means: dict[str, float]) -> dict[str, float]:
    if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return means
    return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
