"""Names that scripts import from TRL and that burnish does not have: what to do instead."""

from __future__ import annotations

__all__ = ["NO_IMPORTS"]

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
