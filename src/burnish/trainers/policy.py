"""Policy gradients on rollouts: one loss of named parts, for every algorithm of the table."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from burnish.errors import CheckFailed, ConfigError
from burnish.model.packing import pack
from burnish.model.scoring import eval_mode, score
from burnish.objectives.advantages import ADVANTAGES, Rewards, per_criterion_advantages, token_advantages
from burnish.objectives.aggregate import aggregate, sequence_means
from burnish.objectives.kl import KL_ESTIMATORS, adapted_beta
from burnish.objectives.policy import (
    POLICY_LOSSES,
    PolicyLoss,
    PolicyOptions,
    PolicyTerms,
    correction_weights,
    log_ratio,
    off_policy_mask,
    sequence_log_weight,
)
from burnish.rollout.prompts import Share
from burnish.trainers.online import OnlineTrainer
from burnish.training.batches import scored_tokens
from burnish.training.entropy import EntropyBonus
from burnish.types import Completion, Group, PackedBatch

__all__ = ["PolicyTrainer", "Record", "estimate"]

_LOGPROBS = ("policy_logprobs", "sampler_logprobs", "old_logprobs", "ref_logprobs")


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What advantages need to know of a completion.

    Attributes:
        reward: None where it failed.
        num_tokens: its length.
        criteria: values of single criteria.
        penalties: a number for each token that its reward loses (beta times KL), or None.
    """

    reward: float | None
    num_tokens: int
    criteria: list[float | None]
    penalties: list[float] | None

    @property
    def total(self) -> float | None:
        """The reward minus all penalties."""
        return None if self.reward is None else self.reward - sum(self.penalties or ())


