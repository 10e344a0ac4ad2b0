"""What values a field may have: tables of plain functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from burnish.config.algorithms import ADVANTAGE_NAMES, LOSS_NAMES
from burnish.config.contradictions import CONTRADICTIONS
from burnish.config.inherited import training_argument_fields
from burnish.config.paths import folder_problem, path_problem
from burnish.config.predicates import (
    Rule,
    above,
    as_names,
    at_least,
    count,
    is_fraction,
    is_in,
    is_number,
    is_seed,
    is_table,
    is_text,
    list_of,
    one_of,
    optional,
    words_or_members,
)
from burnish.config.refused import Kind, met_fields, refused_fields
from burnish.errors import ConfigError, show

__all__ = ["PREFERENCE_LOSS_NAMES", "check_values"]


def check_values(kind: Kind, values: Mapping[str, Any]) -> None:
    """Check every value and combination of one stage's config; `values` holds all of its fields.

    Raises:
        ConfigError: naming the field, the value received and the fix.
    """
    for name, reason in refused_fields(kind).items():
        if name in values and not _is_unset(values[name], _inherited_default(name)):
            raise ConfigError(f"{name} = {show(values[name])}: {reason}.")
    met = ((name, optional(holds), fix) for name, (holds, fix) in met_fields(kind).items())
    for name, holds, fix in (*_COMMON, *_RULES[kind], *met):
        if name in values and not holds(values[name]):
            raise ConfigError(f"{name} = {show(values[name])}: {fix if isinstance(fix, str) else fix()}.")
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{name} = {value!r}: use a number.")
    for name, problem_of in _PATHS.items():
        if isinstance(values.get(name), str) and (problem := problem_of(values[name])):
            raise ConfigError(f"{name} = {show(values[name])}: {problem}.")
    for contradiction in CONTRADICTIONS[kind](values):
        raise ConfigError(contradiction)


def _inherited_default(name: str) -> Any:
    # The refused fields whose default burnish changes.
    changed = ("logging_nan_inf_filter", "remove_unused_columns")
    return False if name in changed else training_argument_fields()[name].default


def _is_unset(value: Any, default: Any) -> bool:
    # transformers replaces some unset fields by objects when it resolves a config; those were not set by anyone.
    return value == default or not isinstance(value, bool | int | float | str | list | dict)


_LEVELS = ("debug", "detail", "info", "warning", "error", "critical", "passive")

_PATHS: dict[str, Callable[[str], str | None]] = {
    "output_dir": folder_problem,
    "log_completions": folder_problem,
    "log_metrics": folder_problem,
    "resume_from_checkpoint": path_problem,
}

_COMMON: tuple[Rule, ...] = (
    ("token_budget", optional(count(1)), "use a number of tokens of at least 1; a large one sets no limit"),
    ("learning_rate", at_least(0), "use a finite number of at least 0"),
    ("per_device_train_batch_size", count(1), "use at least 1"),
    ("per_device_eval_batch_size", count(1), "use at least 1"),
    ("gradient_accumulation_steps", count(1), "use at least 1 micro-batch a step"),
    ("num_train_epochs", above(0), "use a number above 0"),
    ("max_steps", lambda value: count(1)(value) or value == -1, "use at least 1, or -1 to count by epochs"),
    ("weight_decay", at_least(0), "use a number of at least 0"),
    ("adam_beta1", lambda value: is_fraction(value) and value < 1, "use a number in [0, 1)"),
    ("adam_beta2", lambda value: is_fraction(value) and value < 1, "use a number in [0, 1)"),
    ("adam_epsilon", at_least(0), "use a number of at least 0, such as 1e-8"),
    (
        "max_grad_norm",
        lambda value: at_least(0)(value) or value == math.inf,
        "use a number of at least 0; 0 clips none",
    ),
    ("warmup_steps", at_least(0), "use a number of steps of at least 0; below 1 it is a share of all"),
    ("logging_steps", above(0), "use a number of steps above 0; below 1 it is a share of all"),
    ("save_steps", above(0), "use a number of steps above 0; below 1 it is a share of all"),
    ("eval_steps", optional(above(0)), "use a number of steps above 0, or leave it out"),
    ("max_dead_steps", optional(count(0)), "use a number of steps of at least 1, or 0 to go on whatever happens"),
    ("seed", is_seed, "use an integer of at least 0, below 2^32"),
    ("data_seed", optional(is_seed), "use an integer of at least 0, below 2^32, or leave it out"),
    ("dataloader_num_workers", lambda value: count(0)(value) and value <= 1024, "use an integer in [0, 1024]"),
    ("lr_scheduler_type", *words_or_members("trainer_utils.py", "SchedulerType")),
    ("optim", *words_or_members("training_args.py", "OptimizerNames")),
    ("eval_strategy", *words_or_members("trainer_utils.py", "IntervalStrategy")),
    ("logging_strategy", *words_or_members("trainer_utils.py", "IntervalStrategy")),
    ("save_strategy", *words_or_members("trainer_utils.py", "SaveStrategy")),
    ("hub_strategy", *words_or_members("trainer_utils.py", "HubStrategy")),
    ("log_level", one_of(*_LEVELS), f"use one of {', '.join(_LEVELS)}"),
    ("log_level_replica", one_of(*_LEVELS), f"use one of {', '.join(_LEVELS)}"),
    ("include_num_input_tokens_seen", one_of("all", "non_padding", "no", True, False), "use all, non_padding or no"),
    ("ddp_backend", optional(one_of("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl")), "use gloo or nccl"),
    *(
        (name, optional(is_table), "use a table of arguments, or leave it out")
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
    ),
    (
        "train_sampling_strategy",
        one_of("random", "sequential"),
        "use random or sequential; packing already balances batches by length",
    ),
    ("save_total_limit", optional(count(1)), "use at least 1 checkpoint, or leave it out to keep all"),
    ("eval_delay", at_least(0), "use a number of at least 0"),
    ("ddp_timeout", count(1), "use a number of seconds of at least 1"),
    ("ddp_bucket_cap_mb", optional(count(1)), "use at least 1, or leave it out"),
    *(
        (name, optional(is_text), "use a text that is not empty, or leave it out")
        for name in ("chat_template", "eos_token", "pad_token", "dataset_text_field", "step_separator")
    ),
)

PREFERENCE_LOSS_NAMES = (
    "sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "cpo", "simpo", "alphapo", "orpo",
)  # fmt: skip
"""The rows of burnish.objectives.preference.PREFERENCE_LOSSES, which cannot be imported without torch."""

_MAX_LENGTH: Rule = (
    "max_length",
    optional(count(2)),
    "use at least 2 tokens (one predicts the next), or leave it out",
)

_REFERENCE: tuple[Rule, ...] = (
    _MAX_LENGTH,
    ("beta", above(0), "use a number above 0, such as 0.1"),
    ("ref_model_mixup_alpha", lambda value: is_fraction(value) and value > 0, "use a number in (0, 1]"),
    ("ref_model_sync_steps", count(1), "use at least 1"),
)

_ONLINE: tuple[Rule, ...] = (
    ("num_generations_eval", optional(count(1)), "use at least 1, or leave it out"),
    ("steps_per_generation", optional(count(1)), "use at least 1 micro-batch, or leave it out"),
    ("max_prompt_length", optional(count(1)), "use a number of tokens of at least 1; a large one sets no limit"),
    ("max_completion_length", count(1), "use a number of tokens of at least 1"),
    ("temperature", above(0), "training needs samples of a distribution: use a number above 0"),
    ("top_p", lambda value: is_fraction(value) and value > 0, "use a number in (0, 1]; 1 keeps every token"),
    ("top_k", count(0), "use 0 (keep all) or a positive integer"),
    ("min_p", optional(is_fraction), "use a number in [0, 1], or leave it out"),
    ("repetition_penalty", above(0), "use a number above 0; 1 for none, such as 1.1"),
    (
        "stop",
        optional(list_of(lambda item: isinstance(item, str) and item != "")),
        "use a list of non-empty strings, or leave it out",
    ),
    (
        "disable_dropout",
        one_of(True),
        "samples are drawn without dropout, and with it another policy would be trained; remove the field",
    ),
    ("reward_weights", optional(list_of(is_number)), "use a list of numbers, one per reward, or leave it out"),
    ("logprob_check_bound", optional(above(0)), "use a number of nats above 0, or leave it out"),
    (
        "overlong_buffer",
        optional(above(0)),
        "use a number of tokens, or a share below 1 of the limit, or leave it out",
    ),
    ("overlong_penalty", at_least(0), "use a number of at least 0"),
    ("max_sampling_rounds", count(1), "use at least 1"),
    ("replay_size", count(0), "use a number of groups of at least 0"),
    (
        "prompt_sampling",
        one_of("permutation", "weighted", "curriculum"),
        "use permutation, weighted or curriculum",
    ),
    ("curriculum_target", is_number, "use a finite number"),
)

_GROUPS: Rule = ("num_generations", count(2), "a group is compared with itself: use at least 2")

_POLICY: tuple[Rule, ...] = (
    ("num_iterations", count(1), "use at least 1"),
    ("loss_type", is_in(LOSS_NAMES), lambda: f"use one of {', '.join(LOSS_NAMES)}"),
    ("beta", at_least(0), "use a finite number of at least 0; 0 holds no reference model"),
    ("kl_estimator", one_of("k1", "k2", "k3"), "use k1, k2 or k3"),
    ("kl_in", one_of("loss", "reward"), "use loss or reward"),
    ("kl_target", optional(above(0)), "use a number of nats above 0, or leave it out"),
    ("kl_horizon", count(1), "use at least 1 completion"),
    ("epsilon", lambda value: is_fraction(value) and 0 < value < 1, "use a number in (0, 1), such as 0.2"),
    ("epsilon_high", optional(above(0)), "use a number above 0, such as 0.28, or leave it out"),
    ("delta", optional(above(1)), "it bounds a ratio: use a number above 1 + epsilon, or leave it out"),
    (
        "importance_sampling_level",
        one_of("token", "sequence", "sequence_token", "product"),
        "use token, sequence, sequence_token or product",
    ),
    ("off_policy_mask_threshold", optional(above(0)), "use nats a token above 0, such as 0.5, or leave it out"),
    ("entropy_coef", is_number, "use a finite number; 0 is no bonus"),
    ("entropy_target", above(0), "use a number of nats above 0, such as 0.2"),
    ("entropy_coef_delta", above(0), "use a number above 0, such as 0.005"),
    ("entropy_coef_min", at_least(0), "use a number of at least 0"),
    ("entropy_coef_max", above(0), "use a number above 0, such as 1"),
    (
        "top_entropy_quantile",
        lambda value: is_fraction(value) and value > 0,
        "use a number in (0, 1]; 1 keeps every token",
    ),
    (
        "reward_clip_range",
        optional(lambda value: list_of(is_number)(value) and len(value) == 2 and value[0] < value[1]),
        "use [lowest, highest], or leave it out",
    ),
    (
        "sampling_correction",
        optional(one_of("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
        "use token_truncate, token_mask, sequence_truncate or sequence_mask, or leave it out",
    ),
    ("sampling_correction_max", optional(above(0)), "use a number above 0, such as 3, or leave it out"),
    ("sampling_correction_min", optional(above(0)), "use a number above 0, such as 0.5, or leave it out"),
)

_GRPO: tuple[Rule, ...] = (
    *_ONLINE,
    _GROUPS,
    *_POLICY,
    ("advantage_estimator", is_in(ADVANTAGE_NAMES), lambda: f"use one of {', '.join(ADVANTAGE_NAMES)}"),
    (
        "scale_rewards",
        one_of("group", "batch", "none", True, False),
        "use group (or true), batch, or none (or false)",
    ),
    (
        "multi_objective_aggregation",
        one_of("sum_then_normalize", "normalize_then_sum"),
        "use sum_then_normalize or normalize_then_sum",
    ),
    ("sapo_temperature_neg", above(0), "use a number above 0"),
    ("sapo_temperature_pos", above(0), "use a number above 0"),
    ("vespo_k_neg", at_least(0), "use a number of at least 0"),
    ("vespo_k_pos", at_least(0), "use a number of at least 0"),
    ("vespo_lambda_neg", above(0), "use a number above 0"),
    ("vespo_lambda_pos", above(0), "use a number above 0"),
)

_UNCOUPLED = tuple(name for name in PREFERENCE_LOSS_NAMES if name not in ("aot", "aot_unpaired", "sft"))
"""Losses of a pair by itself: online, pairs come and go with the samples."""

_RULES: dict[Kind, tuple[Rule, ...]] = {
    "reward": (
        _MAX_LENGTH,
        ("center_rewards_coefficient", optional(at_least(0)), "use a number of at least 0, or leave it out"),
    ),
    "dpo": (
        *_REFERENCE,
        (
            "loss_type",
            lambda value: all(name in PREFERENCE_LOSS_NAMES for name in as_names(value)) and bool(as_names(value)),
            f"use one or several of {', '.join(PREFERENCE_LOSS_NAMES)}",
        ),
        ("loss_weights", optional(list_of(is_number)), "use a list of numbers, one per loss_type, or leave it out"),
        ("label_smoothing", lambda value: is_number(value) and 0 <= value < 0.5, "use a number in [0, 0.5)"),
        (
            "f_divergence_type",
            one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
            "use reverse_kl, forward_kl, js_divergence or alpha_divergence",
        ),
        ("f_alpha_divergence_coef", is_number, "use a finite number"),
        ("simpo_gamma", at_least(0), "use a number of at least 0"),
        ("alpha", lambda value: is_number(value) and value != 0, "use a number other than 0; at 0 it is simpo"),
        ("discopop_tau", above(0), "use a number above 0"),
        ("ld_alpha", optional(is_fraction), "use a number in [0, 1], or leave it out"),
    ),
    "kto": (
        *_REFERENCE,
        ("loss_type", one_of("kto", "apo_zero_unpaired"), "use kto or apo_zero_unpaired"),
        ("desirable_weight", at_least(0), "use a number of at least 0"),
        ("undesirable_weight", at_least(0), "use a number of at least 0"),
    ),
    "sft": (
        _MAX_LENGTH,
        (
            "truncation_mode",
            one_of("keep_start", "keep_end", "drop", "split"),
            "use keep_start, keep_end, drop or split",
        ),
        ("neftune_noise_alpha", optional(above(0)), "use a number above 0, such as 5, or leave it out"),
        (
            "loss_type",
            one_of("nll", "dft"),
            "use nll or dft; logits are tiled already, so nll is also the chunked one",
        ),
    ),
    "online_dpo": (
        *_ONLINE,
        _GROUPS,
        ("beta", above(0), "use a number above 0, such as 0.1"),
        ("loss_type", one_of(*_UNCOUPLED), f"use one of {', '.join(_UNCOUPLED)}"),
        ("label_smoothing", lambda value: is_number(value) and 0 <= value < 0.5, "use a number in [0, 0.5)"),
    ),
    "grpo": _GRPO,
    "rloo": _GRPO,
    "ppo": (
        *_ONLINE,
        ("num_generations", count(1), "use at least 1"),
        *_POLICY,
        ("gamma", is_fraction, "use a number in [0, 1]"),
        ("lam", is_fraction, "use a number in [0, 1]"),
        ("vf_coef", above(0), "use a number above 0"),
        ("cliprange_value", optional(above(0)), "use a number above 0, or leave it out"),
        ("value_learning_rate", optional(at_least(0)), "use a finite number of at least 0, or leave it out"),
        ("value_prefit_steps", count(0), "use at least 0"),
        ("missing_eos_penalty", optional(at_least(0)), "use a number of at least 0, or leave it out"),
    ),
}
