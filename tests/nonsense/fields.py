"""Every field of every stage with values of the wrong type, out of bounds, and in contradiction with another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import burnish
from burnish.cli.config import load_run_file
from burnish.config import Kind, known_fields, refused_fields
from nonsense.cases import Case
from nonsense.values import BAD_PATHS, bad_values, kinds_of

CONFIGS: dict[Kind, str] = {
    "sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig", "kto": "KTOConfig",
    "online_dpo": "OnlineDPOConfig", "grpo": "GRPOConfig", "rloo": "RLOOConfig", "ppo": "PPOConfig",
}  # fmt: skip


def _named(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COUNTS = _named(
    "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout gradient_accumulation_steps kl_horizon "
    "max_completion_length max_length max_prompt_length max_sampling_rounds num_generations num_generations_eval "
    "num_iterations per_device_eval_batch_size per_device_train_batch_size ref_model_sync_steps save_total_limit "
    "steps_per_generation token_budget torch_empty_cache_steps eval_accumulation_steps"
)
"""Integers of at least 1."""

_POSITIVE = _named(
    "cliprange_value discopop_tau entropy_coef_delta entropy_coef_max entropy_target epsilon epsilon_high eval_steps "
    "kl_target logging_steps logprob_check_bound "
    "num_train_epochs off_policy_mask_threshold overlong_buffer ref_model_mixup_alpha sampling_correction_max "
    "sampling_correction_min "
    "sapo_temperature_neg sapo_temperature_pos save_steps temperature top_entropy_quantile top_p vespo_lambda_neg "
    "vespo_lambda_pos vf_coef"
)
"""Numbers above 0."""

_NOT_NEGATIVE = _named(
    "adam_beta1 adam_beta2 adam_epsilon beta center_rewards_coefficient dataloader_num_workers data_seed "
    "desirable_weight entropy_coef_min eval_delay gamma label_smoothing lam ld_alpha learning_rate max_grad_norm min_p "
    "missing_eos_penalty overlong_penalty replay_size seed simpo_gamma top_k undesirable_weight value_learning_rate "
    "value_prefit_steps vespo_k_neg vespo_k_pos warmup_steps weight_decay"
)

_AT_MOST_ONE = _named(
    "adam_beta1 adam_beta2 epsilon gamma label_smoothing lam ld_alpha min_p ref_model_mixup_alpha "
    "top_entropy_quantile top_p"
)

_CHOICES = _named(
    "advantage_estimator algorithm ddp_backend eval_strategy f_divergence_type hub_strategy "
    "importance_sampling_level include_num_input_tokens_seen kl_estimator kl_in log_level log_level_replica "
    "logging_strategy loss_type lr_scheduler_type multi_objective_aggregation optim prompt_sampling report_to "
    "sampling_correction save_strategy scale_rewards train_sampling_strategy truncation_mode debug"
)
"""Fields of text that take a few words."""

_NOT_EMPTY = _named(
    "chat_template eos_token pad_token dataset_text_field step_separator output_dir log_completions "
    "resume_from_checkpoint"
)

_MAPPINGS_AS_TEXT = _named("activation_checkpointing_kwargs gradient_checkpointing_kwargs lr_scheduler_kwargs")

_PAIRS: dict[str, tuple[dict[str, Any], ...]] = {
    "sft reward dpo kto online_dpo grpo rloo ppo": (
        {"load_best_model_at_end": True},
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 2.5},
        {"logging_steps": 2.5},
        {"save_steps": 2.5},
        {"max_steps": -2},
        {"bf16": True, "fp16": True},
        {"lr_scheduler_kwargs": {"nope": 1}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x", "nope": 2}},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"optim": "adamw_torch", "optim_args": "nonsense"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "sideways"}},
    ),
    "sft": ({"assistant_only_loss": True, "completion_only_loss": True},),
    "dpo": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        {"loss_type": ["sigmoid"], "loss_weights": []},
        {"loss_type": ["sigmoid", 5]},
        {"loss_type": [["sigmoid"]]},
        {"loss_type": "exo_pair"},
        {"loss_type": "simpo", "precompute_ref_log_probs": True},
        {"loss_type": "simpo", "sync_ref_model": True},
        {"loss_type": "sft", "f_divergence_type": "forward_kl"},
        {"use_weighting": True, "loss_type": "aot"},
    ),
    "dpo kto": ({"sync_ref_model": True, "precompute_ref_log_probs": True},),
    "online_dpo grpo rloo": (
        {"num_generations": 3, "per_device_train_batch_size": 4},
        {"num_generations": 10**6},
        {"overlong_buffer": 1000, "max_completion_length": 10},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
        {"stop": []},
        {"stop": [""]},
        {"stop": [5]},
        {"stop": "END"},
        {"disable_dropout": False},
    ),
    "grpo rloo ppo": (
        {"delta": 1.1, "epsilon": 0.2},
        {"epsilon_high": 2.0, "loss_type": "grpo"},
        {"reward_clip_range": [1.0, -1.0]},
        {"reward_clip_range": [1.0]},
        {"reward_clip_range": [1.0, 1.0]},
        {"reward_clip_range": [0.0, "x"]},
        {"reward_clip_range": []},
        {"sampling_correction": "token_truncate", "sampling_correction_max": None},
        {"sampling_correction": "token_truncate", "sampling_correction_min": 0.5},
        {"sampling_correction": "token_mask", "sampling_correction_min": 5.0, "sampling_correction_max": 0.5},
        {"kl_target": 0.1, "beta": 0.0},
        {"algorithm": ["grpo"]},
        {"algorithm": "dapo", "loss_type": "grpo"},
    ),
    "grpo": (
        {"algorithm": "ppo"},
        {"loss_type": "cispo"},
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        {"use_adaptive_entropy": True, "entropy_coef": 2.0},
        {"loss_type": "luspo"},
        {"dynamic_sampling": True, "num_generations": 1},
        {"multi_objective_aggregation": "normalize_then_sum", "advantage_estimator": "batch"},
        {"kl_estimator": "k1", "use_bias_correction_kl": False},
        {"scale_rewards": "sometimes"},
    ),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Values by annotation and by meaning, in files and from Python; contradictions."""
    for kind, fields in ((kind, known_fields(kind)) for kind in CONFIGS):
        for name, info in fields.items():
            if not (info.own or kind in ("sft", "grpo")):
                continue  # inherited: the same rules read it in every stage
            for label, value in _bad(kind, name, info.type):
                yield Case(
                    "field in a file", f"{kind}.{name}: {label}", partial(_file, kind, {name: value}), names=name
                )
                if info.own or kind == "sft":
                    run = partial(_python, kind, {name: value})
                    yield Case("field in Python", f"{kind}.{name}: {label}", run, names="" if name == "debug" else name)
            moved = name in ("model_init_kwargs", "reward_weights") or kind in ("rloo", "ppo")
            run = partial(_file, kind, {name: info.default})
            yield Case("field, its default", f"{kind}.{name}", run, refused=None if moved else False)
        for name in _NOT_FIELDS:
            yield Case("no field", f"{kind}.{name}", partial(_file, kind, {name: 1}))
            yield Case("no field", f"{kind}.{name} in Python", partial(_python, kind, {name: 1}))
    for kinds, contradictions in _PAIRS.items():
        for kind in kinds.split():
            for fields in contradictions:
                yield Case("contradiction", f"{kind}: {fields}", partial(_file, kind, fields))
                yield Case("contradiction", f"{kind}: {fields} in Python", partial(_python, kind, fields))
    yield from _overrides()