class PolicyTrainer(OnlineTrainer):
    """What GRPO's family and PPO share: rewards to advantages, and the loss of a packed batch."""

    _beta: float

    def set_up(self) -> None:
        """The coefficients that move during training."""
        self._beta = self._next_beta = self.args.beta
        self._tokens_in_step = 1.0
        self._least_entropy = -math.inf
        self._entropy_bonus = EntropyBonus(self.args)
        if self.args.sampling_correction is not None:
            self.agreement.report_only()

    @property
    def passes(self) -> int:
        """Times that each rollout is gone through."""
        return self.args.num_iterations

    @property
    def loss(self) -> PolicyLoss:
        """The row of the table of losses."""
        return POLICY_LOSSES[self.args.loss_type]

    @property
    def options(self) -> PolicyOptions:
        """Its numbers."""
        names = [field.name for field in dataclasses.fields(PolicyOptions) if hasattr(self.args, field.name)]
        return PolicyOptions(**{name: getattr(self.args, name) for name in names})

    def check_samples(self, completions: Sequence[Completion]) -> None:
        """The correction reads what the sampler says of its own samples, too."""
        super().check_samples(completions)
        if self.args.sampling_correction is not None and any(c.sampler_logprobs is None for c in completions):
            raise ConfigError(
                f"sampling_correction = {self.args.sampling_correction!r}: {type(self.engine).__name__} gives no "
                "sampler_logprobs, which the correction needs; use an engine that does, or remove it."
            )

    def signals(self, completion: Completion) -> tuple[float, ...] | None:
        """The reward within its range."""
        reward = self.clipped_reward(completion)
        return None if reward is None else (reward,)

    def learns_otherwise(self) -> bool:
        """Whether an entropy bonus, or the pull towards a reference that is another model, moves the policy."""
        pulls = self.reference is not None and not self.reference.is_initial_policy
        return self._entropy_bonus.coefficient != 0 or pulls

    def needs_old_logprobs(self, group: Group) -> bool:
        """Whether a divergence that is no part of the loss cannot take the sampler's word for the policy's."""
        args = self.args
        wanted = self.reference is not None and (args.kl_in == "reward" or args.kl_target is not None)
        apart = args.sampling_correction is not None or any(c.policy_logprobs is None for c in group.completions)
        return wanted and apart

    def judge(self, shares: Sequence[Share]) -> None:
        """Advantages from the rewards of all ranks: a group may lie on several."""
        kls = self.divergences([c for share in shares for c in share.group.completions])
        records = [
            (share.place, share.first, [self.record(c, kls.get(id(c))) for c in share.group.completions])
            for share in shares
        ]
        table: dict[int, list[Record]] = defaultdict(list)
        for place, _, values in sorted(self.gathered(records), key=lambda record: record[:2]):
            table[place] += values
        rows = dict(zip(table, self.advantages(list(table.values())), strict=True))
        for share in shares:
            for offset, completion in enumerate(share.group.completions):
                value = rows[share.place][share.first + offset]
                if isinstance(value, list):
                    completion.token_advantages = value
                else:
                    completion.advantage = value

    def clipped_reward(self, completion: Completion) -> float | None:
        """The completion's reward within `reward_clip_range`, or None where it failed."""
        reward, clip = completion.reward, self.args.reward_clip_range
        return reward if reward is None or clip is None else min(max(reward, clip[0]), clip[1])

    def record(self, completion: Completion, kl: list[float] | None) -> Record:
        """What advantages are made of, with the penalties of tokens where the divergence is part of the reward."""
        criteria = {} if completion.score is None else completion.score.criteria
        penalties = [self._beta * v for v in kl] if kl is not None and self.args.kl_in == "reward" else None
        values = [criteria.get(name) for name in self.rubric.names]
        return Record(self.clipped_reward(completion), len(completion.token_ids), values, penalties)

    def divergences(self, completions: Sequence[Completion]) -> dict[int, list[float]]:
        """Divergence of a rollout from the reference at each token, by id of the completion.

        An adaptive coefficient follows it from the next rollout on: this one is penalised with the present one.
        """
        kls = {id(c): kl for c in completions if (kl := self._kl_of(c)) is not None}
        if self.reference is not None:
            self._adapt_beta([sum(kl) for kl in kls.values()], tokens=sum(map(len, kls.values())))
        return kls

    def _kl_of(self, completion: Completion) -> list[float] | None:
        """From the log-probabilities before the first update."""
        sampled = completion.old_logprobs or completion.policy_logprobs
        if completion.ref_logprobs is None or sampled is None:
            return None
        wide = (torch.tensor(values, dtype=torch.float64) for values in (sampled, completion.ref_logprobs))
        return KL_ESTIMATORS[self.args.kl_estimator](*wide).tolist()

    def _adapt_beta(self, kl_S: Sequence[float], *, tokens: int) -> None:
        """Log the divergence, take the coefficient that the last rollout left, and leave one to the next."""
        self._beta = self._next_beta
        total_kl, count, length = (self.sum_over_ranks(float(v)) for v in (sum(kl_S), len(kl_S), tokens))
        if self.args.kl_in == "reward":
            self._metrics.add("kl", total_kl / max(length, 1.0))
        if self.args.kl_target is not None:
            self._metrics.add("kl_coef", self._beta)
            self._next_beta = adapted_beta(
                self._beta,
                total_kl / max(count, 1.0),
                target=self.args.kl_target,
                num_completions=round(count),
                horizon=self.args.kl_horizon,
            )

    def advantages(self, table: Sequence[Sequence[Record]]) -> Sequence[Sequence[float | list[float]]]:
        """P rows of G advantages of completions, or of lists of advantages of tokens."""
        raise NotImplementedError

    def prepare_terms(self, groups: Sequence[Group]) -> None:
        """What the terms of tokens need of the whole step: how many there are, and the least entropy that counts."""
        kept = self._kept(groups)
        if self._entropy_bonus.is_on:
            self._tokens_in_step = max(self.sum_over_ranks(float(sum(map(scored_tokens, kept)))), 1.0)
        if self.args.top_entropy_quantile < 1:
            own = self._entropies(kept)
            everywhere = torch.tensor([h for values in self.gathered([own]) for h in values], dtype=torch.float64)
            quantile = 1 - self.args.top_entropy_quantile
            self._least_entropy = float(everywhere.quantile(quantile)) if len(everywhere) else -math.inf
            if self._entropy_bonus.is_on:
                self._tokens_in_step = max(float((everywhere >= self._least_entropy).sum()), 1.0)

    @torch.no_grad()
    def _entropies(self, groups: Sequence[Group]) -> list[float]:
        """The entropy at every token in the loss: a quantile couples all tokens of a step, so it takes a pass."""
        found: list[float] = []
        with eval_mode(self.model):
            for part in self.split(groups):
                batch = pack(part).to(self.args.device)
                entropy_N = score(self.model, batch, temperature=self.args.temperature, with_entropy=True).entropy
                assert entropy_N is not None
                found += entropy_N.tolist()
        return found

    def _kept(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with their completions in the loss."""
        kept = [dataclasses.replace(g, completions=[c for c in g.completions if self.in_loss(c)]) for g in groups]
        return [group for group in kept if group.completions]

    def trainable_groups(self, groups: Sequence[Group]) -> list[Group]:
        """Completions in the loss, without groups whose every gradient term is exactly zero."""
        always = (self._beta > 0 and self.args.kl_in == "loss") or self._entropy_bonus.is_on
        return [g for g in self._kept(groups) if always or any(map(_has_advantage, g.completions))]

    def step_denominator(self, groups: Sequence[Group]) -> float:
        """Scored tokens, sequences, or sequences times the length limit, by the loss's reduction.

        Completions without a reward count nowhere; truncated ones that are masked count as sequences, as in TRL.
        """
        sequences = sum(c.reward is not None for group in groups for c in group.completions)
        match self.loss.reduction:
            case "token":
                return float(sum(map(scored_tokens, self._kept(groups))))
            case "sequence" | "sum":
                return float(sequences)
            case "constant":
                return float(sequences * self.args.max_completion_length)

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """Packed row with advantages and the log-probabilities that the loss and the check need."""
        completions = [c for group in groups for c in group.completions]
        token: dict[str, Callable[[Completion], Sequence[float]]] = {"advantages": _advantages_of}
        for name in _LOGPROBS:
            if any(getattr(c, name) is not None for c in completions):
                token[name] = lambda completion, name=name: _or_nan(getattr(completion, name), completion)
        return pack(groups, token=token)

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """Surrogate plus KL minus entropy bonus, this batch's share."""
        args, scored = self.args, batch.num_scored_tokens > 0
        scores = score(model, batch, temperature=args.temperature, with_entropy=scored)
        logprobs_N, entropy_N = scores.logprobs, scores.entropy
        if not scored:
            self._metrics.add_part("policy_loss", 0.0, step=self.state.global_step)
            return logprobs_N.sum()
        assert entropy_N is not None
        if self._fresh:
            self.compare(batch, logprobs_N.detach())
        place: dict[str, Any] = {"sequence_index_N": batch.sequence_index, "num_sequences": batch.num_sequences}
        old_N = _old_logprobs(batch, logprobs_N)
        ratios_N = log_ratio(logprobs_N, old_N, level=args.importance_sampling_level, **place)
        correction_N = self._correction(batch, old_N)
        weights_N = sequence_log_weight(
            logprobs_N, old_N, correction_N if self.loss.takes_correction else None, **place
        )
        terms = PolicyTerms(ratios_N, batch.token["advantages"], logprobs_N, weights_N)
        losses_N, clipped_N = self.loss.compute(terms, self.options)
        _check_shape(losses_N, logprobs_N, args.loss_type)
        kept_N = (entropy_N.detach() >= self._least_entropy).to(losses_N.dtype)
        losses_N = losses_N * kept_N * self._on_policy(batch, logprobs_N, old_N)
        if correction_N is not None and not self.loss.takes_correction:
            losses_N = losses_N * correction_N
        by: dict[str, Any] = {"reduction": self.loss.reduction, "denominator": denominator, **place}
        surrogate = aggregate(losses_N.detach(), **by)
        self._metrics.add_part("policy_loss", float(surrogate) * self.data_parallel_size, step=self.state.global_step)
        if self._beta > 0 and args.kl_in == "loss":
            losses_N = losses_N + self._beta * self._kl_in_loss(batch, logprobs_N, ratios_N)
        self._metrics.add_tokens("entropy", entropy_N)
        for name, side_N in (("high", terms.advantages > 0), ("low", terms.advantages < 0)):
            self._metrics.add_tokens(f"clip_ratio/{name}_mean", (clipped_N & side_N).float())
        self._metrics.add_tokens("clip_ratio/region_mean", clipped_N.float())
        for name, values_of in self.loss.metrics.items():
            self._metrics.add_tokens(name, sequence_means(values_of(terms, self.options), **place))
        loss = aggregate(losses_N, **by)
        self._entropy_bonus.add(entropy_N, kept_N)
        if (coefficient := self._entropy_bonus.coefficient) != 0:
            loss = loss - coefficient * (entropy_N * kept_N).sum() / self._tokens_in_step
        return loss

    def before_optimizer_step(self) -> None:
        """Check the samples, then let the entropy bonus follow the entropy of the step."""
        super().before_optimizer_step()
        for name, value in self._entropy_bonus.end_step(self.sum_over_ranks).items():
            self._metrics.add(name, value)

    def _correction(self, batch: PackedBatch, old_N: torch.Tensor) -> torch.Tensor | None:
        """Weights of samples between the sampler's distribution and the trainer's."""
        args = self.args
        if args.sampling_correction is None:
            return None
        weights_N = correction_weights(
            old_N,
            batch.token["sampler_logprobs"],
            kind=args.sampling_correction,
            maximum=args.sampling_correction_max,
            minimum=args.sampling_correction_min,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )
        self._metrics.add_tokens("sampling/correction/mean", weights_N)
        self._metrics.add_tokens("sampling/correction/masked", (weights_N == 0).float())
        return weights_N

    def _on_policy(self, batch: PackedBatch, logprobs_N: torch.Tensor, old_N: torch.Tensor) -> torch.Tensor | float:
        """Mask of sequences that the policy has moved off since they were sampled."""
        if self.args.off_policy_mask_threshold is None:
            return 1.0
        sampled_N = batch.token.get("policy_logprobs", old_N)
        mask_N = off_policy_mask(
            logprobs_N,
            torch.where(sampled_N.isnan(), old_N, sampled_N),
            batch.token["advantages"],
            threshold=self.args.off_policy_mask_threshold,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )
        self._metrics.add_tokens("off_policy/masked", (mask_N == 0).float())
        return mask_N

    def _kl_in_loss(self, batch: PackedBatch, logprobs_N: torch.Tensor, ratios_N: torch.Tensor) -> torch.Tensor:
        kl_N = KL_ESTIMATORS[self.args.kl_estimator](logprobs_N, batch.token["ref_logprobs"])
        self._metrics.add_tokens("kl", kl_N)
        corrected = self.args.use_bias_correction_kl
        if corrected is None:
            corrected = self.args.kl_estimator != "k2"
        return kl_N * ratios_N.exp() if corrected else kl_N

    def own_state(self) -> dict[str, Any]:
        """The KL coefficients of this rollout and of the next, and the coefficient of the entropy bonus."""
        return {"beta": self._beta, "next_beta": self._next_beta, "entropy_bonus": self._entropy_bonus.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore adaptive coefficients; one that is fixed is the configuration's."""
        self._entropy_bonus.load_state_dict(state.get("entropy_bonus", {}))
        if self.args.kl_target is not None:
            self._beta, self._next_beta = float(state["beta"]), float(state["next_beta"])


def estimate(
    table: Sequence[Sequence[Record]], estimator: str, *, weights: Sequence[float], scale: Any, by_criterion: bool
) -> Sequence[Sequence[float | list[float]]]:
    """Advantages by a row of `burnish.objectives.advantages.ADVANTAGES`, from the records of all ranks."""
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
    if by_criterion:
        return per_criterion_advantages(rewards.criteria, weights, rewards.totals)
    return ADVANTAGES[estimator](rewards)


def _has_advantage(completion: Completion) -> bool:
    return bool(completion.advantage) or any(completion.token_advantages or ())


def _advantages_of(completion: Completion) -> Sequence[float]:
    if completion.token_advantages is not None:
        return completion.token_advantages
    return [completion.advantage or 0.0] * len(completion.token_ids)


def _or_nan(values: list[float] | None, completion: Completion) -> list[float]:
    """Not a number where nothing is known: a replayed completion beside fresh ones, or the other way round."""
    return values if values is not None else [math.nan] * len(completion.token_ids)


def _old_logprobs(batch: PackedBatch, logprobs_N: torch.Tensor) -> torch.Tensor:
    """Those before the first update; of fresh samples the current ones, without a forward of their own."""
    old_N = batch.token.get("old_logprobs")
    return logprobs_N.detach() if old_N is None else torch.where(old_N.isnan(), logprobs_N.detach(), old_N)


def _check_shape(losses_N: torch.Tensor, logprobs_N: torch.Tensor, name: str) -> None:
    if losses_N.shape != logprobs_N.shape:
        raise CheckFailed(
            f"loss_type = {name!r} returned shape {tuple(losses_N.shape)} for {len(logprobs_N)} tokens: return one "
            "loss for each token, not reduced."
        )
