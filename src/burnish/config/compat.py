"""What TRL has by another name, in another place, or not at all: fields of configs, arguments of trainers, and imports.

Only names that mean nothing here are looked up: what is met anyway is accepted with a line in the log, what can be said
otherwise is rewritten, and anything else is an error with the fix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, cast

from burnish.config.stages import ONLINE, Kind
from burnish.errors import ConfigError

__all__ = [
    "ALIASES", "MOVED_ARGUMENTS", "NO_IMPORTS", "REFUSED_ARGUMENTS", "Elsewhere", "elsewhere", "translate",
    "translated_names",
]  # fmt: skip


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

_ONLINE_FIELDS: dict[str, Elsewhere] = {
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

_POLICY_FIELDS: dict[str, Elsewhere] = {
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
        **_ONLINE_FIELDS,
        "off_policy_mask_threshold": Elsewhere(None, _NOT_THERE),
        "max_length": Elsewhere(None, "set max_prompt_length and max_completion_length"),
        "max_new_tokens": Elsewhere(None, "its name is max_completion_length"),
        "missing_eos_penalty": Elsewhere(None, "set mask_truncated_completions, or add a reward function that sees it"),
        "reward_model_path": Elsewhere(None, "pass burnish.RewardModel(path) among reward_funcs"),
    },
    "grpo": {**_ONLINE_FIELDS, **_POLICY_FIELDS},
    "rloo": {**_ONLINE_FIELDS, **_POLICY_FIELDS},
    "ppo": {
        **_ONLINE_FIELDS,
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
    return _COMMON | _BY_KIND.get(kind, {})


ALIASES: dict[Kind, dict[str, str]] = {
    "ppo": {
        "cliprange": "epsilon",
        "kl_coef": "beta",
        "num_ppo_epochs": "num_iterations",
        "response_length": "max_completion_length",
    },
}
"""Names that TRL gave to fields of a stage -> the names here."""

_EVERYWHERE = {"chat_template_path": "chat_template"}

_GENERATION = {
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop": "stop",
    "stop_strings": "stop",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Names in `generation_kwargs` -> fields."""

_GENERATION_NEUTRAL: dict[str, Any] = {
    "bos_token_id": None, "disable_compile": True, "do_sample": True, "eos_token_id": None, "num_beams": 1,
    "num_return_sequences": 1, "pad_token_id": None, "use_cache": True,
}  # fmt: skip
"""Names in `generation_kwargs` that ask for what happens anyway."""


def translated_names(kind: Kind) -> tuple[str, ...]:
    """Names that `translate` rewrites in a stage."""
    online = ("generation_kwargs", "generation_batch_size") if kind in ONLINE else ()
    shuffled = ("shuffle_dataset",) if "shuffle_dataset" in elsewhere(kind) else ()
    return ("warmup_ratio", *_EVERYWHERE, *ALIASES.get(kind, {}), *online, *shuffled)


def translate(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their names here.

    Raises:
        ConfigError: one field by two names, or a value that has no counterpart.
    """
    renamed: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def put(name: str, value: Any, given: str) -> None:
        if value is None and name in renamed:
            return
        if renamed.get(name) is not None and origin[name] != given:
            other = origin[name] if given == name else given
            raise ConfigError(f"{other} and {name} are one field: set {name} alone.")
        renamed[name], origin[name] = value, given

    aliases = _EVERYWHERE | ALIASES.get(kind, {})
    for given, value in values.items():
        put(aliases.get(given, given), value, given)
    ratio = renamed.get("warmup_ratio")
    if isinstance(ratio, float) and 0 < ratio < 1:
        put("warmup_steps", renamed.pop("warmup_ratio"), "warmup_ratio")
    if "shuffle_dataset" in elsewhere(kind) and renamed.get("shuffle_dataset") is True:
        del renamed["shuffle_dataset"]
        put("train_sampling_strategy", "random", "shuffle_dataset")
    if kind in ONLINE and renamed.get("generation_kwargs") is not None:
        for name, (value, given) in _sampling(renamed.pop("generation_kwargs")).items():
            put(name, value, given)
    if kind in ONLINE and renamed.get("generation_batch_size") is not None:
        size = renamed.pop("generation_batch_size")
        put("steps_per_generation", _steps(size, renamed), "generation_batch_size")
    return renamed


def _sampling(kwargs: Any) -> dict[str, tuple[Any, str]]:
    """Fields that `generation_kwargs` set, each with the name it was given by."""
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"generation_kwargs = {kwargs!r:.80}: use a table, such as {{top_p = 0.9}}.")
    fields: dict[str, tuple[Any, str]] = {}
    for name, value in cast("Mapping[str, Any]", kwargs).items():
        if name in _GENERATION_NEUTRAL and _GENERATION_NEUTRAL[name] == value:
            continue
        if name not in _GENERATION:
            raise ConfigError(
                f"generation_kwargs[{name!r}] = {value!r:.80}: not a way of sampling here; use "
                f"{', '.join(sorted(_GENERATION))}."
            )
        listed = [value] if _GENERATION[name] == "stop" and isinstance(value, str) else value
        fields[_GENERATION[name]] = (listed, f"generation_kwargs[{name!r}]")
    return fields


def _steps(size: Any, fields: Mapping[str, Any]) -> int:
    """Micro-batches that a generation batch of so many completions feeds."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batch = fields.get("per_device_train_batch_size", 8) * processes
    if not isinstance(size, int) or size < 1 or size % batch:
        raise ConfigError(
            f"generation_batch_size = {size!r}: not a multiple of {batch}, per_device_train_batch_size x {processes} "
            "processes; use one, or set steps_per_generation."
        )
    return size // batch


_METRICS = (
    "evaluation yields sums of losses, never logits of a batch; read the metrics of evaluate(), or score generations "
    "with burnish.evaluation.evaluate"
)

REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "it needs the logits of a padded batch, which do not exist here; override the loss of "
    "a stage (burnish.stages)",
    "compute_metrics": _METRICS,
    "data_collator": "rows are encoded and packed by the trainer itself, so a collator would never be called; prepare "
    "the rows instead",
    "environment_factory": "a completion is one turn of text; score it with reward_funcs",
    "preprocess_logits_for_metrics": _METRICS,
    "rollout_func": "completions come from an engine; pass one as engine",
    "tools": "a completion is one turn of text; put the schemas into a tools column",
}
"""Arguments of TRL's trainers that have no place here -> what to do instead."""

