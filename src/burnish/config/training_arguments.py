"""How burnish treats each field inherited from transformers.TrainingArguments.

A row sets the resume class, and may restrict the values, refuse the field with a fix, or drop it because its intent is
met anyway. Tests compare the table with the fields of the installed version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Interval

from burnish.config.declare import (
    BelowOne,
    Count,
    Meets,
    NonNegative,
    Positive,
    ResumeClass,
    Seed,
    Text,
)
from burnish.config.sources import words_of

__all__ = ["TRAINING_ARGUMENTS", "Inherited"]

Stages: TypeAlias = Literal["all", "online", "all but sft"]


@dataclass(frozen=True, slots=True)
class Inherited:
    """One inherited field.

    Attributes:
        resume: treatment of a change on resume.
        hint: type with bounds; None takes transformers' annotation, without bounds.
        fix: how to correct an invalid value; empty derives it from the bounds.
        refused: why only the default is supported, and the fix; empty if the field works.
        met: whether the field is accepted and dropped, because its intent is met anyway.
        stages: where it is refused or dropped.
    """

    resume: ResumeClass
    hint: Any = None
    fix: str = ""
    refused: str = ""
    met: bool = False
    stages: Stages = "all"


def _free(hint: Any = None, fix: str = "") -> Inherited:
    return Inherited("free", hint, fix)


def _applied(hint: Any = None, fix: str = "") -> Inherited:
    return Inherited("applied", hint, fix)


def _refused(fix: str, stages: Stages = "all") -> Inherited:
    return Inherited("refused", refused=fix, stages=stages)


def _met(hint: Any, resume: ResumeClass = "free", stages: Stages = "all") -> Inherited:
    return Inherited(resume, hint, met=True, stages=stages)


def _word(path: str, enumeration: str) -> Any:
    """Build the type of a word or member of an enumeration of transformers."""

    def problem(value: Any) -> str | None:
        words = words_of(path, enumeration)
        is_one = isinstance(value, Enum) or (isinstance(value, str) and value in words)
        return None if is_one else f"use one of {', '.join(words)}"

    return Annotated[Any, Meets(problem)]


def _table(value: Any) -> str | None:
    """Require a table, or the JSON text of one, which transformers accepts on command lines."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    return None if isinstance(value, dict) else "use a table of arguments, or leave it out"


def _norm(value: float) -> str | None:
    return None if value >= 0 else "use a number of at least 0; 0 disables clipping"


def _only_false(value: bool) -> str | None:
    return "use the name of a space, false, or leave it out" if value else None


_False = Annotated[bool, Meets(_only_false)]
_TABLE = Annotated[dict[str, Any] | str, Meets(_table)] | None
_STEPS = "use a number of steps above 0; below 1 it is a fraction of all steps"
_LEVEL = Literal["debug", "detail", "info", "warning", "error", "critical", "passive"]
_METRICS = "evaluation computes losses and solved problems without keeping the logits of a batch; remove the field"
_SHARDED = "sharded training is not supported yet; use one device, or several with torchrun (DDP)"
_COMPILED = "it enables torch_compile, which packed rows do not support; remove the field"
_CAST = "it would permanently cast the trained weights; set bf16 = true for bf16 compute"

