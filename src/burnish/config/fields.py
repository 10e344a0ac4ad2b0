"""burnish's own configuration fields; the trainers' configs add those of transformers.TrainingArguments.

Names, meanings and defaults are TRL's where both mean the same; each help text says where they do not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

from burnish.config.inherited import FieldInfo, training_argument_fields
from burnish.config.refused import Kind
from burnish.config.rules import check_values

__all__ = [
    "CommonFields",
    "DPOFields",
    "GRPOFields",
    "KTOFields",
    "OnlineDPOFields",
    "PPOFields",
    "RLOOFields",
    "RewardFields",
    "SFTFields",
    "known_fields",
    "stages_with",
]

T = TypeVar("T")


def _own(default: T, text: str) -> T:
    return field(default=default, metadata={"help": text})  # pyright: ignore[reportReturnType]


_CHAT_TEMPLATE = (
    "A .jinja file, Jinja source, a tokenizer's folder (its EOS token is taken over too), or chatml; saved with the "
    "tokenizer, for later stages. None: the tokenizer's own."
)


@dataclass
class CommonFields:
    """Fields of every stage. Inherit it before `transformers.TrainingArguments`, so that its defaults win."""

    kind: ClassVar[Kind]

    model_init_kwargs: dict[str, Any] | None = _own(
        None, "Arguments of from_pretrained, used when the model is given by name or path."
    )
    trust_remote_code: bool = _own(False, "Run code that a model's repository brings, as model_init_kwargs would.")
    token_budget: int | None = _own(
        None,
        "Most tokens of one forward and backward, prompts counted once per group. A micro-batch above it runs in "
        "several parts with the same gradient; a group that is larger is cut between completions, a longer completion "
        "runs alone. None: 2,048 on a CPU, 16,384 elsewhere.",
    )
    bf16: bool | None = _own(
        None, "Compute in bf16 with fp32 master weights. None: yes where the hardware is fast at it."
    )
    resume_from_checkpoint: str | bool | None = _own(
        None,
        "Continue from this checkpoint folder; true: from the latest whole one in output_dir, or from the start "
        "where it has none.",
    )
    overwrite_output_dir: bool = _own(
        False,
        "Before a run that resumes nothing, delete the checkpoints, metrics and transcripts that an earlier one wrote "
        "into output_dir; without it such a folder is refused.",
    )
    progress: bool = _own(True, "Show live progress, metrics and rates in the terminal.")
    max_dead_steps: int | None = _own(
        20,
        "Stop after so many optimizer steps in a row that teach nothing: no reward differs or every one failed, every "
        "completion is cut and masked, nothing is in the loss, the gradient is zero, or the loss is far above its "
        "start. A run that has learned goes on where it may be done. 0 or None: only warn.",
    )
    log_metrics: bool | str = _own(
        True,
        "Write every log as a line of metrics.jsonl, and environment.json (versions and hardware) beside it: into "
        "output_dir, or into the folder named here.",
    )
    logging_first_step: bool = _own(True, "Log the first step too, so that the shortest run has metrics.")
    logging_steps: float = _own(10, "Log every so many optimizer steps; below 1 it is a share of all steps.")
    logging_nan_inf_filter: bool = _own(False, "Always off: a NaN in the log should be seen.")
    remove_unused_columns: bool = _own(False, "Always off: rewards and formats need the data set's columns.")

    def check(self) -> None:
        """Check every value and every combination; the trainers' configs call it before anything else.

        Raises:
            ConfigError: a bad value, a contradiction, or an inherited field that the trainer cannot honour.
        """
        check_values(self.kind, vars(self))


@dataclass
class SFTFields(CommonFields):
    """Own fields of supervised fine-tuning."""

    kind: ClassVar[Kind] = "sft"

    learning_rate: float = _own(2e-5, "Peak learning rate.")
    max_length: int | None = _own(1024, "Longest sequence in tokens; see truncation_mode. None: no limit.")
    truncation_mode: str = _own(
        "keep_start",
        "What becomes of a sequence above max_length: keep_start, keep_end, drop (the row is left out) or split (a "
        "text becomes several sequences).",
    )
    dataset_text_field: str = _own("text", "Column of plain text, for language modelling rows.")
    chat_template: str | None = _own(None, _CHAT_TEMPLATE)
    eos_token: str | None = _own(None, "Token that ends a turn, where it is not the tokenizer's own.")
    completion_only_loss: bool | None = _own(
        None, "Loss on the completion only. None: yes for prompt-completion rows, no for plain text."
    )
    assistant_only_loss: bool = _own(False, "Loss on the assistant's turns of a conversation only.")
    loss_type: str = _own(
        "nll",
        "The loss, a mean over all scored tokens of the global batch: nll, or dft (2508.05629), which weights each "
        "token by its own probability.",
    )


@dataclass
class RewardFields(CommonFields):
    """Own fields of reward modelling."""

    kind: ClassVar[Kind] = "reward"

    learning_rate: float = _own(1e-4, "Peak learning rate.")
    max_length: int | None = _own(
        1024, "Longest sequence in tokens; rows with a longer one are left out, and counted. None: no limit."
    )
    eos_token: str | None = _own(None, "Token that ends a turn, where it is not the tokenizer's own.")
    pad_token: str | None = _own(
        None,
        "Token that pads when transformers runs the saved model; a score is read at the last token that is another "
        "one, so before EOS where EOS pads. None: the tokenizer's own, else EOS.",
    )
    step_separator: str = _own("\n", "Text that ends every step of rows with step labels; their scores are read there.")
    chat_template: str | None = _own(None, _CHAT_TEMPLATE)
    disable_dropout: bool = _own(True, "Train without dropout, in the model and in adapters.")
    center_rewards_coefficient: float | None = _own(
        None, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0, such as 0.01. None: no such term."
    )


@dataclass
class _ReferenceFields(CommonFields):
    """Fields of the stages that compare a policy with a reference on a data set."""

    learning_rate: float = _own(1e-6, "Peak learning rate.")
    max_length: int | None = _own(1024, "Longest sequence in tokens; the rest is cut off. None: no limit.")
    chat_template: str | None = _own(None, _CHAT_TEMPLATE)
    disable_dropout: bool = _own(True, "Train without dropout, in the model and in adapters.")
    beta: float = _own(0.1, "Strength of the pull towards the reference.")
    precompute_ref_log_probs: bool = _own(
        False, "Score the whole data set with the reference before training, once, and keep the result on disk."
    )
    sync_ref_model: bool = _own(False, "Move the reference towards the policy during training (TR-DPO, 2404.09656).")
    ref_model_mixup_alpha: float = _own(0.6, "Share of the policy in each move of the reference; 1 replaces it.")
    ref_model_sync_steps: int = _own(512, "Optimizer steps between moves of the reference.")


@dataclass
class DPOFields(_ReferenceFields):
    """Own fields of DPO and its family."""

    kind: ClassVar[Kind] = "dpo"

    loss_type: str | list[str] = _own(
        "sigmoid", "One or several rows of burnish.objectives.preference.PREFERENCE_LOSSES; several add up."
    )
    loss_weights: list[float] | None = _own(None, "One weight per loss_type. None: 1 each.")
    label_smoothing: float = _own(0.0, "Assumed share of pairs whose label is wrong, below 0.5.")
    f_divergence_type: str = _own(
        "reverse_kl",
        "What regularises towards the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence.",
    )
    f_alpha_divergence_coef: float = _own(0.5, "alpha of the alpha-divergence.")
    simpo_gamma: float = _own(0.5, "Target margin of simpo and alphapo.")
    alpha: float = _own(0.25, "alpha of alphapo; towards 0 it is simpo.")
    discopop_tau: float = _own(0.05, "Temperature of discopop's blend.")
    ld_alpha: float | None = _own(
        None, "Weight of the tokens beyond the shorter completion of a pair, in [0, 1] (LD-DPO). None: 1."
    )
    use_weighting: bool = _own(False, "Weight pairs by how likely the policy itself would write them (WPO).")


@dataclass
class KTOFields(_ReferenceFields):
    """Own fields of KTO."""

    kind: ClassVar[Kind] = "kto"

    loss_type: str = _own("kto", "kto, or apo_zero_unpaired, which needs no KL estimate.")
    desirable_weight: float = _own(1.0, "Weight of completions labelled true.")
    undesirable_weight: float = _own(1.0, "Weight of completions labelled false.")


@dataclass
class _OnlineFields(CommonFields):
    """Fields of the stages that sample, score and learn from their own completions."""

    learning_rate: float = _own(1e-6, "Peak learning rate.")
    num_generations: int = _own(8, "Completions per prompt, G; at least 2.")
    num_generations_eval: int | None = _own(None, "Completions per prompt in evaluation. None: num_generations.")
    steps_per_generation: int | None = _own(
        None,
        "Micro-batches that one round of sampling feeds. None: gradient_accumulation_steps, "
        "so every optimizer step samples afresh; so do its divisors.",
    )
    max_prompt_length: int | None = _own(
        None, "Longest prompt in tokens; a row with a longer one is left out and counted, never cut. None: no limit."
    )
    max_completion_length: int = _own(512, "Most tokens of one completion.")
    temperature: float = _own(1.0, "Sampling temperature, also that of the trained distribution; above 0.")
    top_p: float = _own(1.0, "Sample from the smallest set of tokens with this probability. 1: all.")
    top_k: int = _own(0, "Sample from the k most likely tokens. 0: all.")
    min_p: float | None = _own(None, "Sample from tokens at least this fraction as likely as the likeliest. None: all.")
    repetition_penalty: float = _own(
        1.0,
        "Logits of tokens in the prompt or the completion so far are divided by it, or multiplied where negative, when "
        "a completion is sampled (1909.05858). The loss is that of the policy without it; see sampling_correction.",
    )
    stop: list[str] | None = _own(None, "Strings that end a completion.")
    chat_template: str | None = _own(None, _CHAT_TEMPLATE)
    chat_template_kwargs: dict[str, Any] | None = _own(None, "Extra arguments of the chat template.")
    disable_dropout: bool = _own(True, "Always on: samples are drawn without dropout, so they are trained on so too.")
    shuffle_dataset: bool = _own(True, "Draw prompts in a new order each epoch.")
    reward_weights: list[float] | None = _own(None, "One weight per reward. None: 1 each, or the rubric's own.")
    mask_truncated_completions: bool = _own(False, "Leave completions that hit the token limit out of the loss.")
    overlong_buffer: float | None = _own(
        None,
        "Tokens before max_completion_length, or below 1 a share of it, over which a punishment grows (DAPO, "
        "2503.14476). None: no punishment.",
    )
    overlong_penalty: float = _own(1.0, "The punishment at max_completion_length.")
    dynamic_sampling: bool = _own(
        False, "Replace groups whose rewards are all equal by new ones, so that every group of a step has a gradient."
    )
    max_sampling_rounds: int = _own(
        10, "Rounds of sampling for one batch with dynamic_sampling; then groups without spread fill it."
    )
    replay_size: int = _own(
        0,
        "Groups with spread that are remembered, to stand in for new ones without; their ratios are clipped. 0: none.",
    )
    prompt_sampling: str = _own(
        "permutation",
        "How prompts are drawn: permutation (each once an epoch), weighted (by the column weight), or curriculum (near "
        "a difficulty, of the column difficulty, that follows the mean reward).",
    )
    curriculum_target: float = _own(
        0.5, "Mean reward at which the curriculum's difficulty stays; above it rises, below it falls."
    )
    logprob_check_bound: float | None = _own(
        None,
        "Largest KL(sampler || trainer) of fresh samples, in nats a token over the last 2,048 tokens; the run stops "
        "above it, and where log-probabilities of a step differ by more than its square root on average. None: 1e-6, "
        "or 0.01 where the model computes in bf16.",
    )
    log_completions: bool | str = _own(
        False, "Write every completion with its scores as JSON lines: into output_dir, or into the folder named here."
    )


@dataclass
class _PolicyFields(_OnlineFields):
    """Fields of the stages that follow a policy gradient."""

    algorithm: str | None = _own(
        None,
        "A row of the algorithm table: it sets the fields that define it, and starting values of others. None: the "
        "fields as they are.",
    )
    num_iterations: int = _own(1, "Passes over each round of samples.")
    loss_type: str = _own(
        "dapo",
        "The surrogate and how its per-token values are averaged: the clipped one by grpo (per sequence, then over "
        "sequences), bnpo and dapo (over all scored tokens), dr_grpo (over num_completions x max_completion_length) or "
        "luspo (sums of sequences, over sequences); cispo, sapo and vespo. Denominators are global.",
    )
    beta: float = _own(0.0, "Weight of the KL divergence from the reference model. 0: no reference is held.")
    kl_estimator: str = _own("k3", "Estimate of the KL divergence from a token: k1, k2 or k3.")
    kl_in: str = _own("loss", "Where the KL divergence counts: in the loss, or in the reward.")
    use_bias_correction_kl: bool | None = _own(
        None,
        "Multiply the estimate in the loss by the importance ratio, so that its gradient is that of the divergence "
        "(2512.02556). None: yes for k1 and k3; k2's own gradient is right already.",
    )
    kl_target: float | None = _own(
        None, "Divergence in nats a completion that beta is adapted to reach (1909.08593). None: beta stays."
    )
    kl_horizon: int = _own(10000, "Completions over which an adaptive beta changes by a factor.")
    epsilon: float = _own(0.2, "Clip range below a ratio of 1.")
    epsilon_high: float | None = _own(
        None, "Clip range above a ratio of 1; of cispo the bound of the ratio itself, such as 5. None: epsilon."
    )
    delta: float | None = _own(
        None,
        "Upper bound of the ratio where the advantage is negative: two-sided, or dual, clipping. None: no bound.",
    )
    importance_sampling_level: str = _own(
        "token",
        "Ratio of each token, of the whole sequence as geometric mean (sequence: GSPO; sequence_token: with each "
        "token's own gradient) or as product (product: RLOO).",
    )
    entropy_coef: float = _own(
        0.0, "Weight of an entropy bonus, the mean over the step's tokens; adaptive, the one to start from. 0: none."
    )
    use_adaptive_entropy: bool = _own(
        False,
        "After every optimizer step, raise the weight of the entropy bonus by entropy_coef_delta where the entropy of "
        "the step's tokens is at most entropy_target, else lower it; a step after one above the target has no bonus "
        "(2505.22312).",
    )
    entropy_target: float = _own(0.2, "Mean entropy of tokens, in nats, that use_adaptive_entropy holds up.")
    entropy_coef_delta: float = _own(0.005, "Change of an adaptive entropy_coef in one optimizer step.")
    entropy_coef_min: float = _own(0.0, "Lower bound of an adaptive entropy_coef.")
    entropy_coef_max: float = _own(1.0, "Upper bound of an adaptive entropy_coef.")
    top_entropy_quantile: float = _own(
        1.0, "Share of the step's tokens, those of highest entropy, that the policy loss keeps (2506.01939). 1: all."
    )
    reward_clip_range: list[float] | None = _own(None, "Lowest and highest reward; others are clipped. None: no clip.")
    sampling_correction: str | None = _own(
        None,
        "Weight of samples by the ratio of trainer to sampler: token_truncate, token_mask (IcePop, with bounds 0.5 and "
        "5), sequence_truncate, sequence_mask. With it, the check of sampler against trainer reports and does not "
        "stop. None: no weight; the check stops the run.",
    )
    sampling_correction_max: float | None = _own(3.0, "Largest weight; above it truncated or masked. None: no bound.")
    sampling_correction_min: float | None = _own(None, "Smallest weight, of the masks. None: no bound.")
    off_policy_mask_threshold: float | None = _own(
        None,
        "Leave a completion of negative advantage out of the surrogate where its mean log(sampled / present "
        "probability), in nats a token, exceeds this (2512.02556). None: keep all.",
    )


@dataclass
class GRPOFields(_PolicyFields):
    """Own fields of GRPO and its family."""

    kind: ClassVar[Kind] = "grpo"

    advantage_estimator: str = _own(
        "group",
        "How rewards become advantages: group (minus the group's mean), leave_one_out (minus the mean of the others), "
        "batch (whitened over the batch), group_batch (minus the group's mean, then whitened), mean_normalized (minus "
        "and over the group's mean).",
    )
    scale_rewards: str | bool = _own(
        "group", "What centred rewards are divided by: the group's std, the batch's std (batch), or nothing (none)."
    )
    multi_objective_aggregation: str = _own(
        "sum_then_normalize",
        "With several rewards: sum_then_normalize, or normalize_then_sum, which scales each within its group and "
        "whitens the sum over the batch (GDPO, 2601.05242).",
    )
    sapo_temperature_neg: float = _own(1.05, "Steepness of sapo's gate where the advantage is not positive.")
    sapo_temperature_pos: float = _own(1.0, "Steepness of sapo's gate where the advantage is positive.")
    vespo_k_pos: float = _own(2.0, "Power of the sequence's ratio in vespo's weight where the advantage is at least 0.")
    vespo_lambda_pos: float = _own(3.0, "Decay of vespo's weight with the ratio where the advantage is at least 0.")
    vespo_k_neg: float = _own(3.0, "Power of the sequence's ratio in vespo's weight where the advantage is negative.")
    vespo_lambda_neg: float = _own(2.0, "Decay of vespo's weight with the ratio where the advantage is negative.")


@dataclass
class RLOOFields(GRPOFields):
    """Own fields of RLOO: GRPO's with other defaults."""

    kind: ClassVar[Kind] = "rloo"

    algorithm: str | None = _own("rloo", "rloo: a row of the algorithm table.")
    num_generations: int = _own(2, "Completions per prompt, G; at least 2.")
    beta: float = _own(0.05, "Weight of the KL divergence from the reference in the reward. 0: no reference is held.")
    normalize_advantages: bool = _own(False, "Whiten the advantages over the batch.")


