"""Which fields of a config contradict each other: plain functions of a mapping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from burnish.config.predicates import as_names
from burnish.config.refused import Kind

__all__ = ["CONTRADICTIONS", "micro_batches_per_rollout"]


def _sft_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    if values["assistant_only_loss"] and values["completion_only_loss"]:
        yield (
            "assistant_only_loss = True beside completion_only_loss = True: they choose different tokens; set one of "
            "them, assistant_only_loss for conversations, completion_only_loss for prompt-completion rows."
        )


def _dpo_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    names, weights, eps = as_names(values["loss_type"]), values["loss_weights"], values["label_smoothing"]
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
    if values["delta"] is not None and values["loss_type"] in ("cispo", "sapo", "vespo"):
        yield f"delta = {values['delta']!r} with loss_type {values['loss_type']}: it has no clip to bound; remove it."
    if values["loss_type"] == "luspo" and values["importance_sampling_level"] != "sequence":
        yield "importance_sampling_level with loss_type luspo: its ratio is the sequence's; use sequence."
    if values["loss_type"] == "vespo" and values["importance_sampling_level"] != "token":
        yield (
            f"importance_sampling_level = {values['importance_sampling_level']!r} with loss_type vespo: it makes the "
            "sequence's ratio of the tokens' by itself; use token."
        )
    yield from _entropy_contradictions(values)
    yield from _kl_contradictions(values)
    yield from _correction_contradictions(values)
    yield from _online_contradictions(values)


def _entropy_contradictions(values: Mapping[str, Any]) -> Iterable[str]:
    if not values["use_adaptive_entropy"]:
        return
    coef, low, high = (values[f"entropy_coef{end}"] for end in ("", "_min", "_max"))
    if low >= high:
        yield f"entropy_coef_min = {low!r}: not below entropy_coef_max = {high!r}; use a smaller one."
    elif not low <= coef <= high:
        yield (
            f"entropy_coef = {coef!r} with use_adaptive_entropy = True: an adaptive weight starts between "
            f"entropy_coef_min = {low!r} and entropy_coef_max = {high!r}; use a number there."
        )


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
    if values["loss_type"] == "vespo" and kind.startswith("sequence"):
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


def micro_batches_per_rollout(steps_per_generation: int | None, gradient_accumulation_steps: int) -> int:
    """Count the micro-batches that are sampled at once.

    A round of fewer than an optimizer step takes leaves the weights as they are, so the step's rounds are sampled
    together.
    """
    return max(steps_per_generation or 1, gradient_accumulation_steps)


def _incomplete_groups(values: Mapping[str, Any]) -> Iterable[str]:
    """A round of sampling holds whole groups: completions = batch size x processes x steps, a multiple of G."""
    size = values["per_device_train_batch_size"]
    accumulation, asked = values["gradient_accumulation_steps"], values["steps_per_generation"]
    fitting = [n for n in range(1, accumulation) if accumulation % n == 0]
    if asked is not None and asked % accumulation and asked not in fitting:
        below = asked // accumulation * accumulation
        near = sorted({*fitting, *([below] if below else []), below + accumulation})
        yield (
            f"steps_per_generation = {asked}: an optimizer step takes gradient_accumulation_steps = {accumulation} "
            f"micro-batches, so rounds would end inside a step; use one of {', '.join(map(str, near))}, or another "
            f"multiple of {accumulation}."
        )
        return
    if asked in fitting and values.get("num_iterations", 1) > 1:
        yield (
            f"steps_per_generation = {asked} with num_iterations = {values['num_iterations']}: a round of sampling "
            f"would be gone through again within one optimizer step, of gradient_accumulation_steps = {accumulation}; "
            f"use a multiple of {accumulation}, or num_iterations = 1."
        )
    steps = micro_batches_per_rollout(asked, accumulation)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    total, group = size * processes * steps, values["num_generations"]
    if total % group:
        yield (
            f"num_generations = {group}: one round samples {total} completions (per_device_train_batch_size {size} x "
            f"{processes} processes x {steps} steps), which holds no whole number of groups; "
            f"make the product a multiple of {group}, for instance per_device_train_batch_size = {group}."
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


CONTRADICTIONS: dict[Kind, Callable[[Mapping[str, Any]], Iterable[str]]] = {
    "sft": _sft_contradictions,
    "reward": _none,
    "dpo": _dpo_contradictions,
    "kto": _moving_reference,
    "online_dpo": _online_dpo_contradictions,
    "grpo": _grpo_contradictions,
    "rloo": _grpo_contradictions,
    "ppo": _policy_contradictions,
}
"""Stage -> function of all fields that yields an error message for each contradiction."""
