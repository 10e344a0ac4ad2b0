"""Policy gradients on rollouts: one loss of exchangeable parts for every row of the table of algorithms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from burnish.errors import CheckFailed, ConfigError
from burnish.model.scoring import Scores, eval_mode, score
from burnish.objectives.advantages import (
    ADVANTAGES,
    Rewards,
    per_criterion_advantages,
    token_advantages,
    turn_advantages,
)
from burnish.objectives.aggregate import aggregate, sequence_means
from burnish.objectives.kl import KL_ESTIMATORS
from burnish.objectives.policy import (
    POLICY_LOSSES,
    PolicyOptions,
    PolicyTerms,
    correction_weights,
    log_ratio,
    off_policy_mask,
    sequence_log_weight,
)
from burnish.rollout.prompts import Shard, gather_by_prompt
from burnish.stages.algorithm import Algorithm
from burnish.training.entropy import EntropyBonus
from burnish.training.kl_penalty import KLPenalty
from burnish.training.step import Loss, Step, scored_tokens
from burnish.types import Completion, Group, PackedBatch

__all__ = ["PolicyGradient", "PolicyStep", "Record", "estimate"]

_GROUP_ESTIMATORS = ("group", "leave_one_out", "group_batch", "mean_normalized")
"""Estimators whose advantages are 0 where the rewards of a group are equal."""


@dataclass(frozen=True, slots=True)
class Record:
    """The inputs of a completion's advantage.

    Attributes:
        reward: clipped reward; None where it failed.
        num_tokens: number of tokens.
        criteria: value of each criterion.
        penalties: penalty of each token (beta times KL), or None.
        turns: weighted reward of each turn, where turns are credited apart.
        turn_tokens: number of tokens of each turn.
    """

    reward: float | None
    num_tokens: int
    criteria: list[float | None]
    penalties: list[float] | None
    turns: list[float] = field(default_factory=list[float])
    turn_tokens: list[int] = field(default_factory=list[int])

    @property
    def total(self) -> float | None:
        """The reward minus the penalties of all tokens."""
        return None if self.reward is None else self.reward - sum(self.penalties or ())


@dataclass(frozen=True, slots=True)
class PolicyStep(Step):
    """A policy-gradient step.

    Attributes:
        kl_coef: coefficient of the KL in the loss; 0 where it is part of the reward.
        entropy_coef: coefficient of the entropy bonus.
        least_entropy: tokens with less entropy are excluded from the loss.
        num_tokens: tokens with an entropy bonus, over all ranks.
    """

    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    least_entropy: float = -math.inf
    num_tokens: float = 1.0


class PolicyGradient(Algorithm):
    """GRPO and its relatives: an advantage estimator and a surrogate loss, both rows of a table.

    Args:
        args: `GRPOConfig` or `RLOOConfig`.
    """

    needs_entropy = True

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.policy_loss = POLICY_LOSSES[args.loss_type]
        names = [field.name for field in dataclasses.fields(PolicyOptions) if hasattr(args, field.name)]
        self.options = PolicyOptions(**{name: getattr(args, name) for name in names})
        self.kl = KLPenalty(args)
        self.entropy_bonus = EntropyBonus(args)

    @property
    def passes(self) -> int:
        """Passes over each rollout."""
        return self.args.num_iterations

    @property
    def compared(self) -> str:
        """The baseline of the estimator; that of a registered one is taken to be the batch."""
        estimator = self.args.advantage_estimator
        return "group" if estimator in _GROUP_ESTIMATORS else "batch"

    @property
    def corrects_sampling(self) -> bool:
        """Whether samples are weighted by the ratio of policy and sampler probabilities."""
        return self.args.correction is not None

    @property
    def _sampled_logprobs(self) -> str:
        """Which log-probabilities of a sample the policy's are compared with.

        Weights of stale samples correct the change of the weights alone, so they are 1 at the first step under
        truncation too.
        """
        return "policy_logprobs" if self.args.staleness_bound else "sampler_logprobs"

    def check_samples(self, completions: Sequence[Completion], engine: str) -> None:
        """Refuse samples without the log-probabilities that the correction needs."""
        needed = self._sampled_logprobs
        if self.corrects_sampling and any(getattr(c, needed) is None for c in completions):
            raise ConfigError(
                f"sampling_correction = {self.args.correction!r}: {engine} returns no {needed}, "
                "which the correction needs; use an engine that does, or remove the field."
            )

    def reward_components(self, completion: Completion) -> tuple[float, ...] | None:
        """Return the clipped reward with those of turns, or the criteria where each is normalised separately."""
        reward = self.clipped_reward(completion)
        if reward is None:
            return None
        if completion.score is None or not self._by_criterion:
            return (reward, *self._turn_rewards(completion))
        values = [completion.score.terms.get(name) for name in self.stage.rubric.names]
        return tuple(value for value in values if value is not None)

    def _turn_rewards(self, completion: Completion) -> list[float]:
        """Return the rewards of turns that are credited apart; empty where none has one."""
        turns = self._credited(completion)[0] if self.args.turn_credit else []
        return turns if any(turns) else []

    @property
    def _by_criterion(self) -> bool:
        return self.args.multi_objective_aggregation == "normalize_then_sum"

    def clipped_reward(self, completion: Completion) -> float | None:
        """Return the reward clipped to `reward_clip_range`, or None where it failed."""
        reward, clip = completion.reward, self.args.reward_clip_range
        return reward if reward is None or clip is None else min(max(reward, clip[0]), clip[1])

    def learns_without_rewards(self) -> bool:
        """Return whether an entropy bonus, the KL to another model or a registered estimator has a gradient."""
        return self._is_pulled or self.args.advantage_estimator not in (*_GROUP_ESTIMATORS, "batch")

    @property
    def _is_pulled(self) -> bool:
        reference = self.stage.reference
        pulls = reference is not None and not reference.is_initial_policy
        return self.entropy_bonus.coefficient != 0 or pulls

    def needs_old_logprobs(self, group: Group) -> bool:
        """Return whether a KL outside the loss cannot use the sampler's log-probabilities for the policy's."""
        wanted = self.stage.reference is not None and (self.kl.is_in_reward or self.args.kl_target is not None)
        return wanted and (self.corrects_sampling or any(c.policy_logprobs is None for c in group.completions))

    def assign_advantages(self, shards: Sequence[Shard]) -> Mapping[str, float]:
        """Estimate the advantage of each completion, or of each token, from the rewards of all ranks."""
        metrics = self.begin_rollout(shards)
        table = gather_by_prompt(shards, self.record, self.run.ranks.gathered)
        rows = dict(zip(table, self.estimate(list(table.values())), strict=True))
        for shard in shards:
            for number, completion in enumerate(shard.group.completions, shard.first):
                value = rows[shard.position][number]
                if isinstance(value, list):
                    completion.token["advantages"] = completion.spread(value)
                else:
                    completion.sequence["advantages"] = value
        return metrics

    def begin_rollout(self, shards: Sequence[Shard]) -> dict[str, float]:
        """Compute the KL from the reference; an adaptive coefficient follows it from the next rollout on."""
        if self.stage.reference is None:
            return {}
        return self.kl.begin_rollout([c for shard in shards for c in shard.group.completions], self.run.ranks)

    def record(self, completion: Completion) -> Record:
        """Collect the inputs of a completion's advantage."""
        terms = {} if completion.score is None else completion.score.terms
        kl = completion.token.get("kl") if self.kl.is_in_reward else None
        penalties = None if kl is None else [self.kl.coefficient * value for value in completion.scored(kl)]
        values = [terms.get(name) for name in self.stage.rubric.names]
        turns, lengths = self._credited(completion) if self.args.turn_credit else ([], [])
        return Record(self.clipped_reward(completion), completion.num_scored_tokens, values, penalties, turns, lengths)

    def _credited(self, completion: Completion) -> tuple[list[float], list[int]]:
        """Return the weighted reward and the number of tokens of each turn."""
        score, episode = completion.score, completion.episode
        if episode is None or not episode.turns:
            return [0.0], [completion.num_scored_tokens]
        turns = [0.0] * len(episode.turns)
        rubric = self.stage.rubric
        for name, weight in zip(rubric.names, rubric.weights(self.run.state), strict=True):
            # A term that a gate or a normalisation has changed is credited to the whole episode.
            if score is not None and name in score.turns and score.terms[name] == score.criteria[name]:
                turns = [total + weight * own for total, own in zip(turns, score.turns[name], strict=True)]
        return turns, [end - start for start, end in episode.turns]

    def estimate(self, table: Sequence[Sequence[Record]]) -> Sequence[Sequence[float | list[float]]]:
        """Estimate advantages with the configured row of `burnish.objectives.advantages.ADVANTAGES`."""
        args, rubric = self.args, self.stage.rubric
        return estimate(
            table,
            args.advantage_estimator,
            weights=rubric.weights(self.run.state),
            scale={True: "group", False: "none"}.get(args.scale_rewards, args.scale_rewards),
            by_criterion=self._by_criterion,
        )

    def kept(self, groups: Sequence[Group]) -> list[Group]:
        """Drop completions that are excluded from the loss."""
        kept = [dataclasses.replace(g, completions=[c for c in g.completions if self.in_loss(c)]) for g in groups]
        return [group for group in kept if group.completions]

    def step(self, groups: Sequence[Group], *, is_on_policy: bool = False) -> PolicyStep:
        """Select groups with a gradient; quantities that couple all tokens come from a pass without one."""
        kept, ranks, bonus = self.kept(groups), self.run.ranks, self.entropy_bonus
        least_entropy, num_tokens = -math.inf, 1.0
        if bonus.is_on:
            num_tokens = max(ranks.sum(float(sum(map(scored_tokens, kept)))), 1.0)
        if self.args.top_entropy_quantile < 1:
            own = self._entropies(kept)
            everywhere = torch.tensor([h for values in ranks.gathered([own]) for h in values], dtype=torch.float64)
            quantile = 1 - self.args.top_entropy_quantile
            least_entropy = float(everywhere.quantile(quantile)) if len(everywhere) else -math.inf
            if bonus.is_on:
                num_tokens = max(float((everywhere >= least_entropy).sum()), 1.0)
        kl_coef = 0.0 if self.kl.is_in_reward else max(self.kl.coefficient, 0.0)
        always = kl_coef > 0 or bonus.is_on
        return PolicyStep(
            [group for group in kept if always or any(map(_has_advantage, group.completions))],
            count=ranks.sum(self._count(groups, kept)),
            is_on_policy=is_on_policy,
            kl_coef=kl_coef,
            entropy_coef=bonus.coefficient,
            least_entropy=least_entropy,
            num_tokens=num_tokens,
        )

    def _count(self, groups: Sequence[Group], kept: Sequence[Group]) -> float:
        """Count scored tokens, sequences, or sequences times the length limit, by the loss's reduction.

        Completions without a reward are not counted; truncated ones that are masked count as sequences, as in TRL.
        """
        sequences = sum(c.reward is not None for group in groups for c in group.completions)
        match self.policy_loss.reduction:
            case "token":
                return float(sum(map(scored_tokens, kept)))
            case "sequence" | "sum":
                return float(sequences)
            case "constant":
                return float(sequences * self.args.max_completion_length)

    @torch.no_grad()
    def _entropies(self, groups: Sequence[Group]) -> list[float]:
        """Compute the entropy of every token in the loss, for a quantile over all tokens of the step."""
        found: list[float] = []
        with self.run.phases.phase("scoring"), eval_mode(self.run.model):
            for _, batch in self.stage.scored_parts(groups, self.run.model):
                entropy_N = score(self.run.model, batch, temperature=self.args.temperature, with_entropy=True).entropy
                assert entropy_N is not None
                found += entropy_N.tolist()
        return found

    def differentiates_entropy(self, step: Step) -> bool:
        """Return whether there is an entropy bonus: otherwise the entropy is only reported, and compared."""
        assert isinstance(step, PolicyStep)
        return step.entropy_coef != 0

    def loss(self, scores: Scores, batch: PackedBatch, step: Step) -> Loss:
        """Compute the surrogate loss plus the KL minus the entropy bonus."""
        assert isinstance(step, PolicyStep)
        logprobs_N, entropy_N = scores.logprobs, scores.entropy
        if entropy_N is None:  # nothing is scored
            return Loss(logprobs_N.sum(), sums={"policy_loss": 0.0})
        args, loss, advantages_N = self.args, self.policy_loss, _advantages(batch)
        layout: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        old_N = _old_logprobs(batch, logprobs_N)
        ratios_N = log_ratio(logprobs_N, old_N, level=args.importance_sampling_level, **layout)
        correction_N = self._correction(batch, old_N)
        weights_N = sequence_log_weight(logprobs_N, old_N, correction_N if loss.takes_correction else None, **layout)
        terms = PolicyTerms(ratios_N, advantages_N, logprobs_N, weights_N)
        losses_N, clipped_N = loss.compute(terms, self.options)
        if losses_N.shape != logprobs_N.shape:
            raise CheckFailed(
                f"loss_type = {args.loss_type!r} returned shape {tuple(losses_N.shape)} for {len(logprobs_N)} tokens: "
                "return one loss per token, without reduction."
            )
        kept_N = (entropy_N.detach() >= step.least_entropy).to(losses_N.dtype)
        on_policy_N = self._on_policy(batch, logprobs_N, old_N)
        losses_N = losses_N * kept_N * (1.0 if on_policy_N is None else on_policy_N)
        if correction_N is not None and not loss.takes_correction:
            losses_N = losses_N * correction_N
        by: dict[str, Any] = {"reduction": loss.reduction, "denominator": step.denominator, **layout}
        surrogate = aggregate(losses_N.detach(), **by)
        means: dict[str, torch.Tensor] = {
            "entropy": entropy_N,
            "clip_ratio/high_mean": (clipped_N & (advantages_N > 0)).float(),
            "clip_ratio/low_mean": (clipped_N & (advantages_N < 0)).float(),
            "clip_ratio/region_mean": clipped_N.float(),
        }
        means |= {name: sequence_means(of(terms, self.options), **layout) for name, of in loss.metrics.items()}
        if correction_N is not None:
            means |= {
                "sampling/correction/mean": correction_N,
                "sampling/correction/masked": (correction_N == 0).float(),
            }
        if on_policy_N is not None:
            means["off_policy/masked"] = (on_policy_N == 0).float()
        if step.kl_coef > 0:
            kl_N = KL_ESTIMATORS[args.kl_estimator](logprobs_N, batch.token["ref_logprobs"])
            means["kl"] = kl_N
            corrected = args.use_bias_correction_kl
            if corrected is None:
                corrected = args.kl_estimator != "k2"
            losses_N = losses_N + step.kl_coef * (kl_N * ratios_N.exp() if corrected else kl_N)
        value = aggregate(losses_N, **by)
        self.entropy_bonus.add(entropy_N, kept_N)
        if step.entropy_coef != 0:
            value = value - step.entropy_coef * (entropy_N * kept_N).sum() / step.num_tokens
        return Loss(value, means=means, sums={"policy_loss": surrogate})

    def _correction(self, batch: PackedBatch, old_N: torch.Tensor) -> torch.Tensor | None:
        """Compute the [N] importance weights of policy over sampler, if configured."""
        args = self.args
        if args.correction is None:
            return None
        return correction_weights(
            old_N,
            batch.token[self._sampled_logprobs],
            kind=args.correction,
            maximum=args.sampling_correction_max,
            minimum=args.sampling_correction_min,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )

    def _on_policy(self, batch: PackedBatch, logprobs_N: torch.Tensor, old_N: torch.Tensor) -> torch.Tensor | None:
        """Compute the [N] mask of sequences that are still on-policy, if configured."""
        if self.args.off_policy_mask_threshold is None:
            return None
        sampled_N = batch.token.get("policy_logprobs", old_N)
        return off_policy_mask(
            logprobs_N,
            torch.where(sampled_N.isnan(), old_N, sampled_N),
            _advantages(batch),
            threshold=self.args.off_policy_mask_threshold,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )

    def end_step(self) -> Mapping[str, float]:
        """Adapt the entropy bonus to the entropy of the step."""
        return self.entropy_bonus.end_step(self.run.ranks.sum)

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficients of the KL and the entropy bonus."""
        return {**self.kl.state_dict(), "entropy_bonus": self.entropy_bonus.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore adaptive coefficients; fixed ones come from the configuration."""
        self.entropy_bonus.load_state_dict(state.get("entropy_bonus", {}))
        self.kl.load_state_dict(state)