@dataclass
class PPOFields(_PolicyFields):
    """Own fields of PPO. Names of TRL's PPOConfig that differ are understood: see ALIASES."""

    kind: ClassVar[Kind] = "ppo"

    algorithm: str | None = _own("ppo", "ppo: a row of the algorithm table.")
    num_generations: int = _own(1, "Completions per prompt.")
    num_iterations: int = _own(4, "Passes over each round of samples (num_ppo_epochs).")
    beta: float = _own(0.05, "Weight of the KL divergence from the reference in the reward (kl_coef). 0: none is held.")
    kl_estimator: str = _own("k1", "Estimate of the KL divergence from a token: k1, k2 or k3.")
    kl_in: str = _own("reward", "Where the KL divergence counts: in each token's reward, or in the loss.")
    gamma: float = _own(1.0, "Discount of later rewards.")
    lam: float = _own(0.95, "lambda of generalised advantage estimation: 1 sums rewards, 0 trusts the critic.")
    vf_coef: float = _own(0.1, "Weight of the critic's loss.")
    cliprange_value: float | None = _own(0.2, "Clip range of the critic's values around their old ones. None: no clip.")
    value_learning_rate: float | None = _own(None, "Learning rate of the critic. None: learning_rate.")
    value_prefit_steps: int = _own(0, "Optimizer steps, first of all, in which only the critic learns.")
    whiten_rewards: bool = _own(False, "Scale the rewards of tokens to a standard deviation of 1, keeping their mean.")
    whiten_advantages: bool = _own(True, "Whiten the advantages over all tokens of a round of samples.")
    missing_eos_penalty: float | None = _own(
        None, "Subtracted from the reward of a completion without end. None: nothing is."
    )


