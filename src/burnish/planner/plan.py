"""Plan a run: bytes by component and phase, the peak, a time estimate, and a verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from burnish.planner.cost import Cost, phase_costs
from burnish.planner.devices import Device
from burnish.planner.memory import (
    Bytes,
    cache_bytes,
    cache_tokens,
    forward_bytes,
    offloaded_bytes,
    pinned_bytes,
    weight_bytes,
)
from burnish.planner.rollout import Wave
from burnish.planner.run import Request, Run, read_run
from burnish.planner.update import Update

__all__ = ["Phase", "Plan", "estimate", "format_size", "plan_run"]

CONTEXT_BYTES = 1_400_000_000
"""CUDA context and libraries on a GPU."""
PROCESS_BYTES = 650_000_000
"""Interpreter and libraries of a process."""
USABLE = 0.95
"""Fraction of a device's memory that tensors can fill before fragmentation stops them."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a run; phases take turns.

    Attributes:
        name: loading, rollout, scoring, critic update or update.
        device: component -> bytes on the device, beside the plan's fixed ones.
        host: component -> bytes in the host's memory, beside the fixed ones.
        cost: FLOPs and seconds per optimizer step.
    """

    name: str
    device: Bytes
    host: Bytes
    cost: Cost

    @property
    def device_bytes(self) -> int:
        """Bytes of the phase alone on the device."""
        return sum(self.device.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes and seconds of a run on each rank.

    On a CPU, which is its own host, the bytes of both are the device's.

    Attributes:
        run: the resolved run.
        device: device of the rank.
        fixed: component -> bytes on the device in every phase.
        fixed_host: component -> bytes in the host's memory in every phase.
        phases: phases in order.
        notes: assumptions, and what is not supported yet, in sentences.
    """

    run: Run
    device: Device
    fixed: Bytes
    fixed_host: Bytes
    phases: tuple[Phase, ...]
    notes: tuple[str, ...]

    def total(self, phase: Phase) -> int:
        """Bytes on the device during a phase."""
        return sum(self.held(phase).values()) + phase.device_bytes

    def held(self, phase: Phase) -> Bytes:
        """Fixed components on the device during a phase."""
        return _held(self.fixed, phase)

    def host_total(self, phase: Phase) -> int:
        """Bytes in the host's memory during a phase."""
        return sum(self.held_on_host(phase).values()) + sum(phase.host.values())

    def held_on_host(self, phase: Phase) -> Bytes:
        """Fixed components in the host's memory during a phase."""
        return _held(self.fixed_host, phase)

    @property
    def peak_phase(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """Most bytes on the device: the fixed ones with the largest phase, never the sum of phases."""
        return self.total(self.peak_phase)

    @property
    def peak_host_phase(self) -> Phase:
        """The phase that takes most of the host's memory."""
        return max(self.phases, key=self.host_total)

    @property
    def host_bytes(self) -> int:
        """Most bytes in the host's memory."""
        return self.host_total(self.peak_host_phase)

    @property
    def usable_bytes(self) -> int:
        """Bytes of the device that a run can fill."""
        return int(self.device.memory_bytes * USABLE)

    @property
    def usable_host_bytes(self) -> int | None:
        """Bytes of the host's memory that a rank can fill; None where its size is not known, or on a CPU."""
        return None if self.device.host_bytes is None else int(self.device.host_bytes * USABLE)

    @property
    def fits_device(self) -> bool:
        """Whether the peak is within the device's usable bytes."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def fits_host(self) -> bool | None:
        """Whether the host's bytes are within the usable ones; None where these are not known, or on a CPU."""
        return None if self.usable_host_bytes is None else self.host_bytes <= self.usable_host_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits the device, and the host as far as that is known."""
        return self.fits_device and self.fits_host is not False

    @property
    def excess_bytes(self) -> int:
        """Bytes beyond the usable ones, of device and host together."""
        host = 0 if self.usable_host_bytes is None else self.host_bytes - self.usable_host_bytes
        return max(self.peak_bytes - self.usable_bytes, 0) + max(host, 0)

    @property
    def seconds(self) -> float:
        """Seconds of an optimizer step."""
        return sum(phase.cost.seconds for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        run = self.run
        return {
            "stage": run.kind,
            "model": {"model_type": run.shape.model_type, "parameters": run.shape.parameters,
                      "num_parameters": run.shape.num_parameters, "num_trained": run.method.trained(run.shape)},
            "device": {"name": self.device.name, "memory_bytes": self.device.memory_bytes,
                       "usable_bytes": self.usable_bytes, "host_memory_bytes": self.device.host_bytes,
                       "usable_host_bytes": self.usable_host_bytes},
            "ranks": run.ranks,
            "sharding": run.sharding,
            "prompt_tokens": run.prompt_tokens,
            "completion_tokens": run.completion_tokens,
            "part": run.largest._asdict(),
            "num_parts": len(run.parts) * run.accumulation,
            "fixed": self.fixed,
            "fixed_host": self.fixed_host,
            "phases": [
                {"name": phase.name, "device": phase.device, "host": phase.host, "total_bytes": self.total(phase),
                 "host_total_bytes": self.host_total(phase), "flops": phase.cost.flops, "seconds": phase.cost.seconds}
                for phase in self.phases
            ],
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase.name,
            "host_bytes": self.host_bytes,
            "peak_host_phase": self.peak_host_phase.name,
            "seconds_per_step": self.seconds,
            "fits_device": self.fits_device,
            "fits_host": self.fits_host,
            "fits": self.fits,
            "notes": list(self.notes),
        }  # fmt: skip


def _held(fixed: Bytes, phase: Phase) -> Bytes:
    """Leave out what is not there yet: weights are loaded before anything else is allocated."""
    if phase.name == "loading":
        return {name: size for name, size in fixed.items() if name in ("context", "process")}
    return fixed


def format_size(size: int) -> str:
    """Write bytes as GB."""
    return f"{size / 1e9:,.2f} GB"


def estimate(request: Request) -> Plan:
    """Plan a request."""
    return plan_run(read_run(request), request.device)


def plan_run(run: Run, device: Device) -> Plan:
    """Plan a resolved run on a device."""
    fixed, fixed_host = _fixed(run, device)
    costs = phase_costs(run, device)
    loaded = run.shape.num_parameters
    # Read in fp32, and held in bf16 beside that until masters are made; an explicit dtype is read as it is.
    width = 6 if run.reads_fp32 else run.method.item
    phases = [Phase("loading", {}, {"weights as read": width * loaded}, Cost())] if run.reads else []
    if "rollout" in costs:
        phases.append(Phase("rollout", _rollout(run, device), {}, costs["rollout"]))
    if "scoring" in costs:
        scored = forward_bytes(run.shape, run.method, run.largest_row, on_cpu=device.is_cpu, with_head=run.has_head)
        if run.reference == "freed copy":
            scored["reference"] = run.method.item * run.shape.num_parameters // _divisor(run, "weights")
        phases.append(Phase("scoring", scored, {}, costs["scoring"]))
    for name in ("critic update", "update"):
        if name in costs:
            phases.append(_update(run, device, name, costs[name]))
    notes = [f"assumed: {text}" for text in run.assumed]
    if run.ranks > 1 and run.sharding != "ddp":
        notes.append(f"burnish trains with DDP on several devices; {run.sharding} is planned and not run yet")
    if run.shape.experts and run.method.bits is not None:
        notes.append("experts are fused tensors, which bitsandbytes leaves in 16 bits")
    if run.shape.softcap:
        notes.append("capped attention scores are computed without a fused kernel on a CPU, which is not counted")
    if run.sampler == "server":
        notes.append("vLLM servers are not counted: they sample on devices of their own")
    if device.is_cpu:
        fixed = fixed | {name: fixed.get(name, 0) + size for name, size in fixed_host.items()}
        phases = [Phase(phase.name, phase.device | phase.host, {}, phase.cost) for phase in phases]
        fixed_host = {}
    return Plan(run, device, fixed, fixed_host, tuple(phases), tuple(notes))


def _divisor(run: Run, component: str) -> int:
    """Return by how many ranks a component is divided."""
    divided = {
        "ddp": (),
        "zero1": ("masters", "optimizer"),
        "zero2": ("masters", "optimizer", "gradients"),
        "zero3": ("masters", "optimizer", "gradients", "weights"),
        "fsdp2": ("masters", "optimizer", "gradients", "weights"),
    }[run.sharding]
    return run.ranks if component in divided else 1


def _fixed(run: Run, device: Device) -> tuple[Bytes, Bytes]:
    """Return the components that stay for the whole run, on the device and in the host's memory."""
    shape, method = run.shape, run.method
    own = weight_bytes(shape, method)
    sharded = run.ranks > 1 and run.sharding != "ddp"
    if sharded and method.bf16:
        # DeepSpeed and FSDP2 keep whole fp32 masters; FSDP2's are the weights that train, its bf16 ones are temporary.
        own["masters"] = 4 * method.trained(shape)
        if run.sharding == "fsdp2":
            trained_in = "weights" if method.adapters is None else "adapters"
            own[trained_in] -= 2 * method.trained(shape)
    fixed = {"context": 0 if device.is_cpu else CONTEXT_BYTES}
    host: Bytes = {"process": PROCESS_BYTES}
    for name, size in own.items():
        size //= _divisor(run, "weights" if name == "adapters" else name)
        target = host if name == "optimizer" and method.paged_optimizer else fixed
        target[name] = size
    if method.embedding_offloading:
        table = method.item * shape.vocabulary * shape.hidden
        fixed["weights"] -= table
        host["embedding"] = table if device.is_cpu else pinned_bytes(table)
    if run.reference == "copy":
        fixed["reference"] = method.item * shape.num_parameters // _divisor(run, "weights")
    if run.has_critic:
        # It shares a frozen base with the policy's adapters, or is a decoder of its own; ranks hold it whole.
        head = 0 if shape.tied else shape.vocabulary * shape.hidden
        trained = method.trained(shape) if method.adapters is not None else shape.num_parameters - head
        fixed["critic's weights"] = method.item * trained + 4 * shape.hidden
        fixed["critic's masters"] = 2 * trained * method.bf16
        fixed["critic's optimizer"] = round(method.optimizer_bytes * trained)
    if run.ranks > 1 and run.sharding == "ddp" and not method.bf16:
        # In bf16 the masters average the gradients themselves.
        fixed["buckets"] = method.item * method.trained(shape)
    if run.vllm_fraction and not run.vllm_sleeps:
        fixed["vLLM"] = int(run.vllm_fraction * device.memory_bytes)
    return {name: size for name, size in fixed.items() if size or name == "context"}, host


def _rollout(run: Run, device: Device) -> Bytes:
    """Key-value cache, logits, one prefill, and copies of weights that the engine needs."""
    shape, method = run.shape, run.method
    if run.sampler == "server":
        return {}
    if run.sampler == "colocate":
        return {"vLLM": int(run.vllm_fraction * device.memory_bytes)} if run.vllm_sleeps else {}
    completions = run.completions * run.rollout_batches
    wave = Wave.planned(run)
    tokens = cache_tokens(run.prompt_tokens, run.completion_tokens, run.group, completions, bound=wave.bound)
    found = {"key-value cache": tokens * cache_bytes(shape, method), **wave.bytes(shape, method, on_cpu=device.is_cpu)}
    if device.is_cpu and device.fast_bf16 and method.bf16:
        linear = 0 if method.bits is not None else shape.linear_weights
        adapters = 0 if method.adapters is None else method.trained(shape)
        found["packed weights"] = 2 * (linear + shape.vocabulary * shape.hidden + adapters)
    if run.ranks > 1 and run.sharding in ("fsdp2", "zero3"):
        found["gathered weights"] = weight_bytes(shape, method)["weights"]
    return found


def _update(run: Run, device: Device, name: str, cost: Cost) -> Phase:
    """Take the larger moment of the policy's or the critic's backward pass."""
    shape, method = run.shape, run.method
    is_policy = name == "update"
    passes = len(run.parts) * run.accumulation
    if run.has_critic and name == "critic update":
        shape = dataclasses.replace(shape, tied=True)  # a score instead of a head
    averages = run.ranks > 1 and run.sharding == "ddp"
    has_head = run.has_head and is_policy
    moments = Update(shape, method, run.largest, passes, device.is_cpu, has_head, averages).moments()
    for found in moments.values():
        if is_policy:
            found["gradients"] //= _divisor(run, "gradients")
            if run.ranks > 1 and run.sharding in ("fsdp2", "zero3"):
                # Two layers, of which one is on its way, and the head.
                gathered = 2 * shape.layer_parameters + shape.vocabulary * shape.hidden
                found["gathered weights"] = method.item * gathered
    largest = max(moments.values(), key=lambda found: sum(found.values()))
    host: Bytes = {}
    if method.activation_offloading:
        tokens = (run.largest.tokens, run.largest.kept)
        host["offloaded activations"] = sum(offloaded_bytes(shape, method, one, on_cpu=device.is_cpu) for one in tokens)
    return Phase(name, {component: size for component, size in largest.items() if size}, host, cost)
