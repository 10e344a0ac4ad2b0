"""Group relative policy optimisation and its relatives."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.utils import gather_object

from burnish.advantages import group_advantages
from burnish.model.scoring import score
from burnish.objectives.aggregate import Reduction, aggregate
from burnish.objectives.kl import kl_k3
from burnish.objectives.policy import clipped_surrogate, log_ratio
from burnish.packing import pack
from burnish.trainers.base import scored_tokens
from burnish.trainers.configs import GRPOConfig
from burnish.trainers.metrics import total
from burnish.trainers.online import OnlineTrainer
from burnish.trainers.prompts import Share
from burnish.types import Completion, Group, PackedBatch

__all__ = ["GRPOTrainer"]

REDUCTIONS: Mapping[str, Reduction] = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}


class GRPOTrainer(OnlineTrainer):
    r"""Group Relative Policy Optimisation (2402.03300) and its relatives, with the arguments of TRL's trainer.

    .. math::
        \mathcal L = -\frac1D \sum_{t} \min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t\big)
        + \beta\, \mathrm{KL}_{k3}(\pi \| \pi_{ref})

    Each optimizer step takes its share of a rollout: P prompts, G completions each, sampled by the engine with the
    trainer's own weights. A completion whose reward failed leaves the loss; a group without spread costs no forward.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        reward_funcs: a `Rubric`, or functions `f(prompts, completions, **columns) -> list[float | None]`.
        args: `GRPOConfig`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        reward_processing_classes, tools, rollout_func, environment_factory: TRL's; refused.
        engine: samples completions; the native in-process engine if None.
        ref_model: the reference of the KL term; if None, the model as it was given (adapters off, or a frozen copy).

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient is not finite.
    """

    args: GRPOConfig
    config_class = GRPOConfig

    @property
    def passes(self) -> int:
        """Times that each rollout is gone through."""
        return self.args.num_iterations

    def judge(self, shares: Sequence[Share]) -> None:
        """Group advantages over all ranks: a group may lie on several."""
        records = [(share.place, share.first, [total(c) for c in share.group.completions]) for share in shares]
        gathered = gather_object(records) if self.accelerator.num_processes > 1 else records
        rewards: dict[int, list[float | None]] = defaultdict(list)
        for place, _, values in sorted(cast("list[tuple[int, int, list[float | None]]]", gathered)):
            rewards[place] += values
        scale = {True: "group", False: "none"}.get(cast(Any, self.args.scale_rewards), self.args.scale_rewards)
        rows = group_advantages(list(rewards.values()), scale=cast(Any, scale))
        advantages = dict(zip(rewards, rows, strict=True))
        for share in shares:
            for offset, completion in enumerate(share.group.completions):
                completion.advantage = advantages[share.place][share.first + offset]
        self._metrics.add_rewards(list(rewards.values()))

    def trainable_groups(self, groups: Sequence[Group]) -> list[Group]:
        """Completions in the loss, without groups whose every gradient term is exactly zero."""
        kept: list[Group] = []
        for group in groups:
            completions = [c for c in group.completions if self.in_loss(c)]
            if completions and (self.args.beta > 0 or any(c.advantage for c in completions)):
                kept.append(dataclasses.replace(group, completions=completions))
        return kept

    def step_denominator(self, groups: Sequence[Group]) -> float:
        """Scored tokens, sequences, or sequences times the length limit, by `loss_type`.

        Completions without a reward count nowhere; truncated ones that are masked count as sequences, as in TRL.
        """
        sequences = sum(total(c) is not None for group in groups for c in group.completions)
        match REDUCTIONS[self.args.loss_type]:
            case "token":
                kept = [
                    dataclasses.replace(g, completions=[c for c in g.completions if self.in_loss(c)]) for g in groups
                ]
                return float(sum(scored_tokens(group) for group in kept))
            case "sequence":
                return float(sequences)
            case "constant":
                return float(sequences * self.args.max_completion_length)

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """Packed row with advantages and the log-probabilities that the loss and the check need."""
        token: dict[str, Callable[[Completion], Sequence[float]]] = {}
        first = groups[0].completions[0]
        for name in ("policy_logprobs", "old_logprobs", "ref_logprobs"):
            if getattr(first, name) is not None:
                token[name] = lambda completion, name=name: getattr(completion, name)
        return pack(groups, token=token, sequence={"advantages": lambda completion: completion.advantage or 0.0})

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """Clipped surrogate plus KL, this batch's share."""
        args = self.args
        with_entropy = batch.num_scored_tokens > 0
        scores = score(model, batch, temperature=args.temperature, with_entropy=with_entropy)
        logprobs_N, entropy_N = scores.logprobs, scores.entropy
        if not with_entropy:
            return logprobs_N.sum()
        if self._fresh:
            self.compare(batch, logprobs_N.detach())
        old_N = batch.token.get("old_logprobs", logprobs_N.detach())
        ratios_N = log_ratio(
            logprobs_N,
            old_N,
            level=cast(Any, args.importance_sampling_level),
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
        )
        losses_N, clipped_N = clipped_surrogate(
            ratios_N,
            batch.sequence["advantages"][batch.sequence_index],
            epsilon_low=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
        )
        if args.beta > 0:
            kl_N = kl_k3(logprobs_N, batch.token["ref_logprobs"])
            losses_N = losses_N + args.beta * kl_N
            self._metrics.add_tokens("kl", kl_N)
        assert entropy_N is not None
        self._metrics.add_tokens("entropy", entropy_N)
        self._metrics.add_tokens("clip_ratio", clipped_N.float())
        return aggregate(
            losses_N,
            sequence_index_N=batch.sequence_index,
            num_sequences=batch.num_sequences,
            reduction=REDUCTIONS[args.loss_type],
            denominator=denominator,
        )
