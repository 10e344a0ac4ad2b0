"""Configuration fields of the stages that sample and score completions of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, MinLen

from burnish.config.declare import (
    CORRECTIONS,
    DATA,
    LOGGING,
    LOSS,
    MODEL,
    REFERENCE,
    REWARDS,
    SAMPLING,
    TRAINING,
    AtLeastTwo,
    Count,
    Folder,
    Fraction,
    Meets,
    Natural,
    NonNegative,
    Positive,
    Share,
    Text,
    Weights,
    own,
    stage,
)
from burnish.config.fields import CHAT_TEMPLATE_HELP, PREFERENCE_LOSS_NAMES, SMOOTHED_EXO, CommonFields

__all__ = ["OnlineDPOFields", "OnlineFields", "micro_batches_per_rollout"]


def micro_batches_per_rollout(steps_per_generation: int | None, gradient_accumulation_steps: int) -> int:
    """Count the micro-batches that are sampled at once.

    A round of fewer than an optimizer step takes leaves the weights as they are, so the step's rounds are sampled
    together.
    """
    return max(steps_per_generation or 1, gradient_accumulation_steps)


def _always_on(value: bool) -> str | None:
    return (
        None
        if value
        else ("samples are drawn without dropout, and with it another policy would be trained; remove the field")
    )


@dataclass
class OnlineFields(CommonFields):
    """Fields of the stages that sample, score and learn from their own completions."""

    samples: ClassVar[bool] = True

    learning_rate: NonNegative = own(1e-6, "Peak learning rate.", TRAINING)
    num_generations: AtLeastTwo = own(
        8,
        "Completions per prompt, G; at least 2.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    num_generations_eval: Count | None = own(
        None, "Completions per prompt in evaluation. None: num_generations.", SAMPLING, resume="free"
    )
    steps_per_generation: Count | None = own(
        None,
        "Micro-batches that one round of sampling feeds. None: gradient_accumulation_steps, "
        "so every optimizer step samples afresh; so do its divisors.",
        SAMPLING,
    )
    max_prompt_length: Count | None = own(
        None,
        "Longest prompt in tokens; a row with a longer one is left out and counted, never cut. None: no limit.",
        DATA,
        fix="use a number of tokens of at least 1; a large one sets no limit",
    )
    max_completion_length: Count = own(512, "Most tokens of one completion.", SAMPLING)
    temperature: Positive = own(
        1.0,
        "Sampling temperature, also that of the trained distribution; above 0.",
        SAMPLING,
        fix="training needs samples of a distribution: use a number above 0",
        resume="refused",
    )
    top_p: Share = own(
        1.0,
        "Sample from the smallest set of tokens with this probability. 1: all.",
        SAMPLING,
        fix="use a number in (0, 1]; 1 keeps every token",
    )
    top_k: Natural = own(
        0, "Sample from the k most likely tokens. 0: all.", SAMPLING, fix="use 0 (keep all) or a positive integer"
    )
    min_p: Fraction | None = own(
        None, "Sample from tokens at least this fraction as likely as the likeliest. None: all.", SAMPLING
    )
    repetition_penalty: Positive = own(
        1.0,
        "Logits of tokens in the prompt or the completion so far are divided by it, or multiplied where negative, when "
        "a completion is sampled (1909.05858). The loss is that of the policy without it; see sampling_correction.",
        SAMPLING,
        fix="use a number above 0; 1 for none, such as 1.1",
    )
    stop: Annotated[list[Text], MinLen(1)] | None = own(
        None, "Strings that end a completion.", SAMPLING, fix="use a list of non-empty strings, or leave it out"
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    chat_template_kwargs: dict[str, Any] | None = own(None, "Extra arguments of the chat template.", DATA)
    disable_dropout: Annotated[bool, Meets(_always_on)] = own(
        True, "Always on: samples are drawn without dropout, so they are trained on so too.", MODEL, resume="applied"
    )
    shuffle_dataset: bool = own(True, "Draw prompts in a new order each epoch.", DATA)
    reward_weights: Weights | None = own(
        None,
        "One weight per reward. None: 1 each, or the rubric's own.",
        REWARDS,
        fix="use a list of numbers, one per reward, or leave it out",
    )
    mask_truncated_completions: bool = own(
        False, "Leave completions that hit the token limit out of the loss.", REWARDS
    )
    overlong_buffer: Positive | None = own(
        None,
        "Tokens before max_completion_length, or below 1 a share of it, over which a punishment grows (DAPO, "
        "2503.14476). None: no punishment.",
        REWARDS,
        fix="use a number of tokens, or a share below 1 of the limit, or leave it out",
    )
    overlong_penalty: NonNegative = own(1.0, "The punishment at max_completion_length.", REWARDS)
    dynamic_sampling: bool = own(
        False,
        "Replace groups whose rewards are all equal by new ones, so that every group of a step has a gradient.",
        SAMPLING,
    )
    max_sampling_rounds: Count = own(
        10, "Rounds of sampling for one batch with dynamic_sampling; then groups without spread fill it.", SAMPLING
    )
    replay_size: Natural = own(
        0,
        "Groups with spread that are remembered, to stand in for new ones without; their ratios are clipped. 0: none.",
        SAMPLING,
    )
    prompt_sampling: Literal["permutation", "weighted", "curriculum"] = own(
        "permutation",
        "How prompts are drawn: permutation (each once an epoch), weighted (by the column weight), or curriculum (near "
        "a difficulty, of the column difficulty, that follows the mean reward).",
        DATA,
    )
    curriculum_target: float = own(
        0.5,
        "Mean reward at which the curriculum's difficulty stays; above it rises, below it falls.",
        DATA,
        resume="applied",
    )
    logprob_check_bound: Positive | None = own(
        None,
        "Largest KL(sampler || trainer) of fresh samples, in nats a token over the last 2,048 tokens; the run stops "
        "above it, and where log-probabilities of a step differ by more than its square root on average. None: 1e-6, "
        "or 0.01 where the model computes in bf16.",
        CORRECTIONS,
        resume="free",
        fix="use a number of nats above 0, or leave it out",
    )
    log_completions: bool | Folder = own(
        False,
        "Write every completion with its scores as JSON lines: into output_dir, or into the folder named here.",
        LOGGING,
    )

    def contradictions(self) -> Iterator[str]:
        buffer, limit = self.overlong_buffer, self.max_completion_length
        if buffer is not None and buffer >= limit:
            yield f"overlong_buffer = {buffer!r}: longer than max_completion_length = {limit}; use fewer tokens."
        if self.dynamic_sampling and self.num_generations < 2:
            yield "dynamic_sampling = True: one completion has no spread; use num_generations of at least 2."
        accumulation, asked = self.gradient_accumulation_steps, self.steps_per_generation
        if asked is not None and asked % accumulation and accumulation % asked:
            below = asked // accumulation * accumulation
            fitting = {n for n in range(1, accumulation) if accumulation % n == 0}
            near = sorted({*fitting, *([below] if below else []), below + accumulation})
            yield (
                f"steps_per_generation = {asked}: an optimizer step takes gradient_accumulation_steps = {accumulation} "
                f"micro-batches, so rounds would end inside a step; use one of {', '.join(map(str, near))}, or another "
                f"multiple of {accumulation}."
            )
        size, group = self.per_device_train_batch_size, self.num_generations
        steps, processes = micro_batches_per_rollout(asked, accumulation), int(os.environ.get("WORLD_SIZE", "1"))
        total = size * processes * steps
        if total % group:
            yield (
                f"num_generations = {group}: one round samples {total} completions (per_device_train_batch_size {size} "
                f"x {processes} processes x {steps} steps), which holds no whole number of groups; "
                f"make the product a multiple of {group}, for instance per_device_train_batch_size = {group}."
            )


_COUPLED = frozenset({"aot", "aot_unpaired", "sft"})
"""Losses that are not of a pair by itself: online, pairs come and go with the samples."""


def _uncoupled(value: str) -> str | None:
    names = [name for name in PREFERENCE_LOSS_NAMES if name not in _COUPLED]
    return None if value in names else f"use one of {', '.join(names)}"


@stage(
    "OnlineDPO",
    title="Online DPO",
    summary="train on preferences between the model's own samples, judged by rewards",
    method="online direct preference optimisation",
    paper="2402.04792",
    rows="prompts",
)
@dataclass
class OnlineDPOFields(OnlineFields):
    """Own fields of online DPO."""

    kind: ClassVar[str] = "online_dpo"

    learning_rate: NonNegative = own(5e-7, "Peak learning rate.", TRAINING)
    num_generations: AtLeastTwo = own(
        2,
        "Completions per prompt; the best and the worst of them make the pair.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    beta: Positive = own(0.1, "Strength of the pull towards the reference.", REFERENCE)
    loss_type: Annotated[str, Meets(_uncoupled)] = own(
        "sigmoid", "A row of burnish.objectives.preference.PREFERENCE_LOSSES that couples no pairs.", LOSS
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = own(
        0.0, "Assumed share of pairs whose order is wrong, below 0.5.", LOSS
    )

    def contradictions(self) -> Iterator[str]:
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            yield SMOOTHED_EXO
        size, group = self.per_device_train_batch_size, self.num_generations
        if size % group:
            yield (
                f"per_device_train_batch_size = {size}: a pair is chosen among all num_generations = {group} "
                f"completions of a prompt, so each process needs whole groups; use a multiple of {group}."
            )
        yield from super().contradictions()
