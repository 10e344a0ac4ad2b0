"""Configuration fields of TRL's that burnish does not have: what to do instead, and the value that asks for nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from burnish.config.stages import Kind, known_fields, met_fields
from burnish.config.translated import translate
from burnish.errors import ConfigError, show

__all__ = ["Elsewhere", "drop_elsewhere", "elsewhere"]


class Elsewhere(NamedTuple):
    """A field that is not there.

    Attributes:
        neutral: the value that changes nothing here; a field that holds it is dropped.
        fix: why the field does not exist, and what to do.
        met: types of values whose intent is met whatever they are: such a field is dropped, and named in the log.
    """

    neutral: Any
    fix: str
    met: tuple[type, ...] = ()


_OFF = (None, False)

_PACKED = "rows are packed without padding and do not see each other, whatever their lengths; remove the field"
_IN_PROCESS = "completions are sampled in process, from the weights being trained; remove the field"
_ONE_CACHE = "the sampler keeps one cache of its own, each prompt in it once; remove the field"
_PRINTED = "set log_completions and read the transcripts with `burnish report`"
_NOT_THERE = "this loss or correction does not exist here; remove the field"
_CORRECTION = "set sampling_correction, sampling_correction_max and sampling_correction_min, for every engine"
_ADAPTERS = "with adapters the reference is the same model with them switched off; remove the field"
_BLOCKS = (
    "a batch counts rows here, not blocks of max_length tokens, and rows are packed without padding anyway; remove the "
    "field and set per_device_train_batch_size to the rows of a step"
)
_SPLIT = "rows are packed whole; set truncation_mode to split for texts that become several rows"

_COMMON: dict[str, Elsewhere] = {
    "activation_offloading": Elsewhere(
        False, "set gradient_checkpointing = true, which keeps less than it offloads", (bool,)
    ),
    "cast_lm_head_to_fp32": Elsewhere(
        False, "log-probabilities are computed in fp32 anyway; remove the field", (bool,)
    ),
    "dataset_batch_size": Elsewhere(None, "rows are encoded one by one; remove the field", (int,)),
    "dataset_kwargs": Elsewhere(None, "burnish reads rows as they are; describe them in [data], or prepare them"),
    "dataset_num_proc": Elsewhere(None, "rows are encoded in one process; remove the field", (int,)),
    "ds3_gather_for_generation": Elsewhere(True, "sharded training is not supported yet; remove the field", (bool,)),
    "max_seq_length": Elsewhere(None, "its name is max_length"),
    "packing": Elsewhere(False, _BLOCKS, (bool,)),
    "pad_to_multiple_of": Elsewhere((None, "auto"), "rows are packed, there is no padding; remove the field", (int,)),
    "router_aux_loss_coef": Elsewhere(
        (None, 0.0),
        "the load-balancing loss of a mixture of experts is a product of means, which a packed row would change; "
        "it is not trained; remove the field",
    ),
    "use_liger_loss": Elsewhere(
        False, "log-probabilities already come from a tiled head that holds no logits; remove the field", (bool,)
    ),
    "warmup_ratio": Elsewhere(0.0, "set warmup_steps to the share itself, such as 0.1"),
}

_PAD_TOKEN = Elsewhere(None, "rows are packed, there is no padding; give a processing_class that has the pad_token")
_REFERENCE: dict[str, Elsewhere] = {
    "force_use_ref_model": Elsewhere(False, "pass ref_model to use one beside adapters; remove the field", (bool,)),
    "generate_during_eval": Elsewhere(False, "sample with `burnish eval`; remove the field"),
    "is_encoder_decoder": Elsewhere(_OFF, "models are decoders only; remove the field"),
    "label_pad_token_id": Elsewhere(-100, _PACKED, (int,)),
    "max_completion_length": Elsewhere(None, "max_length is of a prompt and its completion together; set max_length"),
    "max_prompt_length": Elsewhere(None, "max_length is of a prompt and its completion together; set max_length"),
    "model_adapter_name": Elsewhere(None, _ADAPTERS),
    "pad_token": _PAD_TOKEN,
    "padding_free": Elsewhere(False, _PACKED, (bool,)),
    "padding_value": Elsewhere(None, _PACKED, (int,)),
    "precompute_ref_batch_size": Elsewhere(None, "the reference runs within token_budget; set token_budget", (int,)),
    "ref_adapter_name": Elsewhere(None, _ADAPTERS),
    "ref_model_init_kwargs": Elsewhere(None, "load the reference with them and pass it as ref_model"),
    "shuffle_dataset": Elsewhere(_OFF, "set train_sampling_strategy to random or sequential"),
    "truncation_mode": Elsewhere(
        "keep_start", "completions share their prompt, so sequences are cut at their end; raise max_length"
    ),
    "use_logits_to_keep": Elsewhere(_OFF, "logits are never kept; remove the field", (bool,)),
}

_ONLINE: dict[str, Elsewhere] = {
    "cache_implementation": Elsewhere(None, _ONE_CACHE, (str,)),
    "generation_batch_size": Elsewhere(None, "set steps_per_generation"),
    "generation_kwargs": Elsewhere(None, "set the fields of sampling that it names; use a table"),
    "log_completions_hub_repo": Elsewhere(None, _PRINTED),
    "log_multimodal": Elsewhere((True, False), "completions are text; remove the field", (bool,)),
    "log_unique_prompts": Elsewhere(False, _PRINTED, (bool,)),
    "num_completions_to_print": Elsewhere(None, _PRINTED, (int,)),
    "ref_model_mixup_alpha": Elsewhere(
        0.6, "the reference does not move in online stages; remove the field", (float, int)
    ),
    "ref_model_sync_steps": Elsewhere(512, "the reference does not move in online stages; remove the field", (int,)),
    "sync_ref_model": Elsewhere(False, "the reference does not move in online stages; remove the field"),
    "transformers_continuous_batching_config": Elsewhere(None, _IN_PROCESS, (dict,)),
    "use_transformers_continuous_batching": Elsewhere(False, _IN_PROCESS, (bool,)),
    "use_transformers_paged": Elsewhere(False, _IN_PROCESS, (bool,)),
    "use_vllm": Elsewhere(False, _IN_PROCESS),
    "vllm_enable_sleep_mode": Elsewhere(False, _IN_PROCESS, (bool,)),
    "vllm_gpu_memory_utilization": Elsewhere(0.3, _IN_PROCESS, (float, int)),
    "vllm_group_port": Elsewhere(51216, _IN_PROCESS, (int,)),
    "vllm_max_model_length": Elsewhere(None, _IN_PROCESS, (int,)),
    "vllm_mode": Elsewhere("colocate", _IN_PROCESS, (str,)),
    "vllm_model_impl": Elsewhere("vllm", _IN_PROCESS, (str,)),
    "vllm_server_base_url": Elsewhere(None, _IN_PROCESS, (str,)),
    "vllm_server_host": Elsewhere("0.0.0.0", _IN_PROCESS, (str,)),
    "vllm_server_port": Elsewhere(8000, _IN_PROCESS, (int,)),
    "vllm_server_timeout": Elsewhere(240.0, _IN_PROCESS, (float, int)),
    "vllm_structured_outputs_regex": Elsewhere(None, _IN_PROCESS),
    "vllm_tensor_parallel_size": Elsewhere(1, _IN_PROCESS, (int,)),
}

_POLICY: dict[str, Elsewhere] = {
    "max_tool_calling_iterations": Elsewhere(None, "a completion is one turn; remove the field", (int,)),
    "vllm_importance_sampling_cap": Elsewhere(None, _CORRECTION, (float, int)),
    "vllm_importance_sampling_clip_max": Elsewhere((3.0, None), _CORRECTION, (float, int)),
    "vllm_importance_sampling_clip_min": Elsewhere(None, _CORRECTION, (float, int)),
    "vllm_importance_sampling_correction": Elsewhere((True, False), _CORRECTION, (bool,)),
    "vllm_importance_sampling_mode": Elsewhere("sequence_mask", _CORRECTION, (str,)),
}

_BY_KIND: dict[Kind, dict[str, Elsewhere]] = {
    "sft": {
        "eval_packing": Elsewhere(_OFF, _BLOCKS, (bool,)),
        "packing_strategy": Elsewhere(("bfd", "ffd"), _SPLIT),
        "pad_token": _PAD_TOKEN,
        "padding_free": Elsewhere(False, _PACKED, (bool,)),
        "shuffle_dataset": Elsewhere(_OFF, "set train_sampling_strategy to random or sequential"),
    },
    "reward": {},
    "dpo": {
        **_REFERENCE,
        "cpo_alpha": Elsewhere(
            0.0, 'set loss_type = ["cpo", "sft"] and loss_weights = [1.0, 1.0], whose second number is cpo_alpha'
        ),
        "reference_free": Elsewhere(
            False, "losses without a reference are cpo, simpo, alphapo and orpo; set loss_type"
        ),
        "rpo_alpha": Elsewhere(
            None, 'set loss_type = ["sigmoid", "sft"] and loss_weights = [1.0, 1.0], whose second number is rpo_alpha'
        ),
    },
    "kto": _REFERENCE,
    "online_dpo": {
        **_ONLINE,
        "off_policy_mask_threshold": Elsewhere(None, _NOT_THERE),
        "max_length": Elsewhere(None, "set max_prompt_length and max_completion_length"),
        "max_new_tokens": Elsewhere(None, "its name is max_completion_length"),
        "missing_eos_penalty": Elsewhere(None, "set mask_truncated_completions, or add a reward function that sees it"),
        "reward_model_path": Elsewhere(None, "pass burnish.RewardModel(path) among reward_funcs"),
    },
    "grpo": {**_ONLINE, **_POLICY},
    "rloo": {**_ONLINE, **_POLICY},
    "ppo": {
        **_ONLINE,
        "local_rollout_forward_batch_size": Elsewhere(64, "forwards run within token_budget; set token_budget", (int,)),
        "num_mini_batches": Elsewhere(1, "set steps_per_generation: micro-batches that one round of sampling feeds"),
        "num_sample_generations": Elsewhere(10, "set eval_strategy, and log_completions for transcripts", (int,)),
        "reward_model_path": Elsewhere(None, "pass it to the trainer as reward_model"),
        "sft_model_path": Elsewhere(None, "pass it to the trainer as model"),
        "stop_token": Elsewhere((None, "eos"), "completions end at the tokenizer's EOS; set stop for other strings"),
        "stop_token_id": Elsewhere(None, "completions end at the tokenizer's EOS; set stop for other strings"),
        "total_episodes": Elsewhere(None, "set max_steps or num_train_epochs"),
    },
}


@cache
def elsewhere(kind: Kind) -> dict[str, Elsewhere]:
    """The fields that TRL's config of a stage has and ours does not."""
    return _COMMON | _BY_KIND[kind]


