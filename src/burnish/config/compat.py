"""TRL's names that have another name or no counterpart here: fields of configs, arguments of trainers, and imports.

Only names unknown to burnish are looked up. A field whose intent is met anyway is accepted with a log line, one with a
counterpart is translated, and any other raises an error with the fix.
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
    """A field of TRL's that burnish does not have.

    Attributes:
        neutral: values without an effect here; a field with one of them is dropped.
        fix: why the field does not exist, and what to do.
        met: types whose values all have their intent met; such a field is dropped and named in the log.
    """

    neutral: tuple[Any, ...]
    fix: str
    met: tuple[type, ...] = ()


def _fields(fix: str, **fields: tuple[Any, ...]) -> dict[str, Elsewhere]:
    """Build the entries of fields with one fix, from field=(*neutral values, *types in `met`)."""
    types = {name: tuple(value for value in values if isinstance(value, type)) for name, values in fields.items()}
    return {
        name: Elsewhere(values[: len(values) - len(types[name])], fix, types[name]) for name, values in fields.items()
    }


_SHUFFLED = _fields("set train_sampling_strategy to random or sequential", shuffle_dataset=(None, False))
_PACKED = "rows are packed without padding and do not attend to each other; remove the field"
_BLOCKS = (
    "batches count rows, not blocks of max_length tokens, and rows are packed without padding anyway; remove the "
    "field and set per_device_train_batch_size to the rows of a step"
)
_PAD_TOKEN = _fields("rows are not padded; pass a processing_class that has the pad_token", pad_token=(None,))

# fmt: off
_COMMON = (
    _fields("log-probabilities are always computed in fp32; remove the field", cast_lm_head_to_fp32=(False, bool))
    | _fields("rows are encoded one by one; remove the field", dataset_batch_size=(None, int))
    | _fields("rows are read as they are; describe them in [data], or prepare them", dataset_kwargs=(None,))
    | _fields("rows are encoded in one process; remove the field", dataset_num_proc=(None, int))
    | _fields("sharded training is not supported yet; remove the field", ds3_gather_for_generation=(True, bool))
    | _fields("its name is max_length", max_seq_length=(None,))
    | _fields(_BLOCKS, packing=(False, bool))
    | _fields("rows are packed without padding; remove the field", pad_to_multiple_of=(None, "auto", int))
    | _fields("the load-balancing loss of a mixture of experts is not trained, as packing would change it (a product "
              "of means); remove the field", router_aux_loss_coef=(None, 0.0))
    | _fields("the head is always tiled and keeps no logits; remove the field", use_liger_loss=(False, bool))
    | _fields("set warmup_steps to the fraction itself, such as 0.1", warmup_ratio=(0.0,))
)
_REFERENCE = (
    _SHUFFLED | _PAD_TOKEN
    | _fields("pass ref_model to use one with adapters; remove the field", force_use_ref_model=(False, bool))
    | _fields("sample with `burnish eval`; remove the field", generate_during_eval=(False,))
    | _fields("models are decoder-only; remove the field", is_encoder_decoder=(None, False))
    | _fields(_PACKED, label_pad_token_id=(-100, int), padding_free=(False, bool), padding_value=(None, int))
    | _fields("max_length limits prompt and completion together; set max_length",
              max_completion_length=(None,), max_prompt_length=(None,))
    | _fields("with adapters, the reference is the same model without them; remove the field",
              model_adapter_name=(None,), ref_adapter_name=(None,))
    | _fields("token_budget limits the reference's forward; set token_budget", precompute_ref_batch_size=(None, int))
    | _fields("load the reference with them and pass it as ref_model", ref_model_init_kwargs=(None,))
    | _fields("completions share their prompt, so sequences are cut at their end; raise max_length",
              truncation_mode=("keep_start",))
    | _fields("logits are never kept; remove the field", use_logits_to_keep=(None, False, bool))
)
_ONLINE = (
    _fields("the sampler manages its own cache; remove the field", cache_implementation=(None, str))
    | _fields("set steps_per_generation", generation_batch_size=(None,))
    | _fields("set the sampling fields that it names; use a table", generation_kwargs=(None,))
    | _fields("set log_completions and read the transcripts with `burnish report`",
              log_completions_hub_repo=(None,), log_unique_prompts=(False, bool), num_completions_to_print=(None, int))
    | _fields("completions are text; remove the field", log_multimodal=(True, False, bool))
    | _fields("online stages keep the reference fixed; remove the field",
              ref_model_mixup_alpha=(0.6, float, int), ref_model_sync_steps=(512, int), sync_ref_model=(False,))
    | _fields("the in-process engine batches continuously; remove the field",
              transformers_continuous_batching_config=(None, dict), use_transformers_continuous_batching=(False, bool),
              use_transformers_paged=(False, bool))
    | _fields("weights reach vLLM in the process or through a folder; remove the field", vllm_group_port=(51216, int))
    | _fields("completions follow no grammar; remove the field", vllm_structured_outputs_regex=(None,))
)
_POLICY = (
    _ONLINE
    | _fields("it applies with use_vllm; set sampling_correction, sampling_correction_max and "
              "sampling_correction_min for every engine",
              vllm_importance_sampling_cap=(None, float, int),
              vllm_importance_sampling_clip_max=(3.0, None, float, int),
              vllm_importance_sampling_clip_min=(None, float, int),
              vllm_importance_sampling_correction=(True, False, bool),
              vllm_importance_sampling_mode=("sequence_mask", str))
)
_BY_KIND: dict[Kind, dict[str, Elsewhere]] = {
    "sft": _SHUFFLED | _PAD_TOKEN | _fields(_PACKED, padding_free=(False, bool))
    | _fields(_BLOCKS, eval_packing=(None, False, bool))
    | _fields("rows are packed whole; set truncation_mode to split to cut long texts into several rows",
              packing_strategy=("bfd", "ffd")),
    "dpo": _REFERENCE
    | _fields('set loss_type = ["cpo", "sft"] and loss_weights = [1.0, 1.0], whose second number is cpo_alpha',
              cpo_alpha=(0.0,))
    | _fields("losses without a reference are cpo, simpo, alphapo and orpo; set loss_type", reference_free=(False,))
    | _fields('set loss_type = ["sigmoid", "sft"] and loss_weights = [1.0, 1.0], whose second number is rpo_alpha',
              rpo_alpha=(None,)),
    "kto": _REFERENCE,
    "online_dpo": _ONLINE
    | _fields("online DPO has no off-policy mask; remove the field", off_policy_mask_threshold=(None,))
    | _fields("set max_prompt_length and max_completion_length", max_length=(None,))
    | _fields("its name is max_completion_length", max_new_tokens=(None,))
    | _fields("set mask_truncated_completions, or add a reward function for it", missing_eos_penalty=(None,))
    | _fields("pass burnish.RewardModel(path) in reward_funcs", reward_model_path=(None,)),
    "grpo": _POLICY,
    "rloo": _POLICY,
    "ppo": _ONLINE
    | _fields("token_budget limits each forward; set token_budget", local_rollout_forward_batch_size=(64, int))
    | _fields("set steps_per_generation, the micro-batches per round of sampling", num_mini_batches=(1,))
    | _fields("set eval_strategy, and log_completions for transcripts", num_sample_generations=(10, int))
    | _fields("pass it to the trainer as reward_model", reward_model_path=(None,))
    | _fields("pass it to the trainer as model", sft_model_path=(None,))
    | _fields("completions end at the tokenizer's EOS; set stop for other strings",
              stop_token=(None, "eos"), stop_token_id=(None,))
    | _fields("set max_steps or num_train_epochs", total_episodes=(None,)),
}
# fmt: on


@cache
def elsewhere(kind: Kind) -> dict[str, Elsewhere]:
    """Return the fields of TRL's config of a stage that burnish's does not have."""
    return _COMMON | _BY_KIND.get(kind, {})


ALIASES: dict[Kind, dict[str, str]] = {
    "ppo": {"cliprange": "epsilon", "kl_coef": "beta", "num_ppo_epochs": "num_iterations",
            "response_length": "max_completion_length"},
}  # fmt: skip
"""TRL's names for fields of a stage -> burnish's names."""

_EVERYWHERE = {"chat_template_path": "chat_template"}

_GENERATION = {
    "max_new_tokens": "max_completion_length", "max_tokens": "max_completion_length", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "stop": "stop", "stop_strings": "stop", "temperature": "temperature",
    "top_k": "top_k", "top_p": "top_p",
}  # fmt: skip
"""Keys of `generation_kwargs` -> fields."""

_IMPORTANCE = "vllm_importance_sampling_"
_IMPORTANCE_FIELDS = {"mode": "sampling_correction", "clip_max": "sampling_correction_max",
                      "clip_min": "sampling_correction_min"}  # fmt: skip
"""TRL's names after `vllm_importance_sampling_` -> fields."""

