"""Online DPO: preference pairs of the policy's samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch

from burnish.model.scoring import Scores
from burnish.objectives.aggregate import sequence_sums
from burnish.objectives.preference import PREFERENCE_LOSSES, PreferenceOptions, pair_metrics, pairs_of
from burnish.stages.algorithm import Algorithm
from burnish.training.step import Loss, Step
from burnish.types import Group, PackedBatch

__all__ = ["OnlinePairs"]


class OnlinePairs(Algorithm):
    """Prefer the best completion of a prompt to the worst, with a loss of the DPO family.

    Args:
        args: `OnlineDPOConfig`.
    """

    whole_groups = True

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.preference_loss = PREFERENCE_LOSSES[args.loss_type]
        self.options = PreferenceOptions(beta=args.beta, label_smoothing=args.label_smoothing)

    def step(self, groups: Sequence[Group], *, is_on_policy: bool = False) -> Step:
        """Pair the best and the worst completion of every prompt whose rewards differ."""
        pairs: list[Group] = []
        for group in groups:
            scored = [(reward, c) for c in group.completions if self.in_loss(c) and (reward := c.reward) is not None]
            if scored:
                best, worst = max(scored, key=itemgetter(0)), min(scored, key=itemgetter(0))
                if best[0] > worst[0]:
                    pairs.append(dataclasses.replace(group, completions=[best[1], worst[1]]))
        return Step(pairs, count=self.run.ranks.sum(float(len(pairs))), is_on_policy=is_on_policy)

    def loss(self, scores: Scores, batch: PackedBatch, step: Step) -> Loss:
        """Compute the mean loss of the pairs."""
        logprobs_N = scores.logprobs
        if batch.num_scored_tokens == 0:
            return Loss(logprobs_N.sum())
        policy_S, reference_S, tokens_S = (
            sequence_sums(values_N, batch.sequence_index, batch.num_sequences)
            for values_N in (logprobs_N, batch.token["ref_logprobs"], torch.ones_like(logprobs_N))
        )
        pairs = pairs_of(policy_S, reference_S, tokens_S)
        normalised = self.preference_loss.length_normalised
        value = self.preference_loss.compute(pairs, self.options).sum() / step.denominator
        return Loss(value, means=pair_metrics(pairs, self.options.beta, normalised=normalised))
