"""A run as the formulas need it, from the settings of a run file or the defaults of a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, cast

from burnish.config.algorithms import apply_algorithm
from burnish.config.fields import LOSSES_WITHOUT_REFERENCE, PRECOMPUTED_GROUPS
from burnish.config.online_fields import micro_batches_per_rollout
from burnish.config.quantization import check_quantization
from burnish.config.stages import STAGES, Kind, known_fields
from burnish.errors import ConfigError
from burnish.planner.devices import Device, Sharding
from burnish.planner.memory import Adapters, Method, Part, bounded_tokens, cache_bytes, split_rows
from burnish.planner.models import FoundModel
from burnish.planner.shapes import ModelShape

__all__ = ["Request", "Run", "read_run"]

_PROMPT_TOKENS = 512
"""Prompt length where a run names no limit."""
_ROW_TOKENS = 2048
"""Row length where a run and the model name no limit."""

_OPTIMIZER_BYTES = {
    "adafactor": 0.0, "adagrad": 4.0, "ademamix": 12.0, "lion": 4.0, "rmsprop": 4.0, "sgd": 0.0,
}  # fmt: skip
"""Bytes of state per trained weight, of optimizers other than Adam's family (8)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a plan is asked for; `training`, `peft` and `model_init` are checked tables of a run file.

    Attributes:
        kind: stage.
        model: the model's dimensions.
        device: device of each rank.
        training: fields of the stage that are set.
        peft: fields of LoraConfig, or None to train all weights.
        model_init: arguments of from_pretrained.
        prompt_tokens: tokens of a prompt; None for max_prompt_length, 512, or half a row of pairs.
        ranks: number of devices.
        sharding: how the ranks divide a model.
        in_memory: whether the model is in memory already, so that nothing is read.
    """

    kind: Kind
    model: FoundModel
    device: Device
    training: Mapping[str, Any] = field(default_factory=dict[str, Any])
    peft: Mapping[str, Any] | None = None
    model_init: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prompt_tokens: int | None = None
    ranks: int = 1
    sharding: Sharding = "ddp"
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What a rank holds and computes in an optimizer step.

    Attributes:
        kind: stage.
        shape: dimensions of the model.
        method: how it trains.
        prompt_tokens: tokens of a prompt, P.
        completion_tokens: tokens of a completion, C; all have the greatest length.
        completions: completions of a micro-batch.
        group: completions of a prompt, G.
        accumulation: micro-batches of an optimizer step.
        rollout_batches: micro-batches of a rollout; 0 offline.
        passes: passes over a rollout.
        parts: forward and backward passes of a micro-batch; a kept prompt has one of its own.
        rows: forward passes that score a rollout, or an optimizer step offline; none where nothing is scored.
        precomputed: forward passes of a reference that scores all rows before the first step.
        reference: none, adapters switched off, a copy, or a copy that is freed before training.
        scores_old: whether the policy's own log-probabilities are scored before training on them.
        has_head: whether the loss reads log-probabilities.
        has_critic: whether a critic trains too.
        cache_bound: most tokens of the native engine's cache; None for no bound.
        sampler: engine of the rollouts.
        vllm_fraction: fraction of the device that vLLM takes in the trainer's process.
        vllm_sleeps: whether it frees that between rollouts.
        ranks: number of devices.
        sharding: how the ranks divide a model.
        reads: whether weights are read from files.
        reads_fp32: whether they are read in fp32 and then rounded.
        assumed: settings that the run does not make, in words.
    """

    kind: Kind
    shape: ModelShape
    method: Method
    prompt_tokens: int
    completion_tokens: int
    completions: int
    group: int
    accumulation: int
    rollout_batches: int
    passes: int
    parts: tuple[Part, ...]
    rows: tuple[Part, ...]
    precomputed: tuple[Part, ...]
    reference: Literal["none", "adapters off", "copy", "freed copy"]
    scores_old: bool
    has_head: bool
    has_critic: bool
    cache_bound: int | None
    sampler: Literal["none", "native", "colocate", "server"]
    vllm_fraction: float
    vllm_sleeps: bool
    ranks: int
    sharding: Sharding
    reads: bool
    reads_fp32: bool
    assumed: tuple[str, ...]

    @property
    def largest(self) -> Part:
        """The part that holds most tokens."""
        return max(self.parts, key=lambda part: (part.held, part))

    @property
    def largest_row(self) -> Part:
        """The row that holds most tokens."""
        return max(self.rows + self.precomputed, key=lambda part: (part.held, part))

    @property
    def steps_per_rollout(self) -> float:
        """Optimizer steps that train on a rollout."""
        return self.rollout_batches * self.passes / self.accumulation if self.rollout_batches else 1.0


