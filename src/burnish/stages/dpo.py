"""Preference optimisation on pairs: DPO and its family."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from burnish.data import EncodeStats, encode_rows, finite_rows, preference_group
from burnish.model.scoring import Scores, score
from burnish.objectives.aggregate import sequence_sums
from burnish.objectives.preference import (
    PREFERENCE_LOSSES,
    Pairs,
    PreferenceLoss,
    PreferenceOptions,
    pair_metrics,
    pairs_of,
)
from burnish.stages.preference import ComputeMetrics, PreferenceStage
from burnish.training.step import Loss, Selected, Step, read_groups, with_streams
from burnish.types import Group, PackedBatch

__all__ = ["DPOStage"]


@dataclass(frozen=True, slots=True)
class PairStep(Step):
    """A step on pairs.

    Attributes:
        chosen_tokens: scored tokens of all chosen completions, over all ranks.
        coupled_loss: contribution of each pair to the losses that couple pairs.
    """

    chosen_tokens: float = 1.0
    coupled_loss: float = 0.0


class DPOStage(PreferenceStage):
    """Prefer chosen to rejected completions; a pair is a group of two, so its prompt is computed once.

    Args:
        args: `DPOConfig`.
        tokenizer: the model's tokenizer.
        ref_model: the reference; None for the initial policy (adapters off, or a frozen copy).
        compute_metrics: returns further metrics of an evaluation.
    """

    columns = "`chosen` and `rejected`"

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        ref_model: Any = None,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        names = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
        weights = args.loss_weights if args.loss_weights is not None else [1.0] * len(names)
        self.losses: list[tuple[PreferenceLoss, float]] = [
            (PREFERENCE_LOSSES[name], weight) for name, weight in zip(names, weights, strict=True)
        ]
        self.options = PreferenceOptions(
            **{field.name: getattr(args, field.name) for field in dataclasses.fields(PreferenceOptions)}
        )
        needs_reference = any(loss.needs_reference for loss, _ in self.losses)
        super().__init__(args, tokenizer, ref_model, compute_metrics, needs_reference=needs_reference)

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode pairs, the chosen completion first."""
        rows, limit = finite_rows(dataset, name), self.args.max_length
        return encode_rows(preference_group, rows, self.tokenizer, stats=stats, name=name, max_length=limit)

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> PairStep | None:
        """Return the next pairs, with their reference log-probabilities and the coefficients of coupled losses."""
        if (groups := read_groups(batches, num_batches)) is None:
            return None
        run = self.run
        run.num_tokens += sum(group.num_tokens for group in groups)
        streams, coupled_loss = {"reference": self.scores.known_of(groups)}, 0.0
        chosen_tokens = run.ranks.sum(float(sum(group.completions[0].num_scored_tokens for group in groups)))
        if any(loss.coupled for loss, _ in self.losses):
            streams["coefficient"], coupled_loss = self._couple(groups, streams["reference"])
        count = run.ranks.sum(float(len(groups)))
        return PairStep(with_streams(groups, **streams), count, chosen_tokens=chosen_tokens, coupled_loss=coupled_loss)

    def _couple(self, groups: Sequence[Group], reference: list[list[float]]) -> tuple[list[list[float]], float]:
        """Differentiate losses that sort pairs with respect to the log-probabilities, over the pairs of all ranks.

        Returns:
            The gradient for each completion's log-probability, and the contribution of each pair to the loss.
        """
        ranks = self.run.ranks
        tokens = [[c.num_scored_tokens for c in group.completions] for group in groups]
        first = sum(ranks.gathered([len(groups)])[: ranks.index])
        everywhere = ranks.gathered(list(zip(self.scores.of_policy(groups), reference, tokens, strict=True)))
        policy_S, reference_S, tokens_S = (
            torch.tensor([row[part] for row in everywhere], dtype=torch.float64).flatten() for part in range(3)
        )
        pairs = pairs_of(policy_S.requires_grad_(), reference_S, tokens_S)
        total = torch.stack([w * loss.compute(pairs, self.options).mean() for loss, w in self.losses if loss.coupled])
        (gradient_S,) = torch.autograd.grad(total.sum(), policy_S)
        own = gradient_S.view(-1, 2)[first : first + len(groups)].tolist()
        return own, float(total.detach().sum()) / len(everywhere)

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the weighted sum of the configured losses, each a mean over the pairs (or chosen tokens)."""
        assert isinstance(step, PairStep)
        scores = score(model, batch, with_collision=self.args.use_weighting)
        if batch.num_scored_tokens == 0:
            return Loss(scores.logprobs.sum())
        sums_S = self.scores.sums(batch, scores.logprobs)
        self.scores.check_start(sums_S.detach(), batch)
        tokens_S = _tokens(batch).to(sums_S.dtype)
        pairs = pairs_of(sums_S, batch.sequence["reference"], tokens_S)
        weights_P = _wpo_weights(batch, scores, tokens_S) if self.args.use_weighting else 1.0
        total = sums_S.new_zeros(())
        for loss, weight in self.losses:
            if not loss.coupled:
                losses_P = loss.compute(pairs, self.options) * weights_P
                total = total + weight * losses_P.sum() / (step.chosen_tokens if loss.per_token else step.denominator)
        if "coefficient" in batch.sequence:
            surrogate = (batch.sequence["coefficient"] * sums_S).sum()
            # The gradient is that of the surrogate, the value that of the coupled losses.
            total = total + surrogate - surrogate.detach() + step.coupled_loss * pairs.chosen.numel()
        accuracy = Selected(scores.correct.float(), batch.sequence_index % 2 == 0)
        return Loss(total, means={"mean_token_accuracy": accuracy, **self._pair_metrics(pairs)})

    def token_weights(self, batch: PackedBatch) -> torch.Tensor | None:
        """LD-DPO (2409.06411): weigh tokens beyond the length of the pair's shorter completion by `ld_alpha`."""
        if self.args.ld_alpha is None:
            return None
        tokens_S = _tokens(batch)
        shorter_S = tokens_S.view(-1, 2).min(1).values.repeat_interleave(2)
        first_S = tokens_S.cumsum(0) - tokens_S
        position_N = torch.arange(batch.num_scored_tokens, device=tokens_S.device) - first_S[batch.sequence_index]
        return torch.where(position_N < shorter_S[batch.sequence_index], 1.0, float(self.args.ld_alpha))

    def _pair_metrics(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        normalised = all(loss.length_normalised for loss, _ in self.losses)
        return pair_metrics(pairs, self.options.beta, normalised=normalised)

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Compute the loss (without WPO's weights) and the metrics over all evaluation pairs at once."""
        found = self.scores.held_out(groups, self.own(groups))
        tokens = [[c.num_scored_tokens for c in group.completions] for group, _, _ in found]
        columns = ([policy for _, policy, _ in found], [reference for _, _, reference in found], tokens)
        pairs = pairs_of(*(torch.tensor(rows, dtype=torch.float64).flatten() for rows in columns))
        loss = sum(
            weight
            * loss.compute(pairs, self.options).sum()
            / (pairs.chosen_tokens.sum() if loss.per_token else len(found))
            for loss, weight in self.losses
        )
        metrics = self._pair_metrics(pairs)
        rewards_P2 = torch.stack([metrics["rewards/chosen"], metrics["rewards/rejected"]], dim=1)
        own = self.metrics_of_rewards(rewards_P2, torch.zeros(len(found), dtype=torch.long))
        return {"loss": float(loss), **{name: float(values.mean()) for name, values in metrics.items()}, **own}

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Name the metrics of `evaluate`; None if `compute_metrics` adds some."""
        if self.compute_metrics is not None:
            return None
        of_pairs = ("chosen", "rejected", "margins", "accuracies")
        return ("loss", *(f"rewards/{name}" for name in of_pairs), *(f"logps/{name}" for name in of_pairs[:2]))


def _tokens(batch: PackedBatch) -> torch.Tensor:
    """Count the [S] scored tokens of each completion; bincount would make the host wait for its length."""
    return sequence_sums(torch.ones_like(batch.sequence_index), batch.sequence_index, batch.num_sequences)


def _wpo_weights(batch: PackedBatch, scores: Scores, tokens_S: torch.Tensor) -> torch.Tensor:
    """WPO (2406.11827): [P] product over both completions of exp(mean_t [log p_t - log sum_v p_v^2])."""
    assert scores.log_collision is not None
    aligned_N = scores.logprobs.detach() - scores.log_collision
    means_S = sequence_sums(aligned_N, batch.sequence_index, batch.num_sequences) / tokens_S.clamp(min=1)
    return means_S.exp().view(-1, 2).prod(1)
