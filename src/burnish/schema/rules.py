"""What values a field may have, and which fields contradict each other: tables and plain functions of a mapping."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, cast

from burnish.errors import ConfigError, show
from burnish.schema.algorithms import ADVANTAGE_NAMES, LOSS_NAMES
from burnish.schema.inherited import training_argument_fields
from burnish.schema.paths import folder_problem, path_problem
from burnish.schema.refused import Kind, refused_fields

__all__ = ["PREFERENCE_LOSS_NAMES", "check_values"]

Rule: TypeAlias = tuple[str, Callable[[Any], bool], str | Callable[[], str]]
"""A field, what its value must satisfy, and the fix (called where names may have been added)."""


def check_values(kind: Kind, values: Mapping[str, Any]) -> None:
    """Check every value and combination of one stage's config; `values` holds all of its fields.

    Raises:
        ConfigError: naming the field, the value received and the fix.
    """
    for name, reason in refused_fields(kind).items():
        if name in values and not _is_unset(values[name], _inherited_default(name)):
            raise ConfigError(f"{name} = {show(values[name])}: {reason}.")
    for name, holds, fix in (*_COMMON, *_RULES[kind]):
        if name in values and not holds(values[name]):
            raise ConfigError(f"{name} = {show(values[name])}: {fix if isinstance(fix, str) else fix()}.")
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{name} = {value!r}: use a number.")
    for name, problem_of in _PATHS.items():
        if isinstance(values.get(name), str) and (problem := problem_of(values[name])):
            raise ConfigError(f"{name} = {show(values[name])}: {problem}.")
    for contradiction in _CONTRADICTIONS[kind](values):
        raise ConfigError(contradiction)


def _inherited_default(name: str) -> Any:
    # The refused fields whose default burnish changes.
    changed = ("logging_nan_inf_filter", "remove_unused_columns")
    return False if name in changed else training_argument_fields()[name].default


def _is_unset(value: Any, default: Any) -> bool:
    # transformers replaces some unset fields by objects when it resolves a config; those were not set by anyone.
    return value == default or not isinstance(value, bool | int | float | str | list | dict)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least(minimum: float) -> Callable[[Any], bool]:
    return lambda value: _number(value) and value >= minimum


def _above(bound: float) -> Callable[[Any], bool]:
    return lambda value: _number(value) and value > bound


def _count(minimum: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _one_of(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: any(value is one or (isinstance(value, str) and value == one) for one in allowed)


def _in(names: Collection[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


def _list_of(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(rule(item) for item in value)


def _fraction(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _names(value: Any) -> list[Any]:
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else [value]


def _is_seed(value: Any) -> bool:
    return _count(0)(value) and value < 2**32  # numpy's limit


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_PATHS: dict[str, Callable[[str], str | None]] = {
    "output_dir": folder_problem,
    "log_completions": folder_problem,
    "resume_from_checkpoint": path_problem,
}

_COMMON: tuple[Rule, ...] = (
    ("token_budget", _optional(_count(1)), "use a number of tokens of at least 1; a large one sets no limit"),
    ("learning_rate", _at_least(0), "use a finite number of at least 0"),
    ("per_device_train_batch_size", _count(1), "use at least 1"),
    ("per_device_eval_batch_size", _count(1), "use at least 1"),
    ("gradient_accumulation_steps", _count(1), "use at least 1 micro-batch a step"),
    ("num_train_epochs", _above(0), "use a number above 0"),
    ("max_steps", lambda value: _count(1)(value) or value == -1, "use at least 1, or -1 to count by epochs"),
    ("weight_decay", _at_least(0), "use a number of at least 0"),
    ("adam_beta1", lambda value: _fraction(value) and value < 1, "use a number in [0, 1)"),
    ("adam_beta2", lambda value: _fraction(value) and value < 1, "use a number in [0, 1)"),
    ("adam_epsilon", _at_least(0), "use a number of at least 0, such as 1e-8"),
    (
        "max_grad_norm",
        lambda value: _at_least(0)(value) or value == math.inf,
        "use a number of at least 0; 0 clips none",
    ),
    ("warmup_steps", _at_least(0), "use a number of steps of at least 0; below 1 it is a share of all"),
    ("logging_steps", _above(0), "use a number of steps above 0; below 1 it is a share of all"),
    ("save_steps", _above(0), "use a number of steps above 0; below 1 it is a share of all"),
    ("eval_steps", _optional(_above(0)), "use a number of steps above 0, or leave it out"),
    ("max_dead_steps", _optional(_count(0)), "use a number of steps of at least 1, or 0 to go on whatever happens"),
    ("seed", _is_seed, "use an integer of at least 0, below 2^32"),
    ("data_seed", _optional(_is_seed), "use an integer of at least 0, below 2^32, or leave it out"),
    ("dataloader_num_workers", lambda value: _count(0)(value) and value <= 1024, "use an integer in [0, 1024]"),
    ("save_total_limit", _optional(_count(1)), "use at least 1 checkpoint, or leave it out to keep all"),
    ("eval_delay", _at_least(0), "use a number of at least 0"),
    ("ddp_timeout", _count(1), "use a number of seconds of at least 1"),
    ("ddp_bucket_cap_mb", _optional(_count(1)), "use at least 1, or leave it out"),
    *(
        (name, _optional(_text), "use a text that is not empty, or leave it out")
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
    _optional(_count(2)),
    "use at least 2 tokens (one predicts the next), or leave it out",
)

_REFERENCE: tuple[Rule, ...] = (
    _MAX_LENGTH,
    ("beta", _above(0), "use a number above 0, such as 0.1"),
    ("ref_model_mixup_alpha", lambda value: _fraction(value) and value > 0, "use a number in (0, 1]"),
    ("ref_model_sync_steps", _count(1), "use at least 1"),
)

_ONLINE: tuple[Rule, ...] = (
    ("num_generations_eval", _optional(_count(1)), "use at least 1, or leave it out"),
    ("steps_per_generation", _optional(_count(1)), "use at least 1 micro-batch, or leave it out"),
    ("max_prompt_length", _optional(_count(1)), "use a number of tokens of at least 1; a large one sets no limit"),
    ("max_completion_length", _count(1), "use a number of tokens of at least 1"),
    ("temperature", _above(0), "training needs samples of a distribution: use a number above 0"),
    ("top_p", lambda value: _fraction(value) and value > 0, "use a number in (0, 1]; 1 keeps every token"),
    ("top_k", _count(0), "use 0 (keep all) or a positive integer"),
    ("min_p", _optional(_fraction), "use a number in [0, 1], or leave it out"),
    (
        "stop",
        _optional(_list_of(lambda item: isinstance(item, str) and item != "")),
        "use a list of non-empty strings, or leave it out",
    ),
    (
        "disable_dropout",
        _one_of(True),
        "samples are drawn without dropout, and with it another policy would be trained; remove the field",
    ),
    ("reward_weights", _optional(_list_of(_number)), "use a list of numbers, one per reward, or leave it out"),
    ("logprob_check_bound", _optional(_above(0)), "use a number of nats above 0, or leave it out"),
    (
        "overlong_buffer",
        _optional(_above(0)),
        "use a number of tokens, or a share below 1 of the limit, or leave it out",
    ),
    ("overlong_penalty", _at_least(0), "use a number of at least 0"),
    ("max_sampling_rounds", _count(1), "use at least 1"),
    ("replay_size", _count(0), "use a number of groups of at least 0"),
    (
        "prompt_sampling",
        _one_of("permutation", "weighted", "curriculum"),
        "use permutation, weighted or curriculum",
    ),
    ("curriculum_target", _number, "use a finite number"),
)

_GROUPS: Rule = ("num_generations", _count(2), "a group is compared with itself: use at least 2")

_POLICY: tuple[Rule, ...] = (
    ("num_iterations", _count(1), "use at least 1"),
    ("loss_type", _in(LOSS_NAMES), lambda: f"use one of {', '.join(LOSS_NAMES)}"),
    ("beta", _at_least(0), "use a finite number of at least 0; 0 holds no reference model"),
    ("kl_estimator", _one_of("k1", "k2", "k3"), "use k1, k2 or k3"),
    ("kl_in", _one_of("loss", "reward"), "use loss or reward"),
    ("kl_target", _optional(_above(0)), "use a number of nats above 0, or leave it out"),
    ("kl_horizon", _count(1), "use at least 1 completion"),
    ("epsilon", lambda value: _fraction(value) and 0 < value < 1, "use a number in (0, 1), such as 0.2"),
    ("epsilon_high", _optional(_above(0)), "use a number above 0, such as 0.28, or leave it out"),
    ("delta", _optional(_above(1)), "it bounds a ratio: use a number above 1 + epsilon, or leave it out"),
    (
        "importance_sampling_level",
        _one_of("token", "sequence", "sequence_token", "product"),
        "use token, sequence, sequence_token or product",
    ),
    ("entropy_coef", _number, "use a finite number; 0 is no bonus"),
    (
        "top_entropy_quantile",
        lambda value: _fraction(value) and value > 0,
        "use a number in (0, 1]; 1 keeps every token",
    ),
    (
        "reward_clip_range",
        _optional(lambda value: _list_of(_number)(value) and len(value) == 2 and value[0] < value[1]),
        "use [lowest, highest], or leave it out",
    ),
    (
        "sampling_correction",
        _optional(_one_of("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
        "use token_truncate, token_mask, sequence_truncate or sequence_mask, or leave it out",
    ),
    ("sampling_correction_max", _optional(_above(0)), "use a number above 0, such as 3, or leave it out"),
    ("sampling_correction_min", _optional(_above(0)), "use a number above 0, such as 0.5, or leave it out"),
)

_GRPO: tuple[Rule, ...] = (
    *_ONLINE,
    _GROUPS,
    *_POLICY,
    ("advantage_estimator", _in(ADVANTAGE_NAMES), lambda: f"use one of {', '.join(ADVANTAGE_NAMES)}"),
    (
        "scale_rewards",
        _one_of("group", "batch", "none", True, False),
        "use group (or true), batch, or none (or false)",
    ),
    (
        "multi_objective_aggregation",
        _one_of("sum_then_normalize", "normalize_then_sum"),
        "use sum_then_normalize or normalize_then_sum",
    ),
    ("sapo_temperature_neg", _above(0), "use a number above 0"),
    ("sapo_temperature_pos", _above(0), "use a number above 0"),
)

_UNCOUPLED = tuple(name for name in PREFERENCE_LOSS_NAMES if name not in ("aot", "aot_unpaired", "sft"))
"""Losses of a pair by itself: online, pairs come and go with the samples."""

_RULES: dict[Kind, tuple[Rule, ...]] = {
    "reward": (
        _MAX_LENGTH,
        ("center_rewards_coefficient", _optional(_at_least(0)), "use a number of at least 0, or leave it out"),
    ),
    "dpo": (
        *_REFERENCE,
        (
            "loss_type",
            lambda value: all(name in PREFERENCE_LOSS_NAMES for name in _names(value)) and bool(_names(value)),
            f"use one or several of {', '.join(PREFERENCE_LOSS_NAMES)}",
        ),
        ("loss_weights", _optional(_list_of(_number)), "use a list of numbers, one per loss_type, or leave it out"),
        ("label_smoothing", lambda value: _number(value) and 0 <= value < 0.5, "use a number in [0, 0.5)"),
        (
            "f_divergence_type",
            _one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
            "use reverse_kl, forward_kl, js_divergence or alpha_divergence",
        ),
        ("f_alpha_divergence_coef", _number, "use a finite number"),
        ("simpo_gamma", _at_least(0), "use a number of at least 0"),
        ("alpha", lambda value: _number(value) and value != 0, "use a number other than 0; at 0 it is simpo"),
        ("discopop_tau", _above(0), "use a number above 0"),
        ("ld_alpha", _optional(_fraction), "use a number in [0, 1], or leave it out"),
    ),
    "kto": (
        *_REFERENCE,
        ("loss_type", _one_of("kto", "apo_zero_unpaired"), "use kto or apo_zero_unpaired"),
        ("desirable_weight", _at_least(0), "use a number of at least 0"),
        ("undesirable_weight", _at_least(0), "use a number of at least 0"),
    ),
    "sft": (
        _MAX_LENGTH,
        (
            "truncation_mode",
            _one_of("keep_start", "keep_end", "drop", "split"),
            "use keep_start, keep_end, drop or split",
        ),
        ("neftune_noise_alpha", _optional(_above(0)), "use a number above 0, such as 5, or leave it out"),
        (
            "train_sampling_strategy",
            _one_of("random", "sequential"),
            "use random or sequential; packing already balances batches by length",
        ),
        (
            "loss_type",
            _one_of("nll", "dft"),
            "use nll or dft; logits are tiled already, so nll is also the chunked one",
        ),
    ),
    "online_dpo": (
        *_ONLINE,
        _GROUPS,
        ("beta", _above(0), "use a number above 0, such as 0.1"),
        ("loss_type", _one_of(*_UNCOUPLED), f"use one of {', '.join(_UNCOUPLED)}"),
        ("label_smoothing", lambda value: _number(value) and 0 <= value < 0.5, "use a number in [0, 0.5)"),
    ),
    "grpo": _GRPO,
    "rloo": _GRPO,
    "ppo": (
        *_ONLINE,
        ("num_generations", _count(1), "use at least 1"),
        *_POLICY,
        ("gamma", _fraction, "use a number in [0, 1]"),
        ("lam", _fraction, "use a number in [0, 1]"),
        ("vf_coef", _above(0), "use a number above 0"),
        ("cliprange_value", _optional(_above(0)), "use a number above 0, or leave it out"),
        ("value_learning_rate", _optional(_at_least(0)), "use a finite number of at least 0, or leave it out"),
        ("value_prefit_steps", _count(0), "use at least 0"),
        ("missing_eos_penalty", _optional(_at_least(0)), "use a number of at least 0, or leave it out"),
    ),
}


def _sft_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    if values["assistant_only_loss"] and values["completion_only_loss"]:
        yield (
            "assistant_only_loss = True and completion_only_loss = True choose different tokens: set one of them, "
            "assistant_only_loss for conversations, completion_only_loss for prompt-completion rows."
        )


def _dpo_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    names, weights, eps = _names(values["loss_type"]), values["loss_weights"], values["label_smoothing"]
    if weights is not None and len(weights) != len(names):
        yield f"loss_weights = {weights!r}: {len(weights)} weights for {len(names)} losses; give one per loss_type."
    if "exo_pair" in names and eps == 0:
        yield "label_smoothing = 0.0 with loss_type exo_pair: its target has a logarithm of 0; use 1e-3, as TRL does."
    plain = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"}
    free = {"cpo", "simpo", "alphapo", "orpo"}
    ignored = sorted((plain | free) & set(names))
    if values["f_divergence_type"] != "reverse_kl" and ignored:
        yield (
            f"f_divergence_type = {values['f_divergence_type']!r} with loss_type {ignored[0]}: that loss is defined on "
            "log-ratios; use sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair or discopop, or reverse_kl."
        )
    if set(names) <= free | {"sft"} and (values["precompute_ref_log_probs"] or values["sync_ref_model"]):
        yield (
            f"loss_type = {values['loss_type']!r} reads no reference: remove precompute_ref_log_probs and "
            "sync_ref_model."
        )
    if values["use_weighting"] and {"aot", "aot_unpaired"} & set(names):
        yield "use_weighting = True with aot: sorted losses belong to no pair, so there is nothing to weight."
    yield from _moving_reference(values)


def _moving_reference(values: Mapping[str, Any]) -> Iterable[str]:
    if values["sync_ref_model"] and values["precompute_ref_log_probs"]:
        yield "sync_ref_model = True moves the reference, precompute_ref_log_probs = True fixes it: set one of them."


def _none(values: Mapping[str, Any]) -> Iterable[str]:
    return ()


def _online_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    buffer, limit = values["overlong_buffer"], values["max_completion_length"]
    if buffer is not None and buffer >= limit:
        yield f"overlong_buffer = {buffer!r}: longer than max_completion_length = {limit}; use fewer tokens."
    if values["dynamic_sampling"] and values["num_generations"] < 2:
        yield "dynamic_sampling = True: one completion has no spread; use num_generations of at least 2."
    if "per_device_train_batch_size" in values:
        yield from _incomplete_groups(values)


def _policy_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    high = values["epsilon"] if values["epsilon_high"] is None else values["epsilon_high"]
    if values["loss_type"] == "cispo" and high <= 1:
        yield (
            f"epsilon_high = {high!r} with loss_type cispo: it bounds the ratio itself, and below 1 scales every "
            "gradient down; use 5.0, as the paper does."
        )
    if values["loss_type"] != "cispo" and high >= 1:
        yield f"epsilon_high = {high!r}: the ratio could double; use a number below 1 (5.0 is cispo's bound)."
    if values["delta"] is not None and values["delta"] <= 1 + high:
        yield f"delta = {values['delta']!r}: inside the clip range; use more than 1 + epsilon_high = {1 + high:g}."
    if values["delta"] is not None and values["loss_type"] in ("cispo", "sapo"):
        yield f"delta = {values['delta']!r} with loss_type {values['loss_type']}: it has no clip to bound; remove it."
    if values["loss_type"] == "luspo" and values["importance_sampling_level"] != "sequence":
        yield "importance_sampling_level with loss_type luspo: its ratio is the sequence's; use sequence."
    yield from _kl_contradictions(values)
    yield from _correction_contradictions(values)
    yield from _online_contradictions(values)


def _kl_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    corrected = values["use_bias_correction_kl"]
    if values["kl_in"] == "reward" and corrected:
        yield "use_bias_correction_kl = True with kl_in = 'reward': a reward has no gradient to correct; remove it."
    if values["kl_in"] == "loss" and values["kl_estimator"] == "k1" and corrected is False:
        yield (
            "kl_estimator = 'k1' with use_bias_correction_kl = False: the gradient of k1 alone is 0 on average, so "
            "nothing pulls towards the reference; use k2 or k3, or kl_in = 'reward'."
        )
    if values["kl_target"] is not None and values["beta"] == 0:
        yield "kl_target with beta = 0: an adaptive beta needs a value to start from, such as 0.05."


def _correction_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    kind, low, high = (values[f"sampling_correction{end}"] for end in ("", "_min", "_max"))
    if kind is None:
        return
    if kind.endswith("truncate") and high is None:
        yield f"sampling_correction_max = None with {kind}: nothing is truncated; use a number such as 3."
    if kind.endswith("truncate") and low is not None:
        yield f"sampling_correction_min = {low!r} with {kind}: only masks have a lower bound; remove it."
    if low is not None and high is not None and low >= high:
        yield f"sampling_correction_min = {low!r}: not below sampling_correction_max = {high!r}; use a smaller one."


def _grpo_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    scale, estimator = values["scale_rewards"], values["advantage_estimator"]
    if values["multi_objective_aggregation"] == "normalize_then_sum" and estimator != "group":
        yield f"multi_objective_aggregation = 'normalize_then_sum' with advantage_estimator {estimator}: use group."
    if values["multi_objective_aggregation"] == "normalize_then_sum":
        of_the_sum = {
            "kl_in": values["kl_in"] == "reward" and values["beta"] > 0,
            "reward_clip_range": values["reward_clip_range"] is not None,
            "overlong_buffer": values["overlong_buffer"] is not None,
        }
        yield from (
            f"{name} = {values[name]!r} with multi_objective_aggregation = 'normalize_then_sum': it changes the sum of "
            "the rewards, which that scale does not read; remove one of the two."
            for name, is_set in of_the_sum.items()
            if is_set
        )
    if values.get("normalize_advantages") and scale not in ("none", "batch"):
        yield f"normalize_advantages = True with scale_rewards = {scale!r}: set one of them."
    yield from _policy_contradictions(values)


def _incomplete_groups(values: Mapping[str, Any]) -> Iterable[str]:
    """A round of sampling holds whole groups: completions = batch size x processes x steps, a multiple of G."""
    size = values["per_device_train_batch_size"]
    steps = values["steps_per_generation"] or values["gradient_accumulation_steps"]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    total, group = size * processes * steps, values["num_generations"]
    if total % group:
        yield (
            f"num_generations = {group}: one round samples {total} completions (per_device_train_batch_size {size} x "
            f"{processes} processes x {steps} steps), which holds no whole number of groups; "
            f"make the product a multiple of {group}, for instance per_device_train_batch_size = {group}."
        )
    accumulation = values["gradient_accumulation_steps"]
    if steps % accumulation:
        yield (
            f"steps_per_generation = {steps}: an optimizer step takes gradient_accumulation_steps = {accumulation} "
            f"micro-batches, so rounds would end inside a step; use a multiple of {accumulation}."
        )


def _online_dpo_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    if values["loss_type"] == "exo_pair" and values["label_smoothing"] == 0:
        yield "label_smoothing = 0.0 with loss_type exo_pair: its target has a logarithm of 0; use 1e-3, as TRL does."
    size, group = values.get("per_device_train_batch_size"), values["num_generations"]
    if size is not None and size % group:
        yield (
            f"per_device_train_batch_size = {size}: a pair is chosen among all num_generations = {group} completions "
            f"of a prompt, so each process needs whole groups; use a multiple of {group}."
        )
    yield from _online_contradictions(values)


_CONTRADICTIONS: dict[Kind, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "sft": _sft_contradictions,
    "reward": _none,
    "dpo": _dpo_contradictions,
    "kto": _moving_reference,
    "online_dpo": _online_dpo_contradictions,
    "grpo": _grpo_contradictions,
    "rloo": _grpo_contradictions,
    "ppo": _policy_contradictions,
}
