"""Proximal policy optimisation: advantages of tokens from a critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.errors import ConfigError
from burnish.model.critic import load_value_model, share_base
from burnish.model.sources import find_model
from burnish.objectives.value import gae, moments, token_rewards, whiten
from burnish.rewards import Rubric
from burnish.rollout import Engine
from burnish.rollout.prompts import Share
from burnish.trainers.configs import PPOConfig
from burnish.trainers.policy import PolicyTrainer
from burnish.training.checkpoint import keeping_hyperparameters
from burnish.training.critic import Critic
from burnish.training.liveness import UNJUDGED, Verdict
from burnish.types import Completion, Group, StopReason

__all__ = ["PPOTrainer"]

_STATE = "critic.pt"
"""What a checkpoint holds of the critic."""


class PPOTrainer(PolicyTrainer):
    r"""Proximal Policy Optimisation (1707.06347) with a critic, in the order of arguments that TRL's trainer had.

    .. math::
        \mathcal L = -\frac1N \sum_t \min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon) A_t\big), \qquad
        A_t = \sum_{k \ge 0} (\gamma\lambda)^k (\rho_{t+k} + \gamma V_{t+k+1} - V_{t+k})

    with rho a token's reward: minus beta times its KL divergence from the reference, and at the last token the reward
    of the completion. The critic and the policy are updated in turn, so their activations never add up.

    Without `value_model` the critic is, for a policy with adapters, a score and adapters of its own on the policy's
    frozen base (about one base in memory); else a copy of the policy with a new score.

    Args:
        args: `PPOConfig`.
        processing_class: the tokenizer; the model's own if None.
        model: the policy: path, hub name, package that carries a model, or a model in memory.
        ref_model: the reference of the KL term; if None, the model as it was given (adapters off, or a frozen copy).
        reward_model: what rewards completions: a model by name or in memory. Give it or `reward_funcs`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        value_model: the critic: a model by name or in memory, which is copied; see above for None.
        data_collator: TRL's; refused, since batches are packed.
        eval_dataset: prompts, held out.
        optimizers: an optimizer and a scheduler of the policy instead of the configured ones.
        callbacks: transformers callbacks.
        peft_config: train these adapters of the policy instead of its weights.
        reward_funcs: a `Rubric`, or functions `f(prompts, completions, **columns) -> list[float | None]`.
        value_peft_config: train these adapters of the critic; None: of the policy's kind where it has any.
        engine: samples completions; the native in-process engine if None.
        compute_metrics: the groups of an evaluation, sampled and scored -> metrics by name.

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient or a value is not finite.
    """

    args: PPOConfig
    config_class = PPOConfig

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | Path | PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        reward_model: str | Path | PreTrainedModel | None = None,
        train_dataset: Any = None,
        value_model: str | Path | PreTrainedModel | None = None,
        data_collator: None = None,
        eval_dataset: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        *,
        reward_funcs: Rubric | Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        value_peft_config: Any = None,
        engine: Engine | None = None,
        compute_metrics: Callable[[Sequence[Group]], Mapping[str, float]] | None = None,
    ) -> None:
        if model is None:
            raise ConfigError("model = None: pass the policy as model=.")
        if (reward_model is None) == (reward_funcs is None):
            given = "neither" if reward_model is None else "both"
            raise ConfigError(f"reward_model, reward_funcs: {given} given; pass the one that rewards completions.")
        if data_collator is not None:
            raise ConfigError("data_collator: batches are packed here; remove it.")
        if isinstance(value_model, str | Path):
            find_model(value_model, "value_model")
        super().__init__(
            model,
            cast(Any, reward_funcs if reward_model is None else reward_model),
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            engine=engine,
            ref_model=ref_model,
            compute_metrics=compute_metrics,
        )
        self.critic = self._make_critic(value_model, value_peft_config)

    def _make_critic(self, value_model: Any, peft_config: Any) -> Critic:
        args = self.args
        common: dict[str, Any] = {
            "seed": args.seed,
            "pad_token_id": self.tokenizer.pad_token_id,
            "peft_config": peft_config,
        }
        if value_model is None and hasattr(self.model, "peft_config"):
            model, exact = share_base(self.model, **common), {}
        else:
            source = self.model if value_model is None else value_model
            # The policy is in memory already, whatever it was loaded with.
            init_kwargs = args.model_init_kwargs if isinstance(source, str | Path) else None
            model, exact = load_value_model(source, bf16=bool(args.bf16), init_kwargs=init_kwargs, **common)
        self.check_sampled_lengths(model)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(args, model)
        rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
        return Critic(
            model,
            learning_rate=rate,
            device=args.device,
            make_optimizer=lambda groups: cls(groups, **kwargs),
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            token_budget=args.token_budget,
            exact=exact,
            checkpointing=bool(args.gradient_checkpointing),
            pad_token_id=cast(int, self.tokenizer.pad_token_id or 0),
            sum_over_ranks=self.sum_over_ranks,
            max_over_ranks=self.max_over_ranks,
        )

    def judge(self, shares: Sequence[Share]) -> None:
        """Advantages and returns of tokens, by the critic's values."""
        groups = [share.group for share in shares]
        self.critic.values(groups)
        completions = [c for group in groups for c in group.completions]
        kls = self.divergences(completions)
        judged = [(c, self._reward(c)) for c in completions]
        known = [(c, reward) for c, reward in judged if reward is not None]
        self._estimate([c for c, _ in known], [reward for _, reward in known], kls)
        for completion in (c for c, reward in judged if reward is None):
            completion.token_advantages = [0.0] * len(completion.token_ids)
            completion.returns = completion.values

    @property
    def compared(self) -> str:
        """A critic that has learned the reward of all other steps makes a lone constant one."""
        return "run"

    def signals(self, completion: Completion) -> tuple[float, ...] | None:
        """The reward within its range, less the penalty of a missing end."""
        reward = self._reward(completion)
        return None if reward is None else (reward,)

    def verdict(self, grad_norm: float) -> Verdict:
        """None while only the critic learns."""
        return UNJUDGED if self.state.global_step < self.args.value_prefit_steps else super().verdict(grad_norm)

    def _reward(self, completion: Completion) -> float | None:
        reward, penalty = self.clipped_reward(completion), self.args.missing_eos_penalty
        cut = completion.stop_reason is StopReason.LENGTH
        return reward - penalty if cut and reward is not None and penalty is not None else reward

    def _estimate(
        self, completions: Sequence[Completion], rewards: Sequence[float], kls: dict[int, list[float]]
    ) -> None:
        """Token rewards, generalised advantages, returns; whitening over the tokens of all ranks."""
        args = self.args
        # Every token is a step of the episode: a masked one would have neither a value nor a divergence.
        assert all(c.loss_mask is None for c in completions)
        lengths = [len(c.token_ids) for c in completions]
        index_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        values_N = _flat([c.values for c in completions])
        in_reward = bool(kls) and args.kl_in == "reward"
        kl_N = _flat([kls[id(c)] for c in completions]) if in_reward else torch.zeros_like(values_N)
        scores_S = torch.tensor(rewards, dtype=torch.float64)
        rewards_N = token_rewards(kl_N, scores_S, sequence_index_N=index_N, beta=self._beta)
        if args.whiten_rewards:
            rewards_N = whiten(rewards_N, self._moments(rewards_N), shift_mean=False)
        advantages_N, returns_N = gae(rewards_N, values_N, index_N, len(lengths), gamma=args.gamma, lam=args.lam)
        if args.whiten_advantages:
            advantages_N = whiten(advantages_N, self._moments(advantages_N))
        pieces = zip(completions, advantages_N.split(lengths), returns_N.split(lengths), strict=True)
        for completion, advantages, returns in pieces:
            completion.token_advantages, completion.returns = advantages.tolist(), returns.tolist()
        self._log_objective(rewards, [sum(kls.get(id(c), ())) for c in completions], in_reward=in_reward)

    def _moments(self, values_N: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.sum_over_ranks(v) for v in moments(values_N).tolist()], dtype=torch.float64)

    def _log_objective(self, rewards: Sequence[float], kls: Sequence[float], *, in_reward: bool) -> None:
        """TRL's names: the divergence of a completion, the reward, and both together."""
        if not rewards:
            return
        score, kl = fmean(rewards), fmean(kls)
        penalty = self._beta * kl if in_reward else 0.0
        self._metrics.add("objective/scores", score)
        self._metrics.add("objective/kl", kl)
        self._metrics.add("objective/non_score_reward", -penalty)
        self._metrics.add("objective/rlhf_reward", score - penalty)

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """The critic's step on these groups comes before the policy's, and leaves nothing in memory."""
        super().prepare_groups(groups)
        metrics = self.critic.update(
            self._kept(groups),
            clip=self.args.cliprange_value,
            vf_coef=self.args.vf_coef,
            lr_factor=self._schedule(),
            num_batches=self.args.gradient_accumulation_steps,
        )
        for name, value in metrics.items():
            self._metrics.add(name, value)

    def _schedule(self) -> float:
        """The learning rate of this step over the peak one."""
        peak = self.args.learning_rate
        scheduler = cast(Any, self.lr_scheduler)
        return float(scheduler.get_last_lr()[0]) / peak if scheduler is not None and peak else 1.0

    def trainable_groups(self, groups: Sequence[Group]) -> list[Group]:
        """None while only the critic learns."""
        only_critic = self.state.global_step < self.args.value_prefit_steps
        # An evaluation, which runs without gradient, reports the policy's loss all the same.
        return [] if only_critic and torch.is_grad_enabled() else super().trainable_groups(groups)

    def saved_models(self) -> dict[str, torch.nn.Module]:
        """The policy and the critic."""
        return {**super().saved_models(), "the critic": self.critic.model}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy as usual, and the critic in `value_model` beside it (checkpoints keep its state instead)."""
        with nullcontext() if _internal_call else self.status.resumed("saving the model"):
            super().save_model(output_dir, _internal_call)
            if not _internal_call and self.is_world_process_zero():
                self.critic.save(Path(output_dir or str(self.args.output_dir)) / "value_model")

    def save_own_state(self, folder: Path) -> None:
        """The rollouts and, once, the critic."""
        super().save_own_state(folder)
        if self.is_world_process_zero():
            torch.save(self.critic.state_dict(), folder / _STATE)

    def load_own_state(self, folder: Path) -> None:
        """The rollouts and the critic."""
        super().load_own_state(folder)
        file = folder / _STATE
        if not file.is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {str(folder)!r}: {_STATE} is missing, so the critic is unknown."
            )
        with keeping_hyperparameters(self.critic.optimizer, self.checkpoints.changed):
            self.critic.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """The reference and the critic."""
        return {**super().other_models(), "value_model": self.critic.model}


def _flat(rows: Sequence[list[float] | None]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row or ()], dtype=torch.float64)