MOVED_ARGUMENTS: dict[str, str] = {
    "chars_per_token": "rows are packed by their tokens; remove it",
    "config": "it is args now",
    "dataset": "it is train_dataset now",
    "formatting_func": "prepare the rows instead; SFTTrainer alone takes one",
    "generation_config": "set the fields of sampling in args, such as temperature and max_completion_length",
    "infinite": "set max_steps or num_train_epochs in args",
    "judge": "pass what compares completions as reward_funcs, which score each",
    "max_target_length": "max_length in args is of a prompt and its completion together",
    "model_init": "pass the model as model",
    "num_of_sequences": "rows are packed by their tokens; remove it",
    "policy": "it is model now",
    "ppo_config": "it is args now",
    "ref_policy": "it is ref_model now",
    "reward_model": "pass it as reward_funcs",
    "reward_processing_class": "it is reward_processing_classes now, in trainers that take reward_funcs",
    "tokenizer": "it is processing_class now",
    "torch_dtype": "it is a key of model_init_kwargs in args, as dtype",
}
"""Arguments that older trainers of TRL's had -> where they live now."""

_ROWS = "trainers read conversations, texts and pairs as they are; pass the rows unchanged"
_TEMPLATE = "set chat_template in the trainer's config, which is saved with the tokenizer"
_TURNS = "a completion is one turn of text; put tool schemas into a tools column"
_NOTHING = "there is no counterpart; pass a callback of transformers as callbacks"
_DPO = "it is DPOTrainer, whose loss_type is "
_TEACHER = "distillation from a teacher is not there yet"
_GAMES = "it is not there; OnlineDPOTrainer samples and compares pairs"
_CRITIC = "PPOTrainer adds a critic to a plain model itself"

NO_IMPORTS: dict[str, str] = {
    "AutoModelForCausalLMWithValueHead": _CRITIC,
    "AutoModelForSeq2SeqLMWithValueHead": _CRITIC,
    "BCOConfig": _DPO + '"bco_pair", and DPOConfig',
    "BCOTrainer": _DPO + '"bco_pair", and DPOConfig',
    "BEMACallback": _NOTHING,
    "CPOConfig": _DPO + '"cpo" or "simpo", and DPOConfig',
    "CPOTrainer": _DPO + '"cpo" or "simpo", and DPOConfig',
    "DataCollatorForCompletionOnlyLM": "set completion_only_loss or assistant_only_loss in SFTConfig",
    "DistillationConfig": _TEACHER,
    "DistillationTrainer": _TEACHER,
    "GKDConfig": _TEACHER,
    "GKDTrainer": _TEACHER,
    "LogCompletionsCallback": "set log_completions, and read them with `burnish report`",
    "NashMDConfig": _GAMES,
    "NashMDTrainer": _GAMES,
    "ORPOConfig": _DPO + '"orpo", and DPOConfig',
    "ORPOTrainer": _DPO + '"orpo", and DPOConfig',
    "PRMConfig": "RewardTrainer learns from rows with completions and labels, with RewardConfig",
    "PRMTrainer": "RewardTrainer learns from rows with completions and labels, with RewardConfig",
    "RichProgressCallback": "progress is shown by default (progress in the config)",
    "SyncRefModelCallback": "set sync_ref_model in DPOConfig or KTOConfig",
    "WeaveCallback": _NOTHING,
    "XPOConfig": _GAMES,
    "XPOTrainer": _GAMES,
    "add_response_schema": _TURNS,
    "apply_chat_template": _ROWS,
    "clone_chat_template": _TEMPLATE + "; the folder of another tokenizer will do",
    "create_reference_model": "pass ref_model, or leave it out: the trainer keeps the starting weights",
    "extract_prompt": _ROWS,
    "get_kbit_device_map": "remove device_map: the trainer places quantised weights itself",
    "get_training_chat_template": "assistant_only_loss finds the turns under any template; " + _TEMPLATE,
    "is_conversational": _ROWS,
    "is_conversational_from_value": _ROWS,
    "maybe_apply_chat_template": _ROWS,
    "maybe_convert_to_chatml": _ROWS,
    "maybe_extract_prompt": _ROWS,
    "maybe_unpair_preference_dataset": "KTOTrainer takes pairs as they are",
    "pack_dataset": "trainers pack rows without padding themselves; pass them unchanged",
    "prepare_multimodal_messages": "models and data are text",
    "setup_chat_format": _TEMPLATE + ' (chat_template = "chatml")',
    "supports_tool_calling": _TURNS,
    "unpair_preference_dataset": "KTOTrainer takes pairs as they are",
}
"""Name at the top of TRL, now or in older versions -> what to do here."""
