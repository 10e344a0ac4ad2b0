"""Proximal policy optimisation: per-token advantages from a critic that learns from the same rollouts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from transformers import Trainer

from burnish.errors import ConfigError
from burnish.model.critic import load_value_model, share_base
from burnish.objectives.value import gae, moments, token_rewards, whiten
from burnish.rollout.prompts import Shard
from burnish.stages.online import OnlineStage
from burnish.stages.policy_gradient import PolicyGradient, PolicyStep
from burnish.training.checkpoint import keeping_hyperparameters
from burnish.training.critic import Critic
from burnish.training.learning_signal import UNKNOWN
from burnish.types import Completion, Group

__all__ = ["ActorCritic"]

_STATE = "critic.pt"
"""File of the critic in a checkpoint."""


class ActorCritic(PolicyGradient):
    """PPO: the critic values each token of a rollout, and is updated before the policy in every step.

    Args:
        args: `PPOConfig`.
        value_model: the critic, by name or in memory (it is copied); None for one on the policy's base.
        value_peft_config: adapters of the critic; None for the policy's kind, if it has any.
    """

    def __init__(self, args: Any, value_model: Any = None, value_peft_config: Any = None) -> None:
        super().__init__(args)
        self._value_model, self._value_peft_config = value_model, value_peft_config

    def join(self, stage: OnlineStage) -> None:
        """Build the critic and its optimizer."""
        super().join(stage)
        args, run, tokenizer, value_model = self.args, stage.run, stage.tokenizer, self._value_model
        common: dict[str, Any] = {
            "seed": args.seed,
            "pad_token_id": tokenizer.pad_token_id,
            "peft_config": self._value_peft_config,
        }
        if value_model is None and hasattr(run.model, "peft_config"):
            model, exact = share_base(run.model, **common), {}
        else:
            source = run.model if value_model is None else value_model
            # A critic copied from the policy in memory is not loaded with model_init_kwargs again.
            init_kwargs = args.model_init_kwargs if isinstance(source, str | Path) else None
            model, exact = load_value_model(source, bf16=bool(args.bf16), init_kwargs=init_kwargs, **common)
        stage.check_sampled_lengths(model)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        self.critic = Critic(
            model,
            learning_rate=args.learning_rate if args.value_learning_rate is None else args.value_learning_rate,
            device=args.device,
            make_optimizer=lambda groups: cls(groups, **kwargs),
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            token_budget=args.token_budget,
            keeps_prompts=run.keeps_prompts(model),
            exact=exact,
            checkpointing=bool(args.gradient_checkpointing),
            offloads=args.activation_offloading,
            mlp_tiles=args.mlp_tiles,
            pad_token_id=cast(int, tokenizer.pad_token_id or 0),
            sum_over_ranks=run.ranks.sum,
            max_over_ranks=run.ranks.max,
        )

    def assign_advantages(self, shards: Sequence[Shard]) -> Mapping[str, float]:
        """Compute values and rewards of each token, and write the streams `advantages` and `returns` (GAE)."""
        groups, args = [shard.group for shard in shards], self.args
        with self.run.phases.phase("scoring"):
            self.critic.values(groups)
        metrics = self.begin_rollout(shards)
        completions = [completion for group in groups for completion in group.completions]
        # Sampled tokens are the steps of an episode: what a tool or an environment wrote has neither a value nor a KL.
        scored = [(c, reward) for c in completions if (reward := self._reward(c)) is not None]
        for completion in completions:  # zero advantage for those without a reward
            completion.token["advantages"] = [0.0] * len(completion.token_ids)
            completion.token["returns"] = completion.token["values"]

        lengths = [c.num_scored_tokens for c, _ in scored]
        index_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        values_N = _flat([c.scored(c.token["values"]) for c, _ in scored])
        is_penalised = self.kl.is_in_reward and any("kl" in c.token for c in completions)
        kl_N = _flat([c.scored(c.token["kl"]) for c, _ in scored]) if is_penalised else torch.zeros_like(values_N)
        rewards_S = torch.tensor([reward for _, reward in scored], dtype=torch.float64)
        early_N = _flat([self._early_rewards(c) for c, _ in scored])
        rewards_N = token_rewards(
            kl_N, rewards_S, sequence_index_N=index_N, beta=self.kl.coefficient, early_rewards_N=early_N
        )
        if args.whiten_rewards:
            rewards_N = whiten(rewards_N, self._moments(rewards_N), shift_mean=False)
        advantages_N, returns_N = gae(rewards_N, values_N, index_N, len(lengths), gamma=args.gamma, lam=args.lam)
        if args.whiten_advantages:
            advantages_N = whiten(advantages_N, self._moments(advantages_N))
        pieces = zip(scored, advantages_N.split(lengths), returns_N.split(lengths), strict=True)
        for (completion, _), advantages, returns in pieces:
            completion.token["advantages"] = completion.spread(advantages.tolist())
            completion.token["returns"] = completion.spread(returns.tolist())
        return {**metrics, **self._objective(scored, is_penalised=is_penalised)}

    def _reward(self, completion: Completion) -> float | None:
        """Return the clipped reward, less `missing_eos_penalty` for a truncated completion."""
        reward, penalty = self.clipped_reward(completion), self.args.missing_eos_penalty
        if reward is None or penalty is None or not completion.is_truncated:
            return reward
        return reward - penalty

    def _early_rewards(self, completion: Completion) -> list[float]:
        """Place the reward of each turn but the last, which gets the rest, on the last token of its turn."""
        placed = [0.0] * completion.num_scored_tokens
        if self.args.turn_credit:
            turns, lengths = self._credited(completion)
            for end, reward in zip(itertools.accumulate(lengths[:-1]), turns[:-1], strict=True):
                placed[end - 1] += reward
        return placed

    def _moments(self, values_N: torch.Tensor) -> torch.Tensor:
        """Compute moments over the tokens of all ranks."""
        return torch.tensor([self.run.ranks.sum(v) for v in moments(values_N).tolist()], dtype=torch.float64)

    def _objective(self, scored: Sequence[tuple[Completion, float]], *, is_penalised: bool) -> dict[str, float]:
        """Return the mean reward, KL and KL-penalised reward of this rank's completions, by TRL's names."""
        if not scored:
            return {}
        score, kl = fmean(reward for _, reward in scored), fmean(sum(c.token.get("kl", ())) for c, _ in scored)
        penalty = self.kl.coefficient * kl if is_penalised else 0.0
        return {
            "objective/scores": score,
            "objective/kl": kl,
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": score - penalty,
        }

    def begin_step(self, groups: Sequence[Group], *, is_on_policy: bool) -> PolicyStep:
        """Update the critic, which leaves nothing in memory, and return the policy's step.

        In the first `value_prefit_steps` only the critic is trained.
        """
        step = self.step(groups, is_on_policy=is_on_policy)
        with self.run.phases.phase("update"):
            metrics = self.critic.update(
                self.kept(groups),
                clip=self.args.cliprange_value,
                vf_coef=self.args.vf_coef,
                lr_factor=self.run.lr_factor,
                num_batches=self.args.gradient_accumulation_steps,
            )
        self.run.metrics.add_all(metrics)
        if self.run.state.global_step < self.args.value_prefit_steps:
            return dataclasses.replace(step, groups=[], assessment=UNKNOWN)
        return step

    def reward_components(self, completion: Completion) -> tuple[float, ...] | None:
        """Return the rewards that advantages are computed from."""
        reward = self._reward(completion)
        return None if reward is None else (reward, *self._turn_rewards(completion))

    @property
    def compared(self) -> str:
        """All steps: a critic that has learned other rewards gives a constant one a nonzero advantage."""
        return "run"

    def learns_without_rewards(self) -> bool:
        """Return whether an entropy bonus or the KL to another model has a gradient."""
        return self._is_pulled

    def trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the critic."""
        return {"value_model": self.critic.model}

    def save_beside(self, folder: Path) -> None:
        """Save the critic in `value_model`."""
        self.critic.save(folder / "value_model")

    def save_state(self, folder: Path) -> None:
        """Save the critic's trained weights and its optimizer."""
        torch.save(self.critic.state_dict(), folder / _STATE)

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Restore the critic.

        Raises:
            ConfigError: the checkpoint has no critic.
        """
        if not (file := folder / _STATE).is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {str(folder)!r}: {_STATE} is missing, so the critic cannot be restored; "
                "resume from another checkpoint."
            )
        with keeping_hyperparameters(self.critic.optimizer, changed):
            self.critic.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))


def _flat(rows: Sequence[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)
