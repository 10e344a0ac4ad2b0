"""Configuration fields of the online stages, which sample and score completions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from annotated_types import Interval, MinLen

from burnish.config.declare import (
    CORRECTIONS,
    DATA,
    EPISODES,
    LOGGING,
    LOSS,
    MODEL,
    REFERENCE,
    REWARDS,
    SAMPLING,
    SERVERS,
    TRAINING,
    AtLeastTwo,
    Count,
    Folder,
    Fraction,
    Meets,
    Natural,
    NonNegative,
    Positive,
    Proportion,
    Text,
    Weights,
    own,
    stage,
)
from burnish.config.fields import CHAT_TEMPLATE_HELP, PREFERENCE_LOSS_NAMES, SMOOTHED_EXO, CommonFields

__all__ = ["OnlineDPOFields", "OnlineFields", "micro_batches_per_rollout"]


def micro_batches_per_rollout(steps_per_generation: int | None, gradient_accumulation_steps: int) -> int:
    """Count the micro-batches of one rollout.

    Rounds smaller than an optimizer step are sampled together, since the weights do not change between them.
    """
    return max(steps_per_generation or 1, gradient_accumulation_steps)


def _always_on(value: bool) -> str | None:
    return None if value else "samples are drawn without dropout, so training must not use it either; remove the field"


def _servers(value: str | list[str]) -> str | None:
    for url in [value] if isinstance(value, str) else value:
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is not a number
            is_url = False
        if not is_url:
            return "use the URL of a server, such as 'http://127.0.0.1:8000', or a list of them"
    return None


@dataclass
class OnlineFields(CommonFields):
    """Fields of every online stage."""

    samples: ClassVar[bool] = True

    learning_rate: NonNegative = own(1e-6, "Peak learning rate.", TRAINING)
    num_generations: AtLeastTwo = own(
        8,
        "Completions per prompt, G.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    num_generations_eval: Count | None = own(
        None, "Completions per prompt in evaluation. None: num_generations.", SAMPLING, resume="free"
    )
    steps_per_generation: Count | None = own(
        None,
        "Micro-batches per round of sampling; every optimizer step samples afresh if it divides "
        "gradient_accumulation_steps. None: gradient_accumulation_steps.",
        SAMPLING,
    )
    max_prompt_length: Count | None = own(
        None,
        "Maximum prompt length in tokens; longer prompts are skipped and counted, not truncated. None: no limit.",
        DATA,
        fix="use a number of tokens of at least 1; a large one sets no limit",
    )
    max_completion_length: Count = own(512, "Maximum completion length in tokens.", SAMPLING)
    temperature: Positive = own(
        1.0,
        "Sampling temperature, which is also applied to the logits in training; above 0.",
        SAMPLING,
        fix="training needs samples of a distribution: use a number above 0",
        resume="refused",
    )
    top_p: Proportion = own(
        1.0,
        "Nucleus sampling: sample from the smallest set of tokens with this total probability. 1: all tokens.",
        SAMPLING,
        fix="use a number in (0, 1]; 1 keeps every token",
    )
    top_k: Natural = own(
        0,
        "Sample from the k most likely tokens. 0: all tokens.",
        SAMPLING,
        fix="use 0 (keep all) or a positive integer",
    )
    min_p: Fraction | None = own(
        None, "Sample from tokens at least this fraction as likely as the likeliest token. None: all tokens.", SAMPLING
    )
    repetition_penalty: Positive = own(
        1.0,
        "Divides positive and multiplies negative logits of tokens already in the prompt or completion, in sampling "
        "only (1909.05858). The loss uses the policy without it; see sampling_correction.",
        SAMPLING,
        fix="use a number above 0, such as 1.1; 1 has no effect",
    )
    stop: Annotated[list[Text], MinLen(1)] | None = own(
        None, "Strings that end a completion.", SAMPLING, fix="use a list of non-empty strings, or leave it out"
    )
    stop_settled: bool = own(
        False,
        "Stop sampling a completion once no continuation could change its reward, as the is_settled of every criterion "
        "with a weight tells. Its loss is that of the tokens sampled.",
        SAMPLING,
    )
    chat_template: Text | None = own(None, CHAT_TEMPLATE_HELP, DATA)
    chat_template_kwargs: dict[str, Any] | None = own(None, "Extra arguments of the chat template.", DATA)
    disable_dropout: Annotated[bool, Meets(_always_on)] = own(
        True,
        "Always on: samples are drawn without dropout, so training does not use it either.",
        MODEL,
        resume="applied",
    )
    shuffle_dataset: bool = own(True, "Draw prompts in a new order in each epoch.", DATA)
    reward_weights: Weights | None = own(
        None,
        "One weight per reward. None: 1 each, or the weights of the rubric.",
        REWARDS,
        fix="use a list of numbers, one per reward, or leave it out",
    )
    max_failed_rewards: Fraction = own(
        0.5,
        "Largest fraction of the completions of the last 8 rollouts whose reward may fail before the run stops with a "
        "report; 1 never stops it.",
        REWARDS,
        fix="use a fraction from 0 to 1",
        resume="free",
    )
    mask_truncated_completions: bool = own(
        False, "Exclude completions that reach max_completion_length from the loss.", REWARDS
    )
    overlong_buffer: Positive | None = own(
        None,
        "Tokens before max_completion_length over which the overlong penalty grows; below 1, a fraction of that limit "
        "(DAPO, 2503.14476). None: no penalty.",
        REWARDS,
        fix="use a number of tokens, or a fraction of the limit below 1, or leave it out",
    )
    overlong_penalty: NonNegative = own(1.0, "Overlong penalty at max_completion_length.", REWARDS)
    dynamic_sampling: bool = own(
        False,
        "Resample groups whose rewards are all equal, so every group of a step has a gradient.",
        SAMPLING,
    )
    max_sampling_rounds: Count = own(
        10,
        "Maximum rounds of dynamic_sampling per batch, which is then filled with groups without reward variance.",
        SAMPLING,
    )
    replay_size: Natural = own(
        0,
        "Groups with reward variance to remember and use, with clipped ratios, in place of new groups without. 0: no "
        "replay.",
        SAMPLING,
    )
    prompt_sampling: Literal["permutation", "weighted", "curriculum"] = own(
        "permutation",
        "Order of prompts: permutation (each once per epoch), weighted (by the column weight), or curriculum (by the "
        "column difficulty, near a level that follows the mean reward).",
        DATA,
    )
    curriculum_target: float = own(
        0.5,
        "Mean reward above which the curriculum's difficulty rises, and below which it falls.",
        DATA,
        resume="applied",
    )
    logprob_check_bound: Positive | None = own(
        None,
        "Stop if KL(sampler || trainer) of fresh samples, in nats per token over the last 2,048 tokens, exceeds this, "
        "or if log-probabilities of a step differ by more than its square root on average. None: 1e-6, or 0.01 in "
        "bf16 and with rollout_cache_dtype.",
        CORRECTIONS,
        resume="free",
        fix="use a number of nats above 0, or leave it out",
    )
    log_completions: bool | Folder = own(
        False,
        "Write every completion with its scores as JSON lines, in output_dir or in the folder given here.",
        LOGGING,
    )

    compile_rollouts: bool | None = own(
        None,
        "Compile the native engine's decode forward: tens of seconds once, cached on disk, then less time per token. "
        "Needs a C++ compiler on a CPU, triton on a GPU. None: in bf16 on a CPU that has one, if the run may take more "
        "than 5,000 decode forwards and the engine has no kernels for the model's layers, which are faster.",
        SAMPLING,
        resume="free",
    )
    rollout_cache_gib: Positive | None = own(
        None,
        "Most memory of the native engine's keys and values, in GiB; completions are sampled in waves under it. None: "
        "what 64 completions at a time need.",
        SAMPLING,
        resume="free",
        fix="use a number of GiB above 0, or leave it out",
    )
    rollout_cache_dtype: Literal["int8"] | None = own(
        None,
        "int8: hold the native engine's keys and values in 8 bits, with a scale per token and head. It takes half the "
        "memory, or twice the completions under rollout_cache_gib, and rounds what is sampled from, by less than bf16 "
        "does. None: the model's dtype.",
        SAMPLING,
        resume="free",
    )
    use_vllm: bool = own(
        False,
        "Sample completions with vLLM, which gets the weights before every rollout; otherwise with the native engine.",
        SERVERS,
    )
    vllm_mode: Literal["server", "colocate"] = own(
        "colocate",
        "server: the servers at vllm_server_base_url, started by `burnish serve MODEL`. colocate: vLLM in the process "
        "of the trainer, on its device.",
        SERVERS,
    )
    vllm_server_base_url: Annotated[Text | Annotated[list[Text], MinLen(1)], Meets(_servers)] | None = own(
        None,
        "URL of a server, or a list of URLs of servers that share the groups. None: vllm_server_host and "
        "vllm_server_port.",
        SERVERS,
        fix="use the URL of a server, such as 'http://127.0.0.1:8000', or a list of them",
    )
    vllm_server_host: Text = own("0.0.0.0", "Host of the server; 0.0.0.0 is this machine.", SERVERS)
    vllm_server_port: Annotated[int, Interval(ge=1, le=65535)] = own(8000, "Port of the server.", SERVERS)
    vllm_server_timeout: Positive = own(
        240.0, "Seconds to wait for a server to be up, at the start and whenever all are lost.", SERVERS
    )
    vllm_weights_dir: Folder | None = own(
        None,
        "Folder for the weights of a sync, which trainer and servers see. None: shared memory of this machine.",
        SERVERS,
    )
    vllm_weight_transfer: Literal["auto", "folder", "ipc", "nccl"] = own(
        "auto",
        "Way of full weights to servers. folder: vllm_weights_dir. ipc: handles of GPU memory, on the same GPU. nccl: "
        "broadcast to other GPUs, with vLLM in the trainer's environment too. auto: what the servers were started for "
        "(`burnish serve --weight-transfer`) where it can work, else folder.",
        SERVERS,
    )
    vllm_gpu_memory_utilization: Proportion = own(
        0.3, "Fraction of the device's memory for vLLM's weights and cache, with vllm_mode colocate.", SERVERS
    )
    vllm_tensor_parallel_size: Count = own(
        1, "Training processes that hold one copy of vLLM's weights together, with vllm_mode colocate.", SERVERS
    )
    vllm_max_model_length: Count | None = own(
        None,
        "Most tokens of a prompt with its completion, with vllm_mode colocate. None: what the model, and the memory "
        "for its cache, allow.",
        SERVERS,
    )
    vllm_model_impl: Literal["vllm", "transformers"] = own(
        "vllm",
        "Implementation of the model, with vllm_mode colocate. transformers is an error there, since vLLM would change "
        "the classes of the model being trained.",
        SERVERS,
    )
    vllm_enable_sleep_mode: bool = own(
        False,
        "Free the memory of vLLM's weights and cache between rollouts, with vllm_mode colocate on a GPU.",
        SERVERS,
    )

    max_tool_calling_iterations: Natural | None = own(
        None,
        "Most turns of an episode that the environment answers; one more turn may follow. None: no limit but "
        "max_completion_length, which counts what tools answer too.",
        EPISODES,
    )
    tool_timeout_seconds: Positive = own(
        30.0, "Time limit of a tool call, and of any other call of an environment.", EPISODES
    )
    episode_timeout_seconds: Positive | None = own(
        None, "Time after which an episode gets no further turn. None: no limit.", EPISODES
    )
    tool_format: Text | None = own(
        None,
        "Format in which the model calls tools: hermes, llama, mistral ... None: the one that the chat template "
        "writes.",
        EPISODES,
    )

    @property
    def samples_part(self) -> bool:
        """Whether completions are sampled from a part of the policy's distribution, or from a changed one."""
        is_whole = self.top_p == 1 and not self.top_k and not self.min_p
        return not is_whole or self.repetition_penalty != 1

    @property
    def staleness_bound(self) -> int:
        """Rollouts that sampling may run ahead of training: 0 where the loss is for fresh samples only."""
        return 0

    @property
    def server_urls(self) -> list[str]:
        """URLs of the servers, without a final slash."""
        given = self.vllm_server_base_url
        if given is None:
            host = {"0.0.0.0": "127.0.0.1"}.get(self.vllm_server_host, self.vllm_server_host)
            given = f"http://{host}:{self.vllm_server_port}"
        urls = [given] if isinstance(given, str) else given
        return list(dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in urls))

    def contradictions(self) -> Iterator[str]:
        if self.use_vllm and self.vllm_mode == "server" and len(self.stop or ()) > 4:
            yield f"stop = {self.stop!r:.200} with use_vllm = True: a vLLM server takes 4 strings; use fewer."
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_model_impl == "transformers":
            yield (
                'vllm_model_impl = "transformers" with vllm_mode = "colocate": vLLM would change classes of '
                'transformers that the model being trained is made of; use "vllm", or set vllm_mode = "server" and '
                "give the server --model-impl transformers."
            )
        if self.use_vllm and self.staleness_bound and self.vllm_weight_transfer in ("ipc", "nccl"):
            yield (
                f'vllm_weight_transfer = "{self.vllm_weight_transfer}" with max_staleness = {self.staleness_bound}: a '
                'server that comes back while the weights change needs those of the last sync; use "folder", or '
                "max_staleness = 0."
            )
        buffer, limit = self.overlong_buffer, self.max_completion_length
        if buffer is not None and buffer >= limit:
            yield f"overlong_buffer = {buffer!r}: longer than max_completion_length = {limit}; use fewer tokens."
        for name in ("rollout_cache_gib", "rollout_cache_dtype"):
            if self.use_vllm and (value := getattr(self, name)) is not None:
                yield (
                    f"{name} = {value!r} with use_vllm = True: vLLM has a cache of its own; remove it, and set "
                    "vllm_gpu_memory_utilization, or the options of the server."
                )
        if self.compile_rollouts and self.use_vllm:
            yield "compile_rollouts = True with use_vllm = True: vLLM compiles by itself; remove compile_rollouts."
        if self.stop_settled and self.use_vllm:
            yield (
                "stop_settled = True with use_vllm = True: vLLM samples whole completions and cannot ask a predicate; "
                "remove one of the two, or end completions by stop."
            )
        if self.stop_settled and buffer is not None and self.overlong_penalty:
            yield (
                f"stop_settled = True with overlong_buffer = {buffer!r}: that penalty depends on the whole length, so "
                "no reward is settled before a completion ends; set overlong_penalty = 0, or remove stop_settled."
            )
        if self.dynamic_sampling and self.num_generations < 2:
            yield "dynamic_sampling = True: one completion has no reward variance; set num_generations to at least 2."
        accumulation, asked = self.gradient_accumulation_steps, self.steps_per_generation
        if asked is not None and asked % accumulation and accumulation % asked:
            below = asked // accumulation * accumulation
            fitting = {n for n in range(1, accumulation) if accumulation % n == 0}
            near = sorted({*fitting, *([below] if below else []), below + accumulation})
            yield (
                f"steps_per_generation = {asked}: rounds would end within an optimizer step of "
                f"gradient_accumulation_steps = {accumulation}; use one of {', '.join(map(str, near))}, or another "
                f"multiple of {accumulation}."
            )
        size, group = self.per_device_train_batch_size, self.num_generations
        steps, processes = micro_batches_per_rollout(asked, accumulation), int(os.environ.get("WORLD_SIZE", "1"))
        total = size * processes * steps
        if total % group:
            yield (
                f"num_generations = {group}: one round samples {total} completions (per_device_train_batch_size {size} "
                f"x {processes} processes x {steps} steps), which is not a whole number of groups; "
                f"make the product a multiple of {group}, such as per_device_train_batch_size = {group}."
            )


