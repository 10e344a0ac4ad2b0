"""Inherited fields that would be ignored, or do harm, in our trainers: setting one is an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from burnish.config.predicates import count, is_text, text_problem

__all__ = ["REFUSED", "REFUSED_FOR", "Kind", "met_fields", "refused_fields"]

Met: TypeAlias = tuple[Callable[[Any], bool], str]
"""What a value must be, and what to do where it is not."""

Kind: TypeAlias = Literal["sft", "reward", "dpo", "kto", "online_dpo", "grpo", "rloo", "ppo"]
"""A stage that trains."""

_METRICS = "evaluation here yields sums of losses or solved problems, never logits of a batch; remove the field"
_NOISE = "noise on embeddings is part of supervised fine-tuning only; remove the field"
_SHARDED = "sharded training is not supported yet; use one device, or several with torchrun (DDP)"

REFUSED: dict[str, str] = {
    "accelerator_config": "batches are packed before accelerate sees them and cannot be split or sent on; "
    "remove the field",
    "auto_find_batch_size": "a smaller batch would break groups apart; lower token_budget to bound memory",
    "average_tokens_across_devices": "denominators are always global; remove the field",
    "batch_eval_metrics": _METRICS,
    "bf16_full_eval": "it would cast the trained weights for good; set bf16 = true for bf16 compute",
    "deepspeed": _SHARDED,
    "do_predict": "there is no prediction stage; use `burnish eval`",
    "fp16": "losses are not scaled for fp16; set bf16 = true, or train in fp32",
    "fp16_full_eval": "it would cast the trained weights for good; set bf16 = true for bf16 compute",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "include_for_metrics": _METRICS,
    "label_names": "packed batches carry their own targets; remove the field",
    "label_smoothing_factor": "the losses here are not smoothed; remove the field",
    "logging_nan_inf_filter": "it hides NaN and infinite losses; remove the field",
    "parallelism_config": _SHARDED,
    "remove_unused_columns": "rewards and row formats need the data set's columns; remove the field",
    "torch_compile": "the attention layout of packed rows is not traced by the compiler; remove the field",
    "torch_compile_backend": "it turns torch_compile on, which packed rows do not support; remove the field",
    "torch_compile_mode": "it turns torch_compile on, which packed rows do not support; remove the field",
}
"""Inherited field -> why no trainer honours it, and what to do. Only a value other than the default is refused."""

_ONLINE: dict[str, str] = {
    "data_seed": "prompt order and every sample are drawn from seed; set seed",
    "neftune_noise_alpha": _NOISE,
    "train_sampling_strategy": "prompts are drawn by this trainer; use shuffle_dataset",
}

REFUSED_FOR: dict[Kind, dict[str, str]] = {
    "sft": {},
    "reward": {"neftune_noise_alpha": _NOISE},
    "dpo": {"neftune_noise_alpha": _NOISE},
    "kto": {"neftune_noise_alpha": _NOISE},
    "online_dpo": _ONLINE,
    "grpo": _ONLINE,
    "rloo": _ONLINE,
    "ppo": _ONLINE,
}
"""The same, for some stages only."""


_STEPS: Met = (count(1), "use at least 1, or leave it out")
_SWITCH: Met = (lambda value: isinstance(value, bool), "use true or false")
_NAME: Met = (lambda value: is_text(value) and text_problem(value) is None, "use a text of whole characters")

_MET: dict[str, Met] = {
    "eval_accumulation_steps": _STEPS,
    "eval_do_concat_batches": _SWITCH,
    "eval_use_gather_object": _SWITCH,
    "length_column_name": _NAME,
    "liger_kernel_config": (lambda value: isinstance(value, dict), "use a table"),
    "local_rank": (count(-1), "use an integer of at least -1"),
    "torch_empty_cache_steps": _STEPS,
    "use_cache": _SWITCH,
    "use_liger_kernel": _SWITCH,
}
"""Inherited field -> values whose intent is met in every stage, or that change nothing: they are dropped."""

_MET_ONLINE: dict[str, Met] = {
    "dataloader_drop_last": _SWITCH,
    "dataloader_in_order": _SWITCH,
    "dataloader_multiprocessing_context": _NAME,
    "dataloader_num_workers": (count(0), "use an integer in [0, 1024]"),
    "dataloader_persistent_workers": _SWITCH,
    "dataloader_prefetch_factor": _STEPS,
    "ignore_data_skip": _SWITCH,
}
"""The same where the trainer draws prompts itself, and its data loader only counts steps."""


def met_fields(kind: Kind) -> dict[str, Met]:
    """Inherited fields of one stage that are dropped, each with the values that it may have, and the fix of others."""
    return _MET | (_MET_ONLINE if REFUSED_FOR[kind] is _ONLINE else {})


def refused_fields(kind: Kind) -> dict[str, str]:
    """Every refused field of one stage with its reason."""
    return REFUSED | REFUSED_FOR[kind]