def read_run(request: Request) -> Run:
    """Resolve a request: defaults of the stage, the algorithm's fields, lengths, and the split into parts."""
    kind, shape = request.kind, request.model.shape
    if kind == "reward":
        shape = dataclasses.replace(shape, tied=True)  # one score instead of a head
    given = dict(request.training)
    values = _defaults(kind) | given
    values = apply_algorithm(kind, values, given) if "algorithm" in values else values
    online = STAGES[kind].online
    method = _method(request, values)
    if method.bits is not None and method.adapters is None:
        raise ConfigError(
            "quantization_config without adapters: quantised weights cannot be trained; add [peft], or --lora."
        )
    prompt, completion, assumed = _lengths(request, values)
    group = values["num_generations"] if online else 2 if kind in ("dpo", "reward") else 1
    completions = values["per_device_train_batch_size"] * (1 if online else group)
    accumulation = values["gradient_accumulation_steps"]
    rollout = micro_batches_per_rollout(values["steps_per_generation"], accumulation) if online else 0
    passes = values.get("num_iterations", 1)
    budget = values["token_budget"] or (2048 if request.device.is_cpu else 16384)
    couples, pairs = kind in ("dpo", "reward"), kind == "online_dpo"
    trained_per_prompt = 2 if pairs else group
    trained = completions * trained_per_prompt // group if online else completions
    # Sharded models keep no prompts.
    keeps = request.ranks == 1 or request.sharding == "ddp"
    split = partial(split_rows, prompt, completion, budget=budget, keep_prompts=keeps)
    reference = _reference(kind, values, method)
    scores_old = online and not pairs and (passes > 1 or rollout > accumulation)
    # Scoring splits a whole rollout, or step, whatever its micro-batches.
    scored = completions * (rollout or accumulation) * (reference != "none" or scores_old or kind == "ppo")
    sampler = "none" if not online else "native" if not values["use_vllm"] else values["vllm_mode"]
    return Run(
        kind=kind,
        shape=shape,
        method=method,
        prompt_tokens=prompt,
        completion_tokens=completion,
        completions=completions,
        group=group,
        accumulation=accumulation,
        rollout_batches=rollout,
        passes=passes,
        parts=tuple(split(completions=max(trained, 1), group=trained_per_prompt, whole=couples or pairs)),
        rows=tuple(split(completions=scored, group=group, whole=couples)),
        precomputed=tuple(split(completions=_precomputed(values, reference) * group, group=group, whole=couples)),
        reference=reference,
        scores_old=scores_old,
        has_head=kind != "reward",
        has_critic=kind == "ppo",
        cache_bound=_cache_bound(request, values, method) if sampler == "native" else None,
        sampler=sampler,
        vllm_fraction=values.get("vllm_gpu_memory_utilization", 0.0) if sampler == "colocate" else 0.0,
        vllm_sleeps=bool(values.get("vllm_enable_sleep_mode", False)),
        ranks=request.ranks,
        sharding=request.sharding,
        reads=not request.in_memory,
        reads_fp32=method.bits is None and method.bf16 and "dtype" not in request.model_init,
        assumed=assumed,
    )


@cache
def _defaults(kind: Kind) -> dict[str, Any]:
    return {name: info.default for name, info in known_fields(kind).items()}


