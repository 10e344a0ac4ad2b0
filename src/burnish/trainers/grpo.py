"""Group relative policy optimisation and its relatives."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.trainers.configs import GRPOConfig, RLOOConfig
from burnish.trainers.policy import PolicyTrainer, Record, estimate
from burnish.types import Completion

__all__ = ["GRPOTrainer", "RLOOTrainer"]

_OF_A_GROUP = ("group", "leave_one_out", "group_batch", "mean_normalized")
"""Estimators that are 0 where the rewards of a group are equal."""


class GRPOTrainer(PolicyTrainer):
    r"""Group Relative Policy Optimisation (2402.03300) and its relatives, with the arguments of TRL's trainer.

    .. math::
        \mathcal L = -\frac1D \sum_{t} \min\big(r_t A_t, \mathrm{clip}(r_t, 1-\epsilon, 1+\epsilon_{high}) A_t\big)
        + \beta\, \mathrm{KL}(\pi \| \pi_{ref})

    Each optimizer step takes its share of a rollout: P prompts, G completions each, sampled by the engine with the
    trainer's own weights. A completion whose reward failed leaves the loss; a group without spread costs no forward.
    `algorithm` in the config takes a row of `burnish.algorithms.ALGORITHMS`; every part of it is a field of its own.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        reward_funcs: a `Rubric`, functions `f(prompts, completions, **columns) -> list[float | None]`, or reward models
            by name or in memory.
        args: `GRPOConfig`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        tools, rollout_func, environment_factory: TRL's; refused.
        engine: samples completions; the native in-process engine if None.
        ref_model: the reference of the KL term; if None, the model as it was given (adapters off, or a frozen copy).
        reward_processing_classes: tokenizers of reward models; their own if None.
        compute_metrics: the groups of an evaluation, sampled and scored -> metrics by name.

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient is not finite.
    """

    args: GRPOConfig
    config_class = GRPOConfig

    @property
    def compared(self) -> str:
        """With what an estimator compares a reward; one that was registered may compare with anything."""
        estimator = self.args.advantage_estimator
        return "batch" if estimator == "batch" or estimator not in _OF_A_GROUP else "group"

    def learns_otherwise(self) -> bool:
        """Whether terms of the loss, or an estimator that was registered, teach where no reward differs."""
        return super().learns_otherwise() or self.args.advantage_estimator not in (*_OF_A_GROUP, "batch")

    def signals(self, completion: Completion) -> tuple[float, ...] | None:
        """The reward, or its criteria where each is normalised by itself."""
        rewards = super().signals(completion)
        if rewards is None or completion.score is None or self.args.multi_objective_aggregation == "sum_then_normalize":
            return rewards
        values = [completion.score.criteria.get(name) for name in self.rubric.names]
        return tuple(value for value in values if value is not None)

    def advantages(self, table: Sequence[Sequence[Record]]) -> Sequence[Sequence[float | list[float]]]:
        """By the configured row of `burnish.objectives.advantages.ADVANTAGES`."""
        scale = {True: "group", False: "none"}.get(self.args.scale_rewards, self.args.scale_rewards)  # pyright: ignore
        return estimate(
            table,
            self.args.advantage_estimator,
            weights=[criterion.weight for criterion in self.rubric.criteria],
            scale=scale,
            by_criterion=self.args.multi_objective_aggregation == "normalize_then_sum",
        )


class RLOOTrainer(GRPOTrainer):
    r"""REINFORCE leave-one-out (2402.14740), with the arguments of TRL's trainer: GRPOTrainer with the row `rloo`.

    .. math::
        \mathcal L = -\frac1S \sum_s \min\big(\rho_s A_s, \mathrm{clip}(\rho_s) A_s\big), \qquad
        A_s = R_s - \frac{1}{G-1} \sum_{k \ne s} R_k, \qquad
        R_s = r_s - \beta \sum_{t \in s} \log \frac{\pi_{old}(y_t)}{\pi_{ref}(y_t)}

    with rho the ratio of whole sequences.
    """

    args: RLOOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = RLOOConfig
