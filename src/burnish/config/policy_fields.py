"""Configuration fields of the policy gradient stages."""

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
    Proportion,
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
    """Fields of every policy gradient stage."""

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own(
        None,
        "Name in the algorithm table, which sets the fields that define the algorithm and the defaults of others. "
        "None: no field is changed.",
        LOSS,
    )
    num_iterations: Count = own(1, "Passes over each rollout.", LOSS, resume="refused")
    loss_type: Annotated[str, one_of(LOSS_NAMES)] = own(
        "dapo",
        "Surrogate and its reduction, with global denominators: grpo (mean per sequence, then over sequences), bnpo "
        "and dapo (over all scored tokens), dr_grpo (over num_completions x max_completion_length) and luspo (sum per "
        "sequence, mean over sequences) clip the ratio; cispo, sapo and vespo weight it.",
        LOSS,
    )
    beta: NonNegative = own(
        0.0,
        "Coefficient of the KL divergence from the reference model. 0: no reference.",
        REFERENCE,
        fix="use a finite number of at least 0; 0 trains without a reference",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = own(
        "k3", "Estimator of the KL divergence per token: k1, k2 or k3.", REFERENCE
    )
    kl_in: Literal["loss", "reward"] = own("loss", "Where the KL term is added: loss or reward.", REFERENCE)
    use_bias_correction_kl: bool | None = own(
        None,
        "Multiply the KL estimate in the loss by the importance ratio, so its gradient is that of the divergence "
        "(2512.02556). None: true for k1 and k3, while k2 has that gradient by itself.",
        REFERENCE,
    )
    kl_target: Positive | None = own(
        None,
        "Target divergence in nats per completion of an adaptive beta (1909.08593). None: beta is constant.",
        REFERENCE,
        fix="use a number of nats above 0, or leave it out",
    )
    kl_horizon: Count = own(10000, "Time scale, in completions, of an adaptive beta.", REFERENCE)
    epsilon: Annotated[float, Interval(gt=0, lt=1)] = own(
        0.2, "Lower clip range of the ratio.", LOSS, fix="use a number in (0, 1), such as 0.2"
    )
    epsilon_high: Positive | None = own(
        None,
        "Upper clip range of the ratio; for cispo, the bound of the ratio itself, such as 5. None: epsilon.",
        LOSS,
        fix="use a number above 0, such as 0.28, or leave it out",
    )
    delta: Annotated[float, Gt(1)] | None = own(
        None,
        "Upper bound of the ratio at negative advantages (two-sided or dual clipping). None: no bound.",
        LOSS,
        fix="it bounds a ratio: use a number above 1 + epsilon, or leave it out",
    )
    importance_sampling_level: Literal["token", "sequence", "sequence_token", "product"] = own(
        "token",
        "Importance ratio of each token (token), or of the sequence: its geometric mean (sequence, as in GSPO; "
        "sequence_token, with a gradient per token) or its product (product, as in RLOO).",
        LOSS,
    )
    entropy_coef: float = own(
        0.0,
        "Coefficient of the entropy bonus, a mean over the step's tokens; the initial one of use_adaptive_entropy. 0: "
        "no bonus.",
        ENTROPY,
    )
    use_adaptive_entropy: bool = own(
        False,
        "After every optimizer step, raise entropy_coef by entropy_coef_delta if the mean entropy is at most "
        "entropy_target, else lower it (2505.22312). The bonus only applies after a step at or below the target.",
        ENTROPY,
    )
    entropy_target: Positive = own(
        0.2,
        "Mean token entropy, in nats, that use_adaptive_entropy maintains.",
        ENTROPY,
        fix="use a number of nats above 0, such as 0.2",
    )
    entropy_coef_delta: Positive = own(0.005, "Change of an adaptive entropy_coef per optimizer step.", ENTROPY)
    entropy_coef_min: NonNegative = own(0.0, "Lower bound of an adaptive entropy_coef.", ENTROPY)
    entropy_coef_max: Positive = own(1.0, "Upper bound of an adaptive entropy_coef.", ENTROPY)
    top_entropy_quantile: Proportion = own(
        1.0,
        "Fraction of the step's tokens, those of highest entropy, that the policy loss keeps (2506.01939). 1: all "
        "tokens.",
        LOSS,
        fix="use a number in (0, 1]; 1 keeps every token",
    )
    reward_clip_range: Annotated[list[float], Meets(_interval)] | None = own(
        None, "Lowest and highest reward, to which others are clipped. None: no clipping.", REWARDS
    )
    max_staleness: Natural = own(
        0,
        "Rollouts that sampling runs ahead of training: servers sample while earlier samples train, with weights that "
        "are at most this many rollouts old. Samples are then weighted by token_truncate unless sampling_correction "
        "says otherwise. 0: sample, then train.",
        SAMPLING,
    )
    sampling_correction: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = own(
        None,
        "Weight samples by the ratio of trainer to sampler probabilities: token_truncate, token_mask (IcePop, with "
        "bounds 0.5 and 5), sequence_truncate or sequence_mask; a sampler mismatch is then reported and does not stop "
        "the run. None: no weights.",
        CORRECTIONS,
    )
    sampling_correction_max: Positive | None = own(
        3.0,
        "Largest weight, above which samples are truncated or masked. None: no bound.",
        CORRECTIONS,
        fix="use a number above 0, such as 3, or leave it out",
    )
    sampling_correction_min: Positive | None = own(
        None,
        "Smallest weight, below which samples are masked. None: no bound.",
        CORRECTIONS,
        fix="use a number above 0, such as 0.5, or leave it out",
    )
    off_policy_mask_threshold: Positive | None = own(
        None,
        "Exclude a completion with negative advantage from the surrogate if its mean log(sampled / current "
        "probability), in nats per token, exceeds this (2512.02556). None: keep all.",
        CORRECTIONS,
        fix="use nats per token above 0, such as 0.5, or leave it out",
    )

    @property
    def staleness_bound(self) -> int:
        """Rollouts that sampling may run ahead of training."""
        return self.max_staleness

    @property
    def correction(self) -> str | None:
        """Kind of the weights of samples: that of `sampling_correction`, or token_truncate for stale samples."""
        return self.sampling_correction or ("token_truncate" if self.max_staleness else None)

    def contradictions(self) -> Iterator[str]:
        yield from self._clip_contradictions()
        if self.use_adaptive_entropy:
            coef, low, high = self.entropy_coef, self.entropy_coef_min, self.entropy_coef_max
            if low >= high:
                yield f"entropy_coef_min = {low!r}: not below entropy_coef_max = {high!r}; use a smaller one."
            elif not low <= coef <= high:
                yield (
                    f"entropy_coef = {coef!r} with use_adaptive_entropy = True: use an initial value between "
                    f"entropy_coef_min = {low!r} and entropy_coef_max = {high!r}."
                )
        yield from self._kl_contradictions()
        yield from self._correction_contradictions()
        yield from self._staleness_contradictions()
        yield from super().contradictions()
        accumulation, asked = self.gradient_accumulation_steps, self.steps_per_generation
        if self.num_iterations > 1 and asked is not None and asked < accumulation:
            yield (
                f"steps_per_generation = {asked} with num_iterations = {self.num_iterations}: one optimizer step of "
                f"gradient_accumulation_steps = {accumulation} would repeat its samples; use a multiple of "
                f"{accumulation}, or num_iterations = 1."
            )

    def _clip_contradictions(self) -> Iterator[str]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and high <= 1:
            yield (
                f"epsilon_high = {high!r} with loss_type cispo: it bounds the ratio itself, and at most 1 scales down "
                "every gradient; use 5.0, as in the paper."
            )
        if self.loss_type != "cispo" and high >= 1:
            yield f"epsilon_high = {high!r}: allows ratios up to {1 + high:g}; use a number below 1 (5.0 is for cispo)."
        if self.delta is not None and self.delta <= 1 + high:
            yield f"delta = {self.delta!r}: inside the clip range; use more than 1 + epsilon_high = {1 + high:g}."
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo"):
            yield f"delta = {self.delta!r} with loss_type {self.loss_type}, which does not clip: remove it."
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            yield (
                f"importance_sampling_level = {self.importance_sampling_level!r} with loss_type luspo: its ratio is "
                "that of the sequence; use sequence."
            )
        if self.loss_type == "vespo" and self.importance_sampling_level != "token":
            yield (
                f"importance_sampling_level = {self.importance_sampling_level!r} with loss_type vespo, which computes "
                "the sequence's ratio itself: use token."
            )

    def _kl_contradictions(self) -> Iterator[str]:
        if self.kl_in == "reward" and self.use_bias_correction_kl:
            yield "use_bias_correction_kl = True with kl_in = 'reward': a reward has no gradient to correct; remove it."
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.use_bias_correction_kl is False:
            yield (
                "kl_estimator = 'k1' with use_bias_correction_kl = False: the mean gradient of k1 alone is 0; use k2 "
                "or k3, or kl_in = 'reward'."
            )
        if self.kl_target is not None and self.beta == 0:
            yield f"kl_target = {self.kl_target!r} with beta = 0: set the initial value of beta, such as 0.05."

    def _correction_contradictions(self) -> Iterator[str]:
        kind, low, high = self.correction, self.sampling_correction_min, self.sampling_correction_max
        if kind is None:
            return
        if self.loss_type == "vespo" and kind.startswith("sequence"):
            yield (
                f"sampling_correction = {kind!r} with loss_type vespo, whose sequence ratio only takes weights of "
                "tokens: use token_truncate or token_mask."
            )
        if kind.endswith("truncate") and high is None:
            yield f"sampling_correction_max = None with {kind}: nothing is truncated; use a number such as 3."
        if kind.endswith("truncate") and low is not None:
            yield f"sampling_correction_min = {low!r} with {kind}: only masks have a lower bound; remove it."
        if low is not None and high is not None and low >= high:
            yield f"sampling_correction_min = {low!r}: not below sampling_correction_max = {high!r}; use a smaller one."

    def _staleness_contradictions(self) -> Iterator[str]:
        if not (self.max_staleness and self.use_vllm and self.temperature != 1):
            return
        whole = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k or 0, 0), "min_p": (self.min_p or 0.0, 0.0)}
        whole["repetition_penalty"] = (self.repetition_penalty, 1.0)
        for name, (value, default) in whole.items():
            if value != default:
                yield (
                    f"{name} = {value!r} with max_staleness = {self.max_staleness} and temperature = "
                    f"{self.temperature}: a server's log-probabilities before truncation, by which stale samples are "
                    f"weighted, are those of temperature 1; use {default!r}, or a temperature of 1."
                )


