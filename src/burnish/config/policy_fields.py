"""Configuration fields of the stages that follow a policy gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Interval

from burnish.config.algorithms import ADVANTAGE_NAMES, ALGORITHMS, LOSS_NAMES
from burnish.config.declare import (
    CORRECTIONS,
    CRITIC,
    ENTROPY,
    LOSS,
    REFERENCE,
    REWARDS,
    SAMPLING,
    AtLeastTwo,
    Count,
    Fraction,
    Meets,
    Natural,
    NonNegative,
    Positive,
    Share,
    one_of,
    own,
    stage,
)
from burnish.config.online_fields import OnlineFields

__all__ = ["GRPOFields", "PPOFields", "PolicyFields", "RLOOFields"]


def _interval(value: list[float]) -> str | None:
    return None if len(value) == 2 and value[0] < value[1] else "use [lowest, highest], or leave it out"


@dataclass
class PolicyFields(OnlineFields):
    """Fields of the stages that follow a policy gradient."""

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own(
        None,
        "A row of the algorithm table: it sets the fields that define it, and starting values of others. None: the "
        "fields as they are.",
        LOSS,
    )
    num_iterations: Count = own(1, "Passes over each round of samples.", LOSS, resume="refused")
    loss_type: Annotated[str, one_of(LOSS_NAMES)] = own(
        "dapo",
        "The surrogate and how its per-token values are averaged: the clipped one by grpo (per sequence, then over "
        "sequences), bnpo and dapo (over all scored tokens), dr_grpo (over num_completions x max_completion_length) or "
        "luspo (sums of sequences, over sequences); cispo, sapo and vespo. Denominators are global.",
        LOSS,
    )
    beta: NonNegative = own(
        0.0,
        "Weight of the KL divergence from the reference model. 0: no reference is held.",
        REFERENCE,
        fix="use a finite number of at least 0; 0 holds no reference model",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = own(
        "k3", "Estimate of the KL divergence from a token: k1, k2 or k3.", REFERENCE
    )
    kl_in: Literal["loss", "reward"] = own(
        "loss", "Where the KL divergence counts: in the loss, or in the reward.", REFERENCE
    )
    use_bias_correction_kl: bool | None = own(
        None,
        "Multiply the estimate in the loss by the importance ratio, so that its gradient is that of the divergence "
        "(2512.02556). None: yes for k1 and k3; k2's own gradient is right already.",
        REFERENCE,
    )
    kl_target: Positive | None = own(
        None,
        "Divergence in nats a completion that beta is adapted to reach (1909.08593). None: beta stays.",
        REFERENCE,
        fix="use a number of nats above 0, or leave it out",
    )
    kl_horizon: Count = own(10000, "Completions over which an adaptive beta changes by a factor.", REFERENCE)
    epsilon: Annotated[float, Interval(gt=0, lt=1)] = own(
        0.2, "Clip range below a ratio of 1.", LOSS, fix="use a number in (0, 1), such as 0.2"
    )
    epsilon_high: Positive | None = own(
        None,
        "Clip range above a ratio of 1; of cispo the bound of the ratio itself, such as 5. None: epsilon.",
        LOSS,
        fix="use a number above 0, such as 0.28, or leave it out",
    )
    delta: Annotated[float, Gt(1)] | None = own(
        None,
        "Upper bound of the ratio where the advantage is negative: two-sided, or dual, clipping. None: no bound.",
        LOSS,
        fix="it bounds a ratio: use a number above 1 + epsilon, or leave it out",
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token", "product"] = own(
        "token",
        "Ratio of each token, of the whole sequence as geometric mean (sequence: GSPO; sequence_token: with each "
        "token's own gradient) or as product (product: RLOO).",
        LOSS,
    )
    entropy_coef: float = own(
        0.0,
        "Weight of an entropy bonus, the mean over the step's tokens; adaptive, the one to start from. 0: none.",
        ENTROPY,
    )
    use_adaptive_entropy: bool = own(
        False,
        "After every optimizer step, raise the weight of the entropy bonus by entropy_coef_delta where the entropy of "
        "the step's tokens is at most entropy_target, else lower it; a step after one above the target has no bonus "
        "(2505.22312).",
        ENTROPY,
    )
    entropy_target: Positive = own(
        0.2,
        "Mean entropy of tokens, in nats, that use_adaptive_entropy holds up.",
        ENTROPY,
        fix="use a number of nats above 0, such as 0.2",
    )
    entropy_coef_delta: Positive = own(0.005, "Change of an adaptive entropy_coef in one optimizer step.", ENTROPY)
    entropy_coef_min: NonNegative = own(0.0, "Lower bound of an adaptive entropy_coef.", ENTROPY)
    entropy_coef_max: Positive = own(1.0, "Upper bound of an adaptive entropy_coef.", ENTROPY)
    top_entropy_quantile: Share = own(
        1.0,
        "Share of the step's tokens, those of highest entropy, that the policy loss keeps (2506.01939). 1: all.",
        LOSS,
        fix="use a number in (0, 1]; 1 keeps every token",
    )
    reward_clip_range: Annotated[list[float], Meets(_interval)] | None = own(
        None, "Lowest and highest reward; others are clipped. None: no clip.", REWARDS
    )
    sampling_correction: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = own(
        None,
        "Weight of samples by the ratio of trainer to sampler: token_truncate, token_mask (IcePop, with bounds 0.5 and "
        "5), sequence_truncate, sequence_mask. With it, the check of sampler against trainer reports and does not "
        "stop. None: no weight; the check stops the run.",
        CORRECTIONS,
    )
    sampling_correction_max: Positive | None = own(
        3.0,
        "Largest weight; above it truncated or masked. None: no bound.",
        CORRECTIONS,
        fix="use a number above 0, such as 3, or leave it out",
    )
    sampling_correction_min: Positive | None = own(
        None,
        "Smallest weight, of the masks. None: no bound.",
        CORRECTIONS,
        fix="use a number above 0, such as 0.5, or leave it out",
    )
    off_policy_mask_threshold: Positive | None = own(
        None,
        "Leave a completion of negative advantage out of the surrogate where its mean log(sampled / present "
        "probability), in nats a token, exceeds this (2512.02556). None: keep all.",
        CORRECTIONS,
        fix="use nats a token above 0, such as 0.5, or leave it out",
    )

    def contradictions(self) -> Iterator[str]:
        yield from self._clip_contradictions()
        if self.use_adaptive_entropy:
            coef, low, high = self.entropy_coef, self.entropy_coef_min, self.entropy_coef_max
            if low >= high:
                yield f"entropy_coef_min = {low!r}: not below entropy_coef_max = {high!r}; use a smaller one."
            elif not low <= coef <= high:
                yield (
                    f"entropy_coef = {coef!r} with use_adaptive_entropy = True: an adaptive weight starts between "
                    f"entropy_coef_min = {low!r} and entropy_coef_max = {high!r}; use a number there."
                )
        yield from self._kl_contradictions()
        yield from self._correction_contradictions()
        yield from super().contradictions()
        accumulation, asked = self.gradient_accumulation_steps, self.steps_per_generation
        if self.num_iterations > 1 and asked is not None and asked < accumulation:
            yield (
                f"steps_per_generation = {asked} with num_iterations = {self.num_iterations}: a round of sampling "
                "would be gone through again within one optimizer step, of gradient_accumulation_steps = "
                f"{accumulation}; use a multiple of {accumulation}, or num_iterations = 1."
            )

    def _clip_contradictions(self) -> Iterator[str]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and high <= 1:
            yield (
                f"epsilon_high = {high!r} with loss_type cispo: it bounds the ratio itself, and below 1 scales every "
                "gradient down; use 5.0, as the paper does."
            )
        if self.loss_type != "cispo" and high >= 1:
            yield f"epsilon_high = {high!r}: the ratio could double; use a number below 1 (5.0 is cispo's bound)."
        if self.delta is not None and self.delta <= 1 + high:
            yield f"delta = {self.delta!r}: inside the clip range; use more than 1 + epsilon_high = {1 + high:g}."
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo"):
            yield f"delta = {self.delta!r} with loss_type {self.loss_type}: it has no clip to bound; remove it."
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            yield "importance_sampling_level with loss_type luspo: its ratio is the sequence's; use sequence."
        if self.loss_type == "vespo" and self.importance_sampling_level != "token":
            yield (
                f"importance_sampling_level = {self.importance_sampling_level!r} with loss_type vespo: it makes the "
                "sequence's ratio of the tokens' by itself; use token."
            )

    def _kl_contradictions(self) -> Iterator[str]:
        if self.kl_in == "reward" and self.use_bias_correction_kl:
            yield "use_bias_correction_kl = True with kl_in = 'reward': a reward has no gradient to correct; remove it."
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.use_bias_correction_kl is False:
            yield (
                "kl_estimator = 'k1' with use_bias_correction_kl = False: the gradient of k1 alone is 0 on average, so "
                "nothing pulls towards the reference; use k2 or k3, or kl_in = 'reward'."
            )
        if self.kl_target is not None and self.beta == 0:
            yield "kl_target with beta = 0: an adaptive beta needs a value to start from, such as 0.05."

    def _correction_contradictions(self) -> Iterator[str]:
        kind, low, high = self.sampling_correction, self.sampling_correction_min, self.sampling_correction_max
        if kind is None:
            return
        if self.loss_type == "vespo" and kind.startswith("sequence"):
            yield (
                f"sampling_correction = {kind!r} with loss_type vespo: weights of tokens become part of the sequence's "
                "ratio; use token_truncate or token_mask."
            )
        if kind.endswith("truncate") and high is None:
            yield f"sampling_correction_max = None with {kind}: nothing is truncated; use a number such as 3."
        if kind.endswith("truncate") and low is not None:
            yield f"sampling_correction_min = {low!r} with {kind}: only masks have a lower bound; remove it."
        if low is not None and high is not None and low >= high:
            yield f"sampling_correction_min = {low!r}: not below sampling_correction_max = {high!r}; use a smaller one."


@stage(
    "GRPO",
    summary="train on rewards: sample groups of completions, score them, follow the better ones",
    method="group relative policy optimisation",
    paper="2402.03300",
    rows="prompts",
)
@dataclass
class GRPOFields(PolicyFields):
    """Own fields of GRPO and its family."""

    kind: ClassVar[str] = "grpo"

    advantage_estimator: Annotated[str, one_of(ADVANTAGE_NAMES)] = own(
        "group",
        "How rewards become advantages: group (minus the group's mean), leave_one_out (minus the mean of the others), "
        "batch (whitened over the batch), group_batch (minus the group's mean, then whitened), mean_normalized (minus "
        "and over the group's mean).",
        REWARDS,
    )
    scale_rewards: Literal["group", "batch", "none"] | bool = own(
        "group",
        "What centred rewards are divided by: the group's std, the batch's std (batch), or nothing (none).",
        REWARDS,
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = own(
        "sum_then_normalize",
        "With several rewards: sum_then_normalize, or normalize_then_sum, which scales each within its group and "
        "whitens the sum over the batch (GDPO, 2601.05242).",
        REWARDS,
    )
    sapo_temperature_neg: Positive = own(1.05, "Steepness of sapo's gate where the advantage is not positive.", LOSS)
    sapo_temperature_pos: Positive = own(1.0, "Steepness of sapo's gate where the advantage is positive.", LOSS)
    vespo_k_pos: NonNegative = own(
        2.0, "Power of the sequence's ratio in vespo's weight where the advantage is at least 0.", LOSS
    )
    vespo_lambda_pos: Positive = own(
        3.0, "Decay of vespo's weight with the ratio where the advantage is at least 0.", LOSS
    )
    vespo_k_neg: NonNegative = own(
        3.0, "Power of the sequence's ratio in vespo's weight where the advantage is negative.", LOSS
    )
    vespo_lambda_neg: Positive = own(
        2.0, "Decay of vespo's weight with the ratio where the advantage is negative.", LOSS
    )

    def contradictions(self) -> Iterator[str]:
        if self.multi_objective_aggregation == "normalize_then_sum":
            if self.advantage_estimator != "group":
                yield (
                    "multi_objective_aggregation = 'normalize_then_sum' with advantage_estimator "
                    f"{self.advantage_estimator}: use group."
                )
            of_the_sum = {
                f"kl_in = {self.kl_in!r}": self.kl_in == "reward" and self.beta > 0,
                f"reward_clip_range = {self.reward_clip_range!r}": self.reward_clip_range is not None,
                f"overlong_buffer = {self.overlong_buffer!r}": self.overlong_buffer is not None,
            }
            yield from (
                f"{setting} with multi_objective_aggregation = 'normalize_then_sum': it changes the sum of the "
                "rewards, which that scale does not read; remove one of the two."
                for setting, is_set in of_the_sum.items()
                if is_set
            )
        yield from super().contradictions()


@stage(
    "RLOO",
    summary="the same with the mean of the other samples as baseline",
    method="REINFORCE leave-one-out",
    paper="2402.14740",
    rows="prompts",
)
@dataclass
class RLOOFields(GRPOFields):
    """Own fields of RLOO: GRPO's with other defaults."""

    kind: ClassVar[str] = "rloo"

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own("rloo", "rloo: a row of the algorithm table.", LOSS)
    num_generations: AtLeastTwo = own(
        2,
        "Completions per prompt, G; at least 2.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    beta: NonNegative = own(
        0.05, "Weight of the KL divergence from the reference in the reward. 0: no reference is held.", REFERENCE
    )
    normalize_advantages: bool = own(False, "Whiten the advantages over the batch.", REWARDS)

    def contradictions(self) -> Iterator[str]:
        if self.normalize_advantages and self.scale_rewards not in ("none", "batch"):
            yield f"normalize_advantages = True with scale_rewards = {self.scale_rewards!r}: set one of them."
        yield from super().contradictions()


