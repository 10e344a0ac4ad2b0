"""Find the smallest changes of settings that make a run fit its device, ranked by what they cost in speed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from burnish.config.stages import STAGES, known_fields
from burnish.config.tips import toml_line
from burnish.planner.memory import cache_bytes
from burnish.planner.plan import Plan, estimate
from burnish.planner.run import Request

__all__ = ["Change", "Proposal", "least_plan", "propose"]

_MOST_PROPOSALS = 5
_LEAST_TOKENS = 128
"""Shortest completion that is proposed."""
_UNPAGED = {
    "paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_bnb_8bit", "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit", "paged_lion_32bit": "lion_32bit", "paged_lion_8bit": "lion_8bit",
}  # fmt: skip
"""Optimizers with their states in the host's memory -> the same on the device."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of settings.

    Attributes:
        table: table of the run file: training, peft or model_init.
        values: fields that it sets.
        effect: what it does to the run, in words.
        alters: what is no longer the same: nothing but rounding in the last digits; the precision of weights,
            optimizer states or a rollout's cache, or which weights train; or what the run is for.
        frees_host: whether it moves bytes from the host's memory to the device.
    """

    table: str
    values: Mapping[str, Any]
    effect: str
    alters: Literal["nothing", "method", "purpose"] = "nothing"
    frees_host: bool = False

    @property
    def takes_host(self) -> bool:
        """Whether it moves bytes from the device to the host's memory."""
        moved = any(self.values.get(name) for name in ("activation_offloading", "embedding_offloading"))
        return moved or str(self.values.get("optim")).startswith("paged_")

    def apply(self, request: Request) -> Request:
        """Return the request with the change."""
        if self.table == "training":
            return dataclasses.replace(request, training={**request.training, **self.values})
        if self.table == "peft":
            return dataclasses.replace(request, peft={**(request.peft or {}), **self.values})
        return dataclasses.replace(request, model_init={**request.model_init, **self.values})


@dataclass(frozen=True, slots=True)
class Proposal:
    """A smallest set of changes with which a run fits.

    Attributes:
        changes: the changes; without any of them it would not fit.
        plan: the plan with them.
        slowdown: seconds of an optimizer step, divided by those of the run as it is.
    """

    changes: tuple[Change, ...]
    plan: Plan
    slowdown: float

    def toml(self, training: str = "training") -> str:
        """Write the changes as tables of a run file.

        Args:
            training: table of the stage, which is the stage's name in the file of a pipeline.
        """
        lines: list[str] = []
        for table, changes in itertools.groupby(sorted(self.changes, key=_table), key=_table):
            lines.append(f"[{training if table == 'training' else table}]")
            lines += [toml_line(name, value) for change in changes for name, value in change.values.items()]
        return "\n".join(lines)

    def as_dict(self, training: str = "training") -> dict[str, Any]:
        """Return the proposal as JSON values; `training` as in `toml`."""
        return {
            "toml": self.toml(training),
            "effects": [change.effect for change in self.changes],
            "peak_bytes": self.plan.peak_bytes,
            "host_bytes": self.plan.host_bytes,
            "seconds_per_step": self.plan.seconds,
            "slowdown": self.slowdown,
        }


def _table(change: Change) -> str:
    return change.table


def propose(request: Request, *, only_exact: bool = False) -> list[Proposal]:
    """Return minimal sets of changes that make a request fit, fastest first; those that change its purpose come last.

    Each kind of change is used at its mildest level that fits. Empty where the request fits already, or where all
    changes together are not enough.

    Args:
        request: what does not fit.
        only_exact: keep to changes that leave the gradient as it is.
    """
    base = estimate(request)
    options = _exact(_options(request, base)) if only_exact else _options(request, base)
    if base.fits or not _can_fit(request, options):
        return []
    found: list[tuple[set[int], Proposal]] = []
    for size in range(1, len(options) + 1):
        if found and size > min(len(one) for one, _ in found) + 1:
            break
        for numbers in itertools.combinations(range(len(options)), size):
            if any(smaller < set(numbers) for smaller, _ in found):
                continue
            chosen = _mildest(request, [options[number] for number in numbers])
            if chosen is not None:
                plan = _with(request, chosen)
                proposal = Proposal(tuple(chosen), plan, plan.seconds / max(base.seconds, 1e-9))
                found.append((set(numbers), proposal))
    proposals = [proposal for _, proposal in found]
    proposals.sort(key=lambda one: (any(change.alters == "purpose" for change in one.changes), one.slowdown))
    return proposals[:_MOST_PROPOSALS]


