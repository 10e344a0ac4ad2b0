"""Inherited fields that would be ignored, or do harm, in our trainers: setting one is an error that says what to do."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["REFUSED", "REFUSED_FOR", "Kind", "refused_fields"]

Kind: TypeAlias = Literal["sft", "reward", "dpo", "kto", "online_dpo", "grpo", "rloo", "ppo"]
"""A stage that trains."""

_LOADER = "this trainer draws prompts itself and its data loader only counts steps; remove the field"
_METRICS = "evaluation here yields sums of losses or solved problems, never logits of a batch; remove the field"
_HEAD = "log-probabilities already come from a tiled head that holds no logits; remove the field"
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
    "eval_accumulation_steps": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "fp16": "losses are not scaled for fp16; set bf16 = true, or train in fp32",
    "fp16_full_eval": "it would cast the trained weights for good; set bf16 = true for bf16 compute",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "include_for_metrics": _METRICS,
    "label_names": "packed batches carry their own targets; remove the field",
    "label_smoothing_factor": "the losses here are not smoothed; remove the field",
    "length_column_name": "packing already balances batches by length; remove the field",
    "liger_kernel_config": _HEAD,
    "local_rank": "transformers no longer reads it; the launcher sets LOCAL_RANK",
    "logging_nan_inf_filter": "it hides NaN and infinite losses; remove the field",
    "parallelism_config": _SHARDED,
    "remove_unused_columns": "rewards and row formats need the data set's columns; remove the field",
    "torch_compile": "the attention layout of packed rows is not traced by the compiler; remove the field",
    "torch_compile_backend": "it turns torch_compile on, which packed rows do not support; remove the field",
    "torch_compile_mode": "it turns torch_compile on, which packed rows do not support; remove the field",
    "torch_empty_cache_steps": "the training step here is our own; lower token_budget to bound memory",
    "use_cache": "scoring never fills a cache, sampling always does; remove the field",
    "use_liger_kernel": _HEAD,
}
"""Inherited field -> why no trainer honours it, and what to do. Only a value other than the default is refused."""

_ONLINE: dict[str, str] = {
    "data_seed": "prompt order and every sample are drawn from seed; set seed",
    "dataloader_drop_last": _LOADER,
    "dataloader_in_order": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "ignore_data_skip": "the place in the prompts is part of each checkpoint, nothing is skipped; remove the field",
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


def refused_fields(kind: Kind) -> dict[str, str]:
    """Every refused field of one stage with its reason."""
    return REFUSED | REFUSED_FOR[kind]