TRAINING_ARGUMENTS: dict[str, Inherited] = {
    "accelerator_config": _refused(
        "batches are packed before accelerate gets them and cannot be split or dispatched; remove the field"
    ),
    "activation_checkpointing": _free(),
    "activation_checkpointing_kwargs": _free(_TABLE),
    "adam_beta1": _applied(BelowOne),
    "adam_beta2": _applied(BelowOne),
    "adam_epsilon": _applied(NonNegative, "use a number of at least 0, such as 1e-8"),
    "auto_find_batch_size": _refused("a smaller batch would split groups; lower token_budget to limit memory"),
    "average_tokens_across_devices": _refused("denominators are always global; remove the field"),
    "batch_eval_metrics": _refused(_METRICS),
    "bf16_full_eval": _refused(_CAST),
    "data_seed": Inherited(
        "refused", Seed | None, refused="prompt order and samples are drawn from seed; set seed", stages="online"
    ),
    "dataloader_drop_last": _met(bool, "refused", "online"),
    "dataloader_in_order": _met(bool, stages="online"),
    "dataloader_multiprocessing_context": _met(Text | None, stages="online"),
    "dataloader_num_workers": _met(Annotated[int, Interval(ge=0, le=1024)], stages="online"),
    "dataloader_persistent_workers": _met(bool, stages="online"),
    "dataloader_pin_memory": _free(),
    "dataloader_prefetch_factor": _met(Count | None, stages="online"),
    "ddp_backend": _free(
        Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"] | None, "use gloo or nccl"
    ),
    "ddp_broadcast_buffers": _free(),
    "ddp_bucket_cap_mb": _free(Count | None),
    "ddp_find_unused_parameters": _free(),
    "ddp_static_graph": _free(),
    "ddp_timeout": _free(Count, "use a number of seconds of at least 1"),
    "debug": _free(),
    "deepspeed": _refused(_SHARDED),
    "disable_tqdm": _free(),
    "do_eval": _free(),
    "do_predict": _refused("burnish has no prediction loop; use `burnish eval`"),
    "do_train": _free(),
    "enable_jit_checkpoint": _free(),
    "eval_accumulation_steps": _met(Count | None),
    "eval_delay": _free(NonNegative),
    "eval_do_concat_batches": _met(bool),
    "eval_on_start": _free(),
    "eval_steps": _free(Positive | None, "use a number of steps above 0, or leave it out"),
    "eval_strategy": _free(_word("trainer_utils.py", "IntervalStrategy")),
    "eval_use_gather_object": _met(bool),
    "fp16": _refused("fp16 loss scaling is not supported; set bf16 = true, or train in fp32"),
    "fp16_full_eval": _refused(_CAST),
    "fsdp": _refused(_SHARDED),
    "fsdp_config": _refused(_SHARDED),
    "full_determinism": _free(),
    "gradient_checkpointing": _free(),
    "gradient_checkpointing_kwargs": _free(_TABLE),
    "greater_is_better": _applied(),
    "hub_always_push": _free(),
    "hub_model_id": _free(),
    "hub_private_repo": _free(),
    "hub_revision": _free(),
    "hub_strategy": _free(_word("trainer_utils.py", "HubStrategy")),
    "hub_token": _free(),
    "ignore_data_skip": _met(bool, "applied", "online"),
    "include_for_metrics": _refused(_METRICS),
    "include_num_input_tokens_seen": _free(Literal["all", "non_padding", "no"] | bool, "use all, non_padding or no"),
    "label_names": _refused("packed batches hold their targets; remove the field"),
    "label_smoothing_factor": _refused("losses are not label-smoothed; remove the field"),
    "length_column_name": _met(Text, "refused"),
    "liger_kernel_config": _met(dict[str, Any] | None, "refused"),
    "load_best_model_at_end": _free(),
    "local_rank": _met(Annotated[int, Ge(-1)], "refused"),
    "log_level": _free(_LEVEL),
    "log_level_replica": _free(_LEVEL),
    "log_on_each_node": _free(),
    "logging_strategy": _free(_word("trainer_utils.py", "IntervalStrategy")),
    "lr_scheduler_kwargs": _applied(_TABLE),
    "lr_scheduler_type": _applied(_word("trainer_utils.py", "SchedulerType")),
    "max_grad_norm": _applied(Annotated[float, Meets(_norm)]),
    "metric_for_best_model": _applied(),
    "neftune_noise_alpha": Inherited(
        "applied",
        Positive | None,
        "use a number above 0, such as 5, or leave it out",
        refused="only supervised fine-tuning supports noise on embeddings; remove the field",
        stages="all but sft",
    ),
    "optim": Inherited("refused", _word("training_args.py", "OptimizerNames")),
    "optim_args": Inherited("refused"),
    "optim_target_modules": Inherited("refused"),
    "parallelism_config": _refused(_SHARDED),
    "per_device_eval_batch_size": _free(Count),
    "prediction_loss_only": _free(),
    "project": _free(),
    "push_to_hub": _free(),
    "report_to": _free(),
    "restore_callback_states_from_checkpoint": _free(),
    "run_name": _free(),
    "save_on_each_node": _free(),
    "save_only_model": _free(),
    "save_steps": _free(Positive, _STEPS),
    "save_strategy": _free(_word("trainer_utils.py", "SaveStrategy")),
    "save_total_limit": _free(Count | None, "use at least 1 checkpoint, or leave it out to keep all"),
    "skip_memory_metrics": _free(),
    "tf32": _applied(),
    "torch_compile": _refused("the compiler cannot trace the attention layout of packed rows; remove the field"),
    "torch_compile_backend": _refused(_COMPILED),
    "torch_compile_mode": _refused(_COMPILED),
    "torch_empty_cache_steps": _met(Count | None, "refused"),
    "trackio_bucket_id": _free(),
    "trackio_space_id": _free(),
    "trackio_static_space_id": _free(str | _False | None),
    "train_sampling_strategy": Inherited(
        "refused",
        Literal["random", "sequential"],
        "use random or sequential; packing already balances batches by length",
        refused="online stages draw prompts themselves; set shuffle_dataset",
        stages="online",
    ),
    "use_cache": _met(bool, "refused"),
    "use_cpu": _free(),
    "use_liger_kernel": _met(bool, "refused"),
}
