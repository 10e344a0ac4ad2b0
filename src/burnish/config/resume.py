"""What becomes of a setting that differs from the checkpoint's: one class for every field of every stage."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["APPLIED", "FREE", "FREE_PREFIXES", "REFUSED_ON_RESUME", "ResumeClass", "resume_class"]

ResumeClass: TypeAlias = Literal["free", "applied", "refused"]
"""free: changes nothing that is learned; applied: takes effect and is announced; refused: another run."""

FREE_PREFIXES = (
    "activation_checkpointing", "dataloader_", "ddp_", "eval_", "gradient_checkpointing", "hub_", "logging_", "log_",
    "push_to_", "save_", "trackio_",
)  # fmt: skip
"""How the names of free fields begin, but for those that a set below names."""

FREE = frozenset(
    {
        "debug", "disable_tqdm", "do_eval", "do_train", "enable_jit_checkpoint", "full_determinism",
        "include_num_input_tokens_seen", "load_best_model_at_end", "logprob_check_bound",
        "max_dead_steps", "model_init_kwargs", "num_generations_eval", "output_dir", "overwrite_output_dir",
        "per_device_eval_batch_size", "precompute_ref_log_probs", "prediction_loss_only", "progress", "project",
        "report_to", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name",
        "skip_memory_metrics", "token_budget", "trust_remote_code", "use_cpu",
    }
)  # fmt: skip
"""Logging, saving, evaluation, places, and how the same gradient is computed."""

APPLIED = frozenset(
    {
        "adam_beta1", "adam_beta2", "adam_epsilon", "advantage_estimator", "algorithm", "alpha", "beta",
        "center_rewards_coefficient", "cliprange_value", "curriculum_target", "delta", "desirable_weight",
        "disable_dropout", "discopop_tau", "dynamic_sampling", "entropy_coef", "entropy_coef_delta", "entropy_coef_max",
        "entropy_coef_min", "entropy_target", "epsilon", "epsilon_high",
        "f_alpha_divergence_coef", "f_divergence_type", "gamma", "gradient_accumulation_steps", "greater_is_better",
        "ignore_data_skip", "importance_sampling_level", "kl_estimator", "kl_horizon", "kl_in", "kl_target",
        "label_smoothing", "lam", "ld_alpha", "learning_rate", "loss_type", "loss_weights", "lr_scheduler_kwargs",
        "lr_scheduler_type", "mask_truncated_completions", "max_completion_length", "max_grad_norm",
        "max_sampling_rounds", "max_steps", "metric_for_best_model", "min_p", "missing_eos_penalty",
        "multi_objective_aggregation", "neftune_noise_alpha", "normalize_advantages", "num_train_epochs",
        "off_policy_mask_threshold",
        "overlong_buffer", "overlong_penalty", "per_device_train_batch_size", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "repetition_penalty", "replay_size", "reward_clip_range", "reward_weights",
        "sampling_correction",
        "sampling_correction_max", "sampling_correction_min", "sapo_temperature_neg", "sapo_temperature_pos",
        "scale_rewards", "simpo_gamma", "steps_per_generation", "stop", "tf32", "top_entropy_quantile", "top_k",
        "top_p", "undesirable_weight", "use_adaptive_entropy", "use_bias_correction_kl",
        "use_weighting", "value_learning_rate", "value_prefit_steps", "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg",
        "vespo_lambda_pos", "vf_coef", "warmup_steps", "weight_decay", "whiten_advantages", "whiten_rewards",
    }
)  # fmt: skip
"""Learning rate, schedule, loss and sampling, and the split of a step (whose size may not change)."""

REFUSED_ON_RESUME = frozenset(
    {
        "assistant_only_loss", "bf16", "chat_template", "chat_template_kwargs", "completion_only_loss", "data_seed",
        "dataloader_drop_last", "dataset_text_field", "eos_token", "max_length", "max_prompt_length",
        "num_generations", "num_iterations", "optim", "optim_args", "optim_target_modules", "pad_token",
        "prompt_sampling", "seed", "shuffle_dataset", "step_separator", "sync_ref_model", "temperature",
        "train_sampling_strategy", "truncation_mode",
    }
)  # fmt: skip
"""Data and its order, number format, optimizer, and what the samples in flight were drawn with."""


def resume_class(name: str) -> ResumeClass:
    """Return the class of a field; one that no version of the table knows is refused."""
    if name in APPLIED:
        return "applied"
    if name in FREE or (name.startswith(FREE_PREFIXES) and name not in REFUSED_ON_RESUME):
        return "free"
    return "refused"