_GENERATION_NEUTRAL: dict[str, Any] = {
    "bos_token_id": None, "disable_compile": True, "do_sample": True, "eos_token_id": None, "num_beams": 1,
    "num_return_sequences": 1, "pad_token_id": None, "use_cache": True,
}  # fmt: skip
"""Keys of `generation_kwargs` -> the value that has no effect here."""


def translated_names(kind: Kind) -> tuple[str, ...]:
    """List the names that `translate` rewrites in a stage."""
    online = ("generation_kwargs", "generation_batch_size") if kind in ONLINE else ()
    shuffled = ("shuffle_dataset",) if "shuffle_dataset" in elsewhere(kind) else ()
    weighted = [name for name in elsewhere(kind) if name.startswith(_IMPORTANCE)]
    return ("warmup_ratio", *_EVERYWHERE, *ALIASES.get(kind, {}), *online, *weighted, *shuffled)


def translate(kind: Kind, values: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite TRL's names of fields to burnish's.

    Raises:
        ConfigError: a field given by two names, or a value without a counterpart.
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
        for name, (value, given) in _sampling_fields(renamed.pop("generation_kwargs")).items():
            put(name, value, given)
    if kind in ONLINE and renamed.get("use_vllm") is True:
        for name, (value, given) in _correction_fields(kind, renamed).items():
            put(name, value, given)
    if kind in ONLINE and renamed.get("generation_batch_size") is not None:
        size, processes = renamed.pop("generation_batch_size"), int(os.environ.get("WORLD_SIZE", "1"))
        micro_batch = renamed.get("per_device_train_batch_size", 8) * processes
        if not isinstance(size, int) or size < 1 or size % micro_batch:
            raise ConfigError(
                f"generation_batch_size = {size!r}: use a multiple of {micro_batch}, per_device_train_batch_size x "
                f"{processes} processes, or set steps_per_generation."
            )
        put("steps_per_generation", size // micro_batch, "generation_batch_size")
    return renamed


def _correction_fields(kind: Kind, fields: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Take `vllm_importance_sampling_*` out of the fields; return field -> (value, name as given).

    Without any of them nothing is corrected, unlike in TRL: a mismatch then stops the run.
    """
    names = [name for name in fields if name.startswith(_IMPORTANCE) and name in elsewhere(kind)]
    values = {name.removeprefix(_IMPORTANCE): fields.pop(name) for name in names}
    if not values or values.pop("correction", True) is False:
        return {}
    if (cap := values.pop("cap", None)) is not None:
        values["clip_max"] = cap
    values = {"mode": "sequence_mask", **values}
    return {field: (values[name], _IMPORTANCE + name) for name, field in _IMPORTANCE_FIELDS.items() if name in values}


def _sampling_fields(kwargs: Any) -> dict[str, tuple[Any, str]]:
    """Translate `generation_kwargs` to field -> (value, name as given)."""
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"generation_kwargs = {kwargs!r:.80}: use a table, such as {{top_p = 0.9}}.")
    fields: dict[str, tuple[Any, str]] = {}
    for name, value in cast("Mapping[str, Any]", kwargs).items():
        if name in _GENERATION_NEUTRAL and _GENERATION_NEUTRAL[name] == value:
            continue
        if name not in _GENERATION:
            raise ConfigError(
                f"generation_kwargs[{name!r}] = {value!r:.80}: not a supported sampling setting; use "
                f"{', '.join(sorted(_GENERATION))}."
            )
        listed = [value] if _GENERATION[name] == "stop" and isinstance(value, str) else value
        fields[_GENERATION[name]] = (listed, f"generation_kwargs[{name!r}]")
    return fields


_METRICS = (
    "evaluation does not keep the logits of a batch; read the metrics of evaluate(), or score completions with "
    "burnish.evaluation.evaluate"
)

REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "it needs the logits of a padded batch, which do not exist here; override the loss of "
    "a stage (burnish.stages)",
    "compute_metrics": _METRICS,
    "data_collator": "the trainer encodes and packs rows itself, so a collator would never be called; prepare the rows "
    "instead",
    "preprocess_logits_for_metrics": _METRICS,
}
"""Arguments of TRL's trainers without a counterpart -> the fix."""

MOVED_ARGUMENTS: dict[str, str] = {
    "chars_per_token": "rows are packed by their tokens; remove it",
    "config": "it is args now",
    "dataset": "it is train_dataset now",
    "formatting_func": "prepare the rows instead; only SFTTrainer takes one",
    "generation_config": "set the sampling fields of args, such as temperature and max_completion_length",
    "infinite": "set max_steps or num_train_epochs in args",
    "judge": "pass a function that scores each completion in reward_funcs",
    "max_target_length": "max_length in args limits prompt and completion together",
    "model_init": "pass the model as model",
    "num_of_sequences": "rows are packed by their tokens; remove it",
    "policy": "it is model now",
    "ppo_config": "it is args now",
    "ref_policy": "it is ref_model now",
    "reward_model": "pass it as reward_funcs",
    "reward_processing_class": "it is reward_processing_classes now, in trainers that take reward_funcs",
    "tokenizer": "it is processing_class now",
    "torch_dtype": "set dtype in model_init_kwargs of args",
}
"""Arguments of older versions of TRL's trainers -> the fix."""

_ROWS = "trainers read conversations, texts and pairs themselves; pass the rows unchanged"
_TEMPLATE = "set chat_template in the trainer's config, which is saved with the tokenizer"
_TURNS = "tool calls are read in the format that the chat template writes; see tool_format"
_NOTHING = "it has no counterpart; pass a callback of transformers as callbacks"
_TEACHER = "distillation from a teacher is not supported yet"
_GAMES = "it is not supported; OnlineDPOTrainer samples and compares pairs"
_CRITIC = "PPOTrainer adds a critic to a plain model itself"
_STEPS = "RewardTrainer learns from rows with completions and labels, with RewardConfig"
_UNPAIRED = "KTOTrainer takes pairs as they are"


def _dpo(losses: str) -> str:
    return f"use DPOTrainer with loss_type {losses}, and DPOConfig"


NO_IMPORTS: dict[str, str] = {
    **dict.fromkeys(("AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead"), _CRITIC),
    **dict.fromkeys(("BCOConfig", "BCOTrainer"), _dpo('"bco_pair"')),
    **dict.fromkeys(("CPOConfig", "CPOTrainer"), _dpo('"cpo" or "simpo"')),
    **dict.fromkeys(("ORPOConfig", "ORPOTrainer"), _dpo('"orpo"')),
    **dict.fromkeys(("PRMConfig", "PRMTrainer"), _STEPS),
    **dict.fromkeys(("DistillationConfig", "DistillationTrainer", "GKDConfig", "GKDTrainer"), _TEACHER),
    **dict.fromkeys(("NashMDConfig", "NashMDTrainer", "XPOConfig", "XPOTrainer"), _GAMES),
    **dict.fromkeys(("BEMACallback", "WeaveCallback"), _NOTHING),
    "DataCollatorForCompletionOnlyLM": "set completion_only_loss or assistant_only_loss in SFTConfig",
    "LogCompletionsCallback": "set log_completions, and read them with `burnish report`",
    "RichProgressCallback": "progress is shown by default (progress in the config)",
    "SyncRefModelCallback": "set sync_ref_model in DPOConfig or KTOConfig",
    **dict.fromkeys(("add_response_schema", "supports_tool_calling"), _TURNS),
    **dict.fromkeys(
        (
            "apply_chat_template", "extract_prompt", "is_conversational", "is_conversational_from_value",
            "maybe_apply_chat_template", "maybe_convert_to_chatml", "maybe_extract_prompt",
        ),
        _ROWS,
    ),
    **dict.fromkeys(("maybe_unpair_preference_dataset", "unpair_preference_dataset"), _UNPAIRED),
    "clone_chat_template": f"{_TEMPLATE}; it takes the folder of another tokenizer",
    "create_reference_model": "pass ref_model, or leave it out: the trainer keeps the initial weights",
    "get_kbit_device_map": "remove device_map: the trainer places quantised weights itself",
    "get_training_chat_template": f"assistant_only_loss finds the turns with any template; {_TEMPLATE}",
    "pack_dataset": "trainers pack rows without padding themselves; pass them unchanged",
    "prepare_multimodal_messages": "models and data are text",
    "setup_chat_format": f'{_TEMPLATE} (chat_template = "chatml")',
}  # fmt: skip
"""Top-level names of TRL, now or in older versions, without a counterpart -> the fix."""