def estimate(
    table: Sequence[Sequence[Record]], estimator: str, *, weights: Sequence[float], scale: Any, by_criterion: bool
) -> Sequence[Sequence[float | list[float]]]:
    """Estimate P rows of G advantages, each a number per completion or a list per token.

    Args:
        table: P rows of G records.
        estimator: a row of `burnish.objectives.advantages.ADVANTAGES`.
        weights: weight of each criterion.
        scale: the standard deviation to divide by: "group", "batch" or "none".
        by_criterion: normalise each criterion separately.
    """
    if estimator == "batch" and any(r.penalties for row in table for r in row):
        penalties = [[r.penalties or [] for r in row] for row in table]
        return token_advantages([[r.reward for r in row] for row in table], penalties)
    rewards = Rewards(
        totals=[[r.total for r in row] for row in table],
        lengths=[[r.num_tokens for r in row] for row in table],
        criteria=[[[r.criteria[k] for r in row] for row in table] for k in range(len(weights))],
        weights=weights,
        scale=scale,
    )
    if any(r.turns for row in table for r in row):
        found = turn_advantages(rewards, [[r.turns for r in row] for row in table], ADVANTAGES[estimator])
        return [
            [
                [advantage for advantage, n in zip(listed, r.turn_tokens, strict=True) for _ in range(n)]
                for listed, r in zip(*rows, strict=True)
            ]
            for rows in zip(found, table, strict=True)
        ]
    if by_criterion:
        return per_criterion_advantages(rewards.criteria, weights, rewards.totals)
    return ADVANTAGES[estimator](rewards)


def _has_advantage(completion: Completion) -> bool:
    return bool(completion.sequence.get("advantages")) or any(completion.token.get("advantages", ()))


def _advantages(batch: PackedBatch) -> torch.Tensor:
    """Return the [N] advantages of tokens, or of the sequence of each."""
    if "advantages" in batch.token:
        return batch.token["advantages"]
    return batch.sequence["advantages"][batch.sequence_index]


def _old_logprobs(batch: PackedBatch, logprobs_N: torch.Tensor) -> torch.Tensor:
    """Return the [N] log-probabilities before the first update; for fresh samples, the current ones."""
    old_N = batch.token.get("old_logprobs")
    return logprobs_N.detach() if old_N is None else torch.where(old_N.isnan(), logprobs_N.detach(), old_N)