logger = logging.getLogger("burnish.config")


def drop_elsewhere(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their names here, without those that ask for what happens here anyway.

    One line of the log names the fields of which the intent is met.

    Args:
        kind: the stage.
        values: fields as given.

    Raises:
        ConfigError: one that asks for something else, or one field by two names.
    """
    from burnish.config.validation import fits, plain

    known = known_fields(kind)
    kept: dict[str, Any] = {}
    met: list[str] = []
    for name, value in translate(kind, values).items():
        there = elsewhere(kind).get(name)
        if name in known:
            if name in met_fields(kind) and fits(known[name], plain(value)):
                met += [name] if value != known[name].default else []
            else:  # what is not allowed is coerced and refused with the other fields
                kept[name] = value
        elif there is None:
            kept[name] = value
        elif not _is_neutral(value, there.neutral):
            if type(value) not in there.met or not _fits(value):
                raise ConfigError(f"{name} = {show(value)}: not a field of burnish; {there.fix}.")
            met.append(name)
    if met:
        logger.info("accepted, since it is done anyway or changes nothing: %s", ", ".join(sorted(met)))
    return kept


def _fits(value: Any) -> bool:
    """Whether an integer fits 64 bits: nonsense is refused, even where nothing would read it."""
    return not isinstance(value, int) or abs(value) < 2**63


def _is_neutral(value: Any, neutral: Any) -> bool:
    choices = neutral if isinstance(neutral, tuple) else (neutral,)
    return any(type(value) is type(one) and value == one for one in choices)
