"""Online DPO: preference pairs from the policy's own samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from burnish.model.packing import pack
from burnish.model.scoring import score
from burnish.objectives.aggregate import sequence_sums
from burnish.objectives.preference import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    PreferenceOptions,
    pair_metrics,
    pairs_of,
)
from burnish.trainers.configs import OnlineDPOConfig
from burnish.trainers.online import OnlineTrainer
from burnish.types import Completion, Group, PackedBatch

__all__ = ["OnlineDPOTrainer"]


class OnlineDPOTrainer(OnlineTrainer):
    r"""Online DPO (2402.04792): sample, judge, prefer the best of a prompt's completions to the worst.

    .. math:: \mathcal L = \frac1P \sum_p \ell(y_w^{(p)}, y_l^{(p)})

    with a loss of `burnish.objectives.preference.PREFERENCE_LOSSES`, over the P pairs of the whole optimizer step. A
    prompt whose rewards are all equal makes no pair and costs no update.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        reward_funcs: a `Rubric`, or functions `f(prompts, completions, **columns) -> list[float | None]`.
        args: `OnlineDPOConfig`.
        train_dataset: rows with a `prompt` column (plain or conversational); other columns reach the rewards.
        eval_dataset: the same, held out.
        processing_class: the tokenizer; the model's own if None.
        callbacks: transformers callbacks.
        optimizers: an optimizer and a scheduler instead of the configured ones.
        quantization_config: load the model's weights quantised (QLoRA); needs `peft_config`.
        peft_config: train these adapters instead of the weights.
        reward_processing_classes, tools, rollout_func, environment_factory: TRL's; refused.
        engine: samples completions; the native in-process engine if None.
        ref_model: the reference; if None, the model as it was given (adapters off, or a frozen copy).

    Raises:
        ConfigError, DataError, ModelError, RewardError: before any weight is loaded where that can be known.
        CheckFailed: sampler and trainer disagree, or a gradient is not finite.
    """

    args: OnlineDPOConfig
    config_class = OnlineDPOConfig
    whole_groups = True

    @property
    def loss(self) -> PreferenceLoss:
        """The row of the table."""
        return PREFERENCE_LOSSES[self.args.loss_type]

    @property
    def options(self) -> PreferenceOptions:
        """Its numbers."""
        return PreferenceOptions(beta=self.args.beta, label_smoothing=self.args.label_smoothing)

    def trainable_groups(self, groups: Sequence[Group]) -> list[Group]:
        """The best and the worst completion of every prompt whose rewards differ."""
        pairs: list[Group] = []
        for group in groups:
            judged = [(reward, c) for c in group.completions if self.in_loss(c) and (reward := c.reward) is not None]
            if judged:
                best, worst = max(judged, key=_reward), min(judged, key=_reward)
                if best[0] > worst[0]:
                    pairs.append(dataclasses.replace(group, completions=[best[1], worst[1]]))
        return pairs

    def step_denominator(self, groups: Sequence[Group]) -> float:
        """This rank's pairs."""
        return float(len(self.trainable_groups(groups)))

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """Pairs with the log-probabilities of sampler and reference."""
        token: dict[str, Callable[[Completion], Sequence[float]]] = {}
        if groups[0].completions[0].ref_logprobs is not None:
            token = {
                "policy_logprobs": lambda completion: completion.policy_logprobs or [],
                "ref_logprobs": lambda completion: completion.ref_logprobs or [],
            }
        return pack(groups, token=token)

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """These pairs' share of the mean loss."""
        logprobs_N = score(model, batch, temperature=self.args.temperature).logprobs
        if batch.num_scored_tokens == 0:
            return logprobs_N.sum()
        if self._fresh:
            self.compare(batch, logprobs_N.detach())
        policy_S, reference_S, tokens_S = (
            sequence_sums(values_N, batch.sequence_index, batch.num_sequences)
            for values_N in (logprobs_N, batch.token["ref_logprobs"], torch.ones_like(logprobs_N))
        )
        pairs = pairs_of(policy_S, reference_S, tokens_S)
        for name, values in pair_metrics(pairs, self.options.beta, normalised=self.loss.length_normalised).items():
            self._metrics.add_tokens(name, values)
        return self.loss.compute(pairs, self.options).sum() / denominator


def _reward(judged: tuple[float, Completion]) -> float:
    return judged[0]