@stage(
    "PPO",
    summary="the same with a critic that says how good each token was",
    method="proximal policy optimisation",
    paper="1707.06347",
    rows="prompts",
)
@dataclass
class PPOFields(PolicyFields):
    """Own fields of PPO. Names of TRL's PPOConfig that differ are understood: see ALIASES."""

    kind: ClassVar[str] = "ppo"

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own("ppo", "ppo: a row of the algorithm table.", LOSS)
    num_generations: Count = own(1, "Completions per prompt.", SAMPLING, resume="refused")
    num_iterations: Count = own(4, "Passes over each round of samples (num_ppo_epochs).", LOSS, resume="refused")
    beta: NonNegative = own(
        0.05, "Weight of the KL divergence from the reference in the reward (kl_coef). 0: none is held.", REFERENCE
    )
    kl_estimator: Literal["k1", "k2", "k3"] = own(
        "k1", "Estimate of the KL divergence from a token: k1, k2 or k3.", REFERENCE
    )
    kl_in: Literal["loss", "reward"] = own(
        "reward", "Where the KL divergence counts: in each token's reward, or in the loss.", REFERENCE
    )
    gamma: Fraction = own(1.0, "Discount of later rewards.", CRITIC)
    lam: Fraction = own(
        0.95, "lambda of generalised advantage estimation: 1 sums rewards, 0 trusts the critic.", CRITIC
    )
    vf_coef: Positive = own(0.1, "Weight of the critic's loss.", CRITIC)
    cliprange_value: Positive | None = own(
        0.2, "Clip range of the critic's values around their old ones. None: no clip.", CRITIC
    )
    value_learning_rate: NonNegative | None = own(None, "Learning rate of the critic. None: learning_rate.", CRITIC)
    value_prefit_steps: Natural = own(0, "Optimizer steps, first of all, in which only the critic learns.", CRITIC)
    whiten_rewards: bool = own(
        False, "Scale the rewards of tokens to a standard deviation of 1, keeping their mean.", REWARDS
    )
    whiten_advantages: bool = own(True, "Whiten the advantages over all tokens of a round of samples.", REWARDS)
    missing_eos_penalty: NonNegative | None = own(
        None, "Subtracted from the reward of a completion without end. None: nothing is.", REWARDS
    )