def least_plan(request: Request) -> Plan:
    """Plan a request with all changes at their strongest that leave the gradient as it is."""
    return _with(request, [levels[-1] for levels in _exact(_options(request, estimate(request)))])


def _exact(options: Sequence[list[Change]]) -> list[list[Change]]:
    return [levels for levels in options if levels[0].alters == "nothing"]


def _can_fit(request: Request, options: Sequence[list[Change]]) -> bool:
    """Return whether the strongest changes fit together, with or without those that move bytes to or from the host."""
    moving = [levels for levels in options if levels[-1].takes_host or levels[-1].frees_host]
    for size in range(len(moving) + 1):
        for stay in itertools.combinations(moving, size):
            left = [
                [one for one in levels if levels not in stay or not (one.takes_host or one.frees_host)]
                for levels in options
            ]
            if _with(request, [levels[-1] for levels in left if levels]).fits:
                return True
    return False


def _with(request: Request, changes: Sequence[Change]) -> Plan:
    for change in changes:
        request = change.apply(request)
    return estimate(request)


def _mildest(request: Request, options: Sequence[Sequence[Change]]) -> list[Change] | None:
    """Raise the levels of some kinds of change, the one that saves most first, until the request fits."""
    # Quantised weights are frozen: they need adapters.
    quantised = any("quantization_config" in levels[0].values for levels in options)
    has_adapters = request.peft is not None or request.model.adapters is not None
    if quantised and not has_adapters and not any(levels[0].table == "peft" for levels in options):
        return None
    if not _with(request, [levels[-1] for levels in options]).fits_device:
        return None
    levels = [0] * len(options)
    while True:
        plan = _with(request, [option[level] for option, level in zip(options, levels, strict=True)])
        if plan.fits:
            return [option[level] for option, level in zip(options, levels, strict=True)]
        best: tuple[int, int, int] | None = None
        for number, option in enumerate(options):
            if levels[number] + 1 < len(option):
                raised = [level + (index == number) for index, level in enumerate(levels)]
                plan = _with(request, [one[level] for one, level in zip(options, raised, strict=True)])
                found = (plan.excess_bytes, plan.peak_bytes, number)
                best = min(best or found, found)
        if best is None:
            return None
        levels[best[2]] += 1