_NOT_FIELDS = ("learning_rat", "lr", "", "learning_rate ", "0", "x" * 500, "__class__", "kind", "self", "model", "é")


def _bad(kind: Kind, name: str, annotation: str) -> Iterator[tuple[str, Any]]:
    if name in refused_fields(kind):
        yield "a wrong type", {"nonsense": ["x"]}
        return
    yield from bad_values(annotation)
    numbers = {
        **dict.fromkeys((*_COUNTS, *_POSITIVE), (0, -1)),
        **dict.fromkeys(_NOT_NEGATIVE, (-1,)),
    }.get(name, ())
    for value in numbers:
        if not (name == "num_generations" and value == 1):
            yield f"{value}", value
    if name in _AT_MOST_ONE:
        yield "1.5", 1.5
    if name in _CHOICES:
        for word in ("nonsense", "", "None", "x" * 500):
            if not (word == "" and name in ("debug", "report_to")):
                yield f"{word:.10}", word
    if name in _NOT_EMPTY:
        yield "empty", ""
    if name in ("output_dir", "log_completions"):
        yield from BAD_PATHS
    if name in _MAPPINGS_AS_TEXT:
        yield "text", "nonsense"
    if "float" in kinds_of(annotation) and name != "max_grad_norm":
        yield "inf", float("inf")


def _base(kind: Kind) -> dict[str, Any]:
    document: dict[str, Any] = {"model": "./nowhere", "data": {"train": {"path": "rows.jsonl"}}}
    if kind in ("online_dpo", "grpo", "rloo", "ppo"):
        document["rubric"] = [{"kind": "exact"}]
    return document


def _make_traps() -> None:
    Path("file").write_text("")


def _file(kind: Kind, fields: dict[str, Any]) -> None:
    """Read a run file, and make the configuration, which comes before any weight."""
    _make_traps()
    document = {**_base(kind), "training": {"use_cpu": True, **fields}}
    try:
        text = yaml.safe_dump(document, allow_unicode=True)
    except ValueError:  # an integer that Python does not print
        text = yaml.safe_dump({**document, "training": {}}).replace("training: {}", "") + "training: {"
        text += ", ".join(f"{name}: {hex(value)}" for name, value in fields.items()) + "}\n"
    Path("run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    run = load_run_file("run.yaml", [], kind)
    getattr(burnish, CONFIGS[kind])(**run.training)


def _python(kind: Kind, fields: dict[str, Any]) -> None:
    _make_traps()
    getattr(burnish, CONFIGS[kind])(**{"output_dir": "out", "use_cpu": True, **fields})


def _overrides() -> Iterator[Case]:
    """The same through the command line's words."""
    words = (
        "nan", "inf", "-inf", "NaN", "true", "null", "[]", "{}", '""', "''", "fast", "1e400", "-1e400", "9" * 400, "0x",
        "1_000_000_000_000_000_000_000", "1__0", "[1", "{a = 1", '"half', "\u0663", "1e", "--", "-",
    )  # fmt: skip
    for kind in CONFIGS:
        for word in words:
            for name in ("max_steps", "learning_rate", "seed"):
                legal = word == "null" or (
                    name == "learning_rate" and word in ("1_000_000_000_000_000_000_000", "\u0663")
                )
                run = partial(_override, kind, f"--training.{name}={word}")
                yield Case("override", f"{kind} --training.{name}={word:.20}", run, refused=None if legal else True)


def _override(kind: Kind, word: str) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({**_base(kind), "training": {"use_cpu": True}}))
    run = load_run_file("run.yaml", [word], kind)
    getattr(burnish, CONFIGS[kind])(**run.training)