_COUPLED = frozenset({"aot", "aot_unpaired", "sft"})
"""Losses that couple pairs, which online sampling does not support since the pairs of a step vary."""


def _uncoupled(value: str) -> str | None:
    names = [name for name in PREFERENCE_LOSS_NAMES if name not in _COUPLED]
    return None if value in names else f"use one of {', '.join(names)}"


@stage(
    "OnlineDPO",
    title="Online DPO",
    summary="train on preferences between sampled completions, ranked by rewards",
    method="online direct preference optimisation",
    paper="2402.04792",
    rows="prompts",
)
@dataclass
class OnlineDPOFields(OnlineFields):
    """Fields of online DPO."""

    kind: ClassVar[str] = "online_dpo"

    learning_rate: NonNegative = own(5e-7, "Peak learning rate.", TRAINING)
    num_generations: AtLeastTwo = own(
        2,
        "Completions per prompt, of which the best and the worst make the pair.",
        SAMPLING,
        fix="a group is compared with itself: use at least 2",
        resume="refused",
    )
    beta: Positive = own(0.1, "Strength of the regularisation towards the reference.", REFERENCE)
    loss_type: Annotated[str, Meets(_uncoupled)] = own(
        "sigmoid", "A loss of burnish.objectives.preference.PREFERENCE_LOSSES that does not couple pairs.", LOSS
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = own(
        0.0, "Assumed fraction of pairs in the wrong order, below 0.5.", LOSS
    )

    def contradictions(self) -> Iterator[str]:
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            yield SMOOTHED_EXO
        size, group = self.per_device_train_batch_size, self.num_generations
        if size % group:
            yield (
                f"per_device_train_batch_size = {size}: a pair is chosen from all num_generations = {group} "
                f"completions of a prompt, so each process needs whole groups; use a multiple of {group}."
            )
        yield from super().contradictions()