def _lengths(request: Request, values: Mapping[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    """Return tokens of a prompt and of a completion, and what was assumed of them."""
    prompt = request.prompt_tokens
    if STAGES[request.kind].online:
        limit = values.get("max_prompt_length")
        assumed = () if prompt or limit else (f"prompts of {_PROMPT_TOKENS} tokens (max_prompt_length is not set)",)
        return prompt or limit or _PROMPT_TOKENS, values["max_completion_length"], assumed
    length = values["max_length"] or request.model.shape.max_positions or _ROW_TOKENS
    assumed = () if values["max_length"] else (f"rows of {length} tokens (max_length is not set)",)
    if prompt is None:
        prompt = 0 if request.kind in ("sft", "kto") else length // 2
        assumed += () if prompt == 0 else (f"prompts of half a row, {prompt} tokens",)
    if prompt >= length:
        raise ConfigError(f"--prompt-tokens = {prompt}: not below max_length = {length}; use a smaller number.")
    return prompt, length - prompt, assumed


def _cache_bound(request: Request, values: Mapping[str, Any], method: Method) -> int | None:
    """Return the most tokens of a rollout's cache; prompts whose length is assumed are not refused."""
    if values["rollout_cache_gib"] is None:
        return None
    prompt, completion = request.prompt_tokens or 1, values["max_completion_length"]
    per_token = cache_bytes(request.model.shape, method)
    return bounded_tokens(values["rollout_cache_gib"], per_token, prompt=prompt, completion=completion)


def _method(request: Request, values: Mapping[str, Any]) -> Method:
    bf16 = values["bf16"]
    explicit = request.model_init.get("dtype")
    if bf16 is None:
        bf16 = request.device.fast_bf16
    if explicit in ("float32", "float64"):
        bf16 = False
    name = str(getattr(values["optim"], "value", values["optim"]))
    state = next((size for known, size in _OPTIMIZER_BYTES.items() if known in name), 8.0)
    state /= 4 if "8bit" in name else 8 if "4bit" in name else 1
    return Method(
        bf16=bool(bf16),
        adapters=_adapters(request),
        bits=_bits(request.model_init.get("quantization_config")),
        optimizer_bytes=state,
        paged_optimizer=name.startswith("paged_"),
        gradient_checkpointing=bool(values["gradient_checkpointing"] or values.get("activation_checkpointing")),
        activation_offloading=bool(values["activation_offloading"] and not request.device.is_cpu),
        mlp_tiles=values["mlp_tiles"],
        embedding_offloading=bool(values["embedding_offloading"] and not request.device.is_cpu),
        int8_cache=values.get("rollout_cache_dtype") == "int8",
        entropy_bonus=bool(values.get("entropy_coef") or values.get("use_adaptive_entropy")),
    )


def _adapters(request: Request) -> Adapters | None:
    table = request.peft if request.peft is not None else request.model.adapters
    if table is None:
        return None
    targets = table.get("target_modules")
    names: Any = [] if table.get("layers_to_transform") is None else table["layers_to_transform"]
    layers = [names] if isinstance(names, int) else list(names)
    return Adapters(
        rank=int(table.get("r", 8)),
        targets=targets if targets is None or isinstance(targets, str) else tuple(cast("list[str]", targets)),
        parameters=tuple(cast("list[str]", table.get("target_parameters") or [])),
        whole=tuple(cast("list[str]", table.get("modules_to_save") or [])),
        ranks=tuple((pattern, int(rank)) for pattern, rank in (table.get("rank_pattern") or {}).items()),
        layers=len(layers) or None,
    )


def _bits(quantization: Any) -> float | None:
    """Return the bits of a quantised weight with its scales: one fp32 per 64 in 4 bits, or one byte and its own."""
    if not quantization:
        return None
    fields = check_quantization(quantization)
    if fields.get("load_in_8bit"):
        return 8.0
    return 4 + (8 / 64 + 32 / (64 * 256) if fields.get("bnb_4bit_use_double_quant") else 32 / 64)


def _reference(
    kind: Kind, values: Mapping[str, Any], method: Method
) -> Literal["none", "adapters off", "copy", "freed copy"]:
    if kind in ("sft", "reward") or not values["beta"]:
        return "none"
    if kind == "dpo":
        names = values["loss_type"]
        if set([names] if isinstance(names, str) else names) <= LOSSES_WITHOUT_REFERENCE:
            return "none"
    if method.adapters is not None:
        return "adapters off"
    return "freed copy" if values.get("precompute_ref_log_probs") else "copy"


def _precomputed(values: Mapping[str, Any], reference: str) -> int:
    """Return how many groups the reference scores together before the first step."""
    return PRECOMPUTED_GROUPS if reference != "none" and values.get("precompute_ref_log_probs") else 0
