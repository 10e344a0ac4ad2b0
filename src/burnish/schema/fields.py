"""burnish's own configuration fields; the trainers' configs add those of transformers.TrainingArguments.

Names, meanings and defaults are TRL's where both mean the same; each help text says where they do not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, TypeVar

from burnish.schema.inherited import FieldInfo, training_argument_fields
from burnish.schema.refused import Kind
from burnish.schema.rules import check_values

__all__ = [
    "CommonFields",
    "DPOFields",
    "GRPOFields",
    "KTOFields",
    "OnlineDPOFields",
    "RewardFields",
    "SFTFields",
    "known_fields",
]

T = TypeVar("T")


def _own(default: T, text: str) -> T:
    return field(default=default, metadata={"help": text})  # pyright: ignore[reportReturnType]


@dataclass
class CommonFields:
    """Fields of every stage. Inherit it before `transformers.TrainingArguments`, so that its defaults win."""

    kind: ClassVar[Kind]

    model_init_kwargs: dict[str, Any] | None = _own(
        None, "Arguments of from_pretrained, used when the model is given by name or path."
    )
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
        None, "Commands continue from this checkpoint folder; true: from the last complete one in output_dir."
    )
    progress: bool = _own(True, "Show live progress, metrics and rates in the terminal.")
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
    chat_template: str | None = _own(
        None, "A file with a Jinja chat template, or a template's name. None: the tokenizer's own."
    )
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
    chat_template: str | None = _own(
        None, "A file with a Jinja chat template, or a template's name. None: the tokenizer's own."
    )
    disable_dropout: bool = _own(True, "Train without dropout, in the model and in adapters.")
    center_rewards_coefficient: float | None = _own(
        None, "Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0, such as 0.01. None: no such term."
    )


@dataclass
class _ReferenceFields(CommonFields):
    """Fields of the stages that compare a policy with a reference on a data set."""

    learning_rate: float = _own(1e-6, "Peak learning rate.")
    max_length: int | None = _own(1024, "Longest sequence in tokens; the rest is cut off. None: no limit.")
    chat_template: str | None = _own(
        None, "A file with a Jinja chat template, or a template's name. None: the tokenizer's own."
    )
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
        "so every optimizer step samples afresh.",
    )
    max_prompt_length: int | None = _own(
        None, "Longest prompt in tokens; a row with a longer one is left out and counted, never cut. None: no limit."
    )
    max_completion_length: int = _own(512, "Most tokens of one completion.")
    temperature: float = _own(1.0, "Sampling temperature, also that of the trained distribution; above 0.")
    top_p: float = _own(1.0, "Sample from the smallest set of tokens with this probability. 1: all.")
    top_k: int = _own(0, "Sample from the k most likely tokens. 0: all.")
    min_p: float | None = _own(None, "Sample from tokens at least this fraction as likely as the likeliest. None: all.")
    stop: list[str] | None = _own(None, "Strings that end a completion.")
    chat_template_kwargs: dict[str, Any] | None = _own(None, "Extra arguments of the chat template.")
    disable_dropout: bool = _own(True, "Always on: samples are drawn without dropout, so they are trained on so too.")
    shuffle_dataset: bool = _own(True, "Draw prompts in a new order each epoch.")
    reward_weights: list[float] | None = _own(None, "One weight per reward. None: 1 each, or the rubric's own.")
    mask_truncated_completions: bool = _own(False, "Leave completions that hit the token limit out of the loss.")
    logprob_check_bound: float | None = _own(
        None,
        "Largest KL(sampler || trainer) of fresh samples, in nats a token over the last 2,048 tokens; the run stops "
        "above it. None: 1e-6, or 0.01 where the model computes in bf16.",
    )
    log_completions: bool | str = _own(
        False, "Write every completion with its scores as JSON lines: into output_dir, or into the folder named here."
    )


@dataclass
class GRPOFields(_OnlineFields):
    """Own fields of GRPO and its family."""

    kind: ClassVar[Kind] = "grpo"

    num_iterations: int = _own(1, "Passes over each round of samples.")
    loss_type: str = _own(
        "dapo",
        "How per-token losses are averaged: grpo (per sequence, then over sequences), bnpo and dapo (over all scored "
        "tokens), dr_grpo (over num_completions x max_completion_length). Denominators are global.",
    )
    scale_rewards: str | bool = _own(
        "group", "What centred rewards are divided by: the group's std, the batch's std (batch), or nothing (none)."
    )
    beta: float = _own(0.0, "Weight of the KL divergence from the reference model. 0: no reference is held.")
    epsilon: float = _own(0.2, "Clip range below a ratio of 1.")
    epsilon_high: float | None = _own(None, "Clip range above a ratio of 1. None: epsilon.")
    delta: float | None = _own(
        None, "Upper bound of the ratio where the advantage is negative (two-sided clipping). None: no bound."
    )
    importance_sampling_level: str = _own("token", "Ratio of each token, or of the whole sequence (sequence: GSPO).")


@dataclass
class OnlineDPOFields(_OnlineFields):
    """Own fields of online DPO."""

    kind: ClassVar[Kind] = "online_dpo"

    learning_rate: float = _own(5e-7, "Peak learning rate.")
    num_generations: int = _own(2, "Completions per prompt; the best and the worst of them make the pair.")
    beta: float = _own(0.1, "Strength of the pull towards the reference.")
    loss_type: str = _own("sigmoid", "A row of burnish.objectives.preference.PREFERENCE_LOSSES that couples no pairs.")
    label_smoothing: float = _own(0.0, "Assumed share of pairs whose order is wrong, below 0.5.")


_FIELDS: dict[Kind, type[CommonFields]] = {
    fields.kind: fields for fields in (SFTFields, RewardFields, DPOFields, KTOFields, OnlineDPOFields, GRPOFields)
}


@cache
def known_fields(kind: Kind) -> dict[str, FieldInfo]:
    """Every field that the config of a stage has: those of TrainingArguments, then burnish's own. Loads no torch."""
    found = dict(training_argument_fields())
    for item in dataclasses.fields(_FIELDS[kind]):
        found[item.name] = FieldInfo(item.name, str(item.type), item.default, own=True, help=item.metadata["help"])
    return found