_TURN_CREDIT = (
    "Credit a turn of an episode with the rewards that follow it only, where criteria or the environment reward single "
    "turns. GRPO and RLOO compare a turn with the turns of the same number of the other episodes; PPO places the "
    "reward of a turn on the turn's last token."
)


@stage(
    "GRPO",
    summary="train on rewards: sample groups of completions and reinforce the better ones of each group",
    method="group relative policy optimisation",
    paper="2402.03300",
    rows="prompts",
)
@dataclass
class GRPOFields(PolicyFields):
    """Fields of GRPO and its family."""

    kind: ClassVar[str] = "grpo"

    advantage_estimator: Annotated[str, one_of(ADVANTAGE_NAMES)] = own(
        "group",
        "Advantages from rewards: group (group mean subtracted), leave_one_out (mean of the others subtracted), batch "
        "(whitened over the batch), group_batch (group mean subtracted, then whitened) or mean_normalized (group mean "
        "subtracted and divided by).",
        REWARDS,
    )
    turn_credit: bool = own(False, _TURN_CREDIT, REWARDS)
    scale_rewards: Literal["group", "batch", "none"] | bool = own(
        "group",
        "Divisor of centred rewards: standard deviation of the group (group) or of the batch (batch), or 1 (none).",
        REWARDS,
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = own(
        "sum_then_normalize",
        "Aggregation of several rewards: sum_then_normalize, or normalize_then_sum, which scales each within its group "
        "and whitens the sum over the batch (GDPO, 2601.05242).",
        REWARDS,
    )
    sapo_temperature_neg: Positive = own(1.05, "Steepness of sapo's gate at advantages of at most 0.", LOSS)
    sapo_temperature_pos: Positive = own(1.0, "Steepness of sapo's gate at positive advantages.", LOSS)
    vespo_k_pos: NonNegative = own(
        2.0, "Power of the sequence ratio in vespo's weight at advantages of at least 0.", LOSS
    )
    vespo_lambda_pos: Positive = own(
        3.0, "Decay of vespo's weight with the sequence ratio at advantages of at least 0.", LOSS
    )
    vespo_k_neg: NonNegative = own(3.0, "Power of the sequence ratio in vespo's weight at negative advantages.", LOSS)
    vespo_lambda_neg: Positive = own(
        2.0, "Decay of vespo's weight with the sequence ratio at negative advantages.", LOSS
    )

    def contradictions(self) -> Iterator[str]:
        if self.turn_credit and (self.multi_objective_aggregation == "normalize_then_sum" or self.kl_in == "reward"):
            yield (
                "turn_credit = True needs the rewards of turns as they are: remove multi_objective_aggregation = "
                '"normalize_then_sum" and kl_in = "reward", or turn_credit.'
            )
        if self.multi_objective_aggregation == "normalize_then_sum":
            if self.advantage_estimator != "group":
                yield (
                    "multi_objective_aggregation = 'normalize_then_sum' with advantage_estimator = "
                    f"{self.advantage_estimator!r}: use group."
                )
            changes_sum = {
                f"kl_in = {self.kl_in!r}": self.kl_in == "reward" and self.beta > 0,
                f"reward_clip_range = {self.reward_clip_range!r}": self.reward_clip_range is not None,
                f"overlong_buffer = {self.overlong_buffer!r}": self.overlong_buffer is not None,
            }
            yield from (
                f"{setting} with multi_objective_aggregation = 'normalize_then_sum', which scales each reward and not "
                "their sum: remove one of the two."
                for setting, is_set in changes_sum.items()
                if is_set
            )
        yield from super().contradictions()


@stage(
    "RLOO",
    summary="train on rewards, with the mean reward of the other samples as baseline",
    method="REINFORCE leave-one-out",
    paper="2402.14740",
    rows="prompts",
)
@dataclass
class RLOOFields(GRPOFields):
    """Fields of RLOO: GRPO's with other defaults."""

    kind: ClassVar[str] = "rloo"

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own("rloo", "Name in the algorithm table.", LOSS)
    num_generations: AtLeastTwo = own(
        2,
        "Completions per prompt, G.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    beta: NonNegative = own(
        0.05, "Coefficient of the KL divergence from the reference in the reward. 0: no reference.", REFERENCE
    )
    normalize_advantages: bool = own(False, "Whiten the advantages over the batch.", REWARDS)

    def contradictions(self) -> Iterator[str]:
        if self.normalize_advantages and self.scale_rewards not in ("none", "batch"):
            yield f"normalize_advantages = True with scale_rewards = {self.scale_rewards!r}: set only one of them."
        yield from super().contradictions()


@stage(
    "PPO",
    summary="train on rewards, with a critic that estimates the advantage of each token",
    method="proximal policy optimisation",
    paper="1707.06347",
    rows="prompts",
)
@dataclass
class PPOFields(PolicyFields):
    """Fields of PPO; `burnish.config.compat.ALIASES` maps names of TRL's PPOConfig to them."""

    kind: ClassVar[str] = "ppo"

    algorithm: Annotated[str, one_of(ALGORITHMS)] | None = own("ppo", "Name in the algorithm table.", LOSS)
    num_generations: Count = own(1, "Completions per prompt.", SAMPLING, resume="refused")
    num_iterations: Count = own(4, "Passes over each rollout (num_ppo_epochs).", LOSS, resume="refused")
    beta: NonNegative = own(
        0.05, "Coefficient of the KL divergence from the reference in the reward (kl_coef). 0: no reference.", REFERENCE
    )
    kl_estimator: Literal["k1", "k2", "k3"] = own(
        "k1", "Estimator of the KL divergence per token: k1, k2 or k3.", REFERENCE
    )
    kl_in: Literal["loss", "reward"] = own(
        "reward", "Where the KL term is added: reward (of each token) or loss.", REFERENCE
    )
    gamma: Fraction = own(1.0, "Discount factor.", CRITIC)
    lam: Fraction = own(
        0.95,
        "lambda of generalised advantage estimation: 1 uses returns only, 0 one-step values of the critic.",
        CRITIC,
    )
    vf_coef: Positive = own(0.1, "Coefficient of the critic's loss.", CRITIC)
    cliprange_value: Positive | None = own(
        0.2, "Clip range of the critic's values around their old values. None: no clipping.", CRITIC
    )
    value_learning_rate: NonNegative | None = own(None, "Learning rate of the critic. None: learning_rate.", CRITIC)
    value_prefit_steps: Natural = own(0, "Optimizer steps at the start that train only the critic.", CRITIC)
    turn_credit: bool = own(True, _TURN_CREDIT, REWARDS)
    whiten_rewards: bool = own(False, "Scale token rewards to a standard deviation of 1, keeping their mean.", REWARDS)
    whiten_advantages: bool = own(True, "Whiten the advantages over all tokens of a rollout.", REWARDS)
    missing_eos_penalty: NonNegative | None = own(
        None, "Penalty subtracted from the reward of a completion without EOS. None: no penalty.", REWARDS
    )

    def contradictions(self) -> Iterator[str]:
        if self.stop_settled and self.missing_eos_penalty:
            yield (
                f"stop_settled = True with missing_eos_penalty = {self.missing_eos_penalty!r}: whether a completion "
                "would have ended by itself is unknown once it is stopped; remove one of the two."
            )
        yield from super().contradictions()