@dataclass
class OnlineDPOFields(_OnlineFields):
    """Own fields of online DPO."""

    kind: ClassVar[Kind] = "online_dpo"

    learning_rate: float = _own(5e-7, "Peak learning rate.")
    num_generations: int = _own(2, "Completions per prompt; the best and the worst of them make the pair.")
    beta: float = _own(0.1, "Strength of the pull towards the reference.")
    loss_type: str = _own("sigmoid", "A row of burnish.objectives.preference.PREFERENCE_LOSSES that couples no pairs.")
    label_smoothing: float = _own(0.0, "Assumed share of pairs whose order is wrong, below 0.5.")


_STAGES = (SFTFields, RewardFields, DPOFields, KTOFields, OnlineDPOFields, GRPOFields, RLOOFields, PPOFields)
_FIELDS: dict[Kind, type[CommonFields]] = {fields.kind: fields for fields in _STAGES}


@cache
def known_fields(kind: Kind) -> dict[str, FieldInfo]:
    """Every field that the config of a stage has: those of TrainingArguments, then burnish's own. Loads no torch."""
    found = dict(training_argument_fields())
    for item in dataclasses.fields(_FIELDS[kind]):
        found[item.name] = FieldInfo(item.name, str(item.type), item.default, own=True, help=item.metadata["help"])
    return found


def stages_with(name: str) -> list[Kind]:
    """The stages that have a field of that name."""
    return [kind for kind in _FIELDS if name in known_fields(kind)]