def _options(request: Request, plan: Plan) -> list[list[Change]]:
    """List the kinds of change that a request allows, each with its levels from the mildest to the strongest."""
    fields, training = known_fields(request.kind), dict(request.training)
    options: list[list[Change]] = []

    def offer(
        levels: Sequence[Mapping[str, Any]], effect: str, alters: Literal["nothing", "method", "purpose"] = "nothing"
    ) -> None:
        if levels and all(field in fields for values in levels for field in values):
            options.append([Change("training", values, effect, alters) for values in levels])

    method = plan.run.method
    checkpoints: list[dict[str, Any]] = []
    if not method.checkpoints:
        checkpoints.append({"gradient_checkpointing": True})
    if "activation_offloading" in fields and not method.activation_offloading and not plan.device.is_cpu:
        checkpoints.append({"gradient_checkpointing": True, "activation_offloading": True})
    offer(checkpoints, "recomputes each layer in the backward pass; the same gradient")
    if method.mlp_tiles == 1 and plan.run.shape.gated and not plan.run.shape.fused and not plan.run.shape.experts:
        levels = [{"mlp_tiles": number} for number in (2, 4, 8, 16)]
        offer(levels, "computes MLPs in parts; the same gradient up to rounding")
    trains = method.adapters is None or method.adapters.trains_embedding
    if not (trains or method.embedding_offloading or plan.run.shape.tied or plan.device.is_cpu):
        offer([{"embedding_offloading": True}], "looks embeddings up in host memory; the same gradient")
    whole = request.kind in ("dpo", "reward", "online_dpo")
    least = plan.run.prompt_tokens + plan.run.completion_tokens * (2 if whole else 1)
    sizes = [size for power in range(24, 6, -1) if least < (size := 2**power) < plan.run.largest.held]
    sizes += [least] if least < plan.run.largest.held else []
    offer([{"token_budget": size} for size in sizes], "smaller forward and backward passes; the same gradient")
    if plan.run.reference == "copy" and "precompute_ref_log_probs" in fields and not training.get("sync_ref_model"):
        values = {"precompute_ref_log_probs": True}
        offer([values], "scores the reference once and frees it; the same gradient")
    if plan.run.sampler == "native":
        bounds = [{"rollout_cache_gib": size} for size in _cache_bounds(plan)]
        offer(bounds, "samples fewer completions at a time; the same distribution")
        if not method.int8_cache:
            offer([{"rollout_cache_dtype": "int8"}], "rounds keys and values of a rollout to 8 bits", "method")
    if plan.run.sampler == "colocate" and not plan.run.vllm_sleeps and not plan.device.is_cpu:
        offer([{"vllm_enable_sleep_mode": True}], "frees vLLM's memory between rollouts; the same samples")
    if method.optimizer_bytes == 8 and not method.paged_optimizer and not plan.device.is_cpu:
        optimizers = [{"optim": name} for name in ("adamw_bnb_8bit", "paged_adamw_8bit")]
        offer(optimizers, "rounds the optimizer's states to 8 bits", "method")
    if plan.run.reads_fp32:
        text = "reads weights in bf16; nothing is lost where they were saved in it"
        options.append([Change("model_init", {"dtype": "bfloat16"}, text, "method")])
    if method.adapters is None:
        lora = {"r": 16, "target_modules": "all-linear"}
        options.append([Change("peft", lora, "trains adapters instead of all weights", "method")])
    if method.bits is None:
        text = "rounds frozen weights to 4 bits"
        options.append([Change("model_init", {"quantization_config": "nf4"}, text, "method")])
    offer(_shorter(request, plan), "trains on shorter sequences", "purpose")
    return options if plan.fits_host is not False else options + _off_the_host(request, plan)


def _off_the_host(request: Request, plan: Plan) -> list[list[Change]]:
    """List the changes that take back what a run has moved to a host that is too small."""
    method, optim = plan.run.method, request.training.get("optim")
    optim = str(getattr(optim, "value", optim))
    found: list[tuple[dict[str, Any], str]] = []
    if method.activation_offloading:
        values = {"gradient_checkpointing": True, "activation_offloading": False}
        found.append((values, "keeps the inputs of layers on the device; the same gradient"))
    if method.embedding_offloading:
        found.append(({"embedding_offloading": False}, "keeps the embedding on the device; the same gradient"))
    if method.paged_optimizer and optim in _UNPAGED:
        found.append(({"optim": _UNPAGED[optim]}, "keeps the optimizer's states on the device; the same states"))
    return [[Change("training", values, effect, frees_host=True)] for values, effect in found]


def _shorter(request: Request, plan: Plan) -> list[dict[str, Any]]:
    """Halves of the longest sequence, down to 128 tokens and above the prompt."""
    online = STAGES[request.kind].online
    name = "max_completion_length" if online else "max_length"
    length = plan.run.completion_tokens + (0 if online else plan.run.prompt_tokens)
    least = max(_LEAST_TOKENS, 0 if online or request.prompt_tokens is None else request.prompt_tokens + 1)
    return [{name: size} for power in range(1, 24) if (size := length // 2**power) >= least]


def _cache_bounds(plan: Plan) -> list[float]:
    """Halves of the cache as it is, in GiB, down to a single completion."""
    run = plan.run
    per_token = cache_bytes(run.shape, run.method)
    rollout = next(phase for phase in plan.phases if phase.name == "rollout")
    least = (run.prompt_tokens + run.completion_tokens + 32) * per_token / 2**30
    size = rollout.device.get("key-value cache", 0) / 2**30
    found: list[float] = []
    while size / 2 >= least:
        size /= 2
        found.append(float(f"{size:.2g}"))
    return [bound for bound in found if bound >= least]
