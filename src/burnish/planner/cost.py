"""FLOPs and seconds of the phases of an optimizer step: the larger of compute and memory traffic, plus launches.

The efficiencies below are assumptions, the same for every device; they are good for comparing two settings, and for the
order of magnitude of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.planner.devices import Device
from burnish.planner.memory import (
    PREFILL_TOKENS,
    Method,
    Part,
    cache_bytes,
    checkpoint_bytes,
    is_tiled,
    mlp_width,
    weight_bytes,
)
from burnish.planner.rollout import Wave
from burnish.planner.run import Run
from burnish.planner.shapes import ModelShape

__all__ = ["Cost", "forward_flops", "phase_costs", "update_flops"]

MATMUL = 0.4
"""Fraction of the peak rate that forward and backward passes reach."""
BANDWIDTH = 0.7
"""Fraction of the peak memory bandwidth that decoding reaches."""
LAUNCH_SECONDS = 150e-6
"""Seconds per layer and forward in which the device waits for Python, on a GPU and on a CPU."""
LINK_OVERLAP = 0.5
"""Fraction of the transfers to the host that hides behind compute."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and seconds of a phase, per optimizer step and rank."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.seconds * factor)


def forward_flops(shape: ModelShape, part: Part, *, with_head: bool = True) -> float:
    """Count a forward pass: 2 per weight and token, 2 V H per scored token, 4 Q L per query-key pair."""
    head = 2.0 * shape.vocabulary * shape.hidden * part.scored if with_head else 0.0
    return 2.0 * shape.decoder_weights * part.tokens + head + 4.0 * shape.queries * shape.layers * part.pairs


def update_flops(shape: ModelShape, method: Method, part: Part, *, with_head: bool = True) -> float:
    """Count a forward and a backward pass.

    A backward pass takes twice a forward's FLOPs, once for inputs and once for weights; frozen weights take no second
    time. Checkpointing repeats the decoder's forward pass, and a head that trains its tiles.
    """
    decoder = forward_flops(shape, part, with_head=False)
    attention = 4.0 * shape.queries * shape.layers * part.pairs
    head = forward_flops(shape, part) - decoder if with_head else 0.0
    trains_all = method.adapters is None
    backward = (2 if trains_all else 1) * (decoder - attention) + 2 * attention
    adapters = 0.0 if trains_all else 6.0 * method.trained(shape) * part.tokens
    # Tiled MLPs are recomputed once more.
    mlps = 6.0 * shape.hidden * mlp_width(shape) * shape.layers * part.tokens * is_tiled(shape, method)
    heads = head * (2 + trains_all + method.repeats_head)
    return decoder * (2 if method.checkpoints else 1) + mlps + backward + adapters + heads


def phase_costs(run: Run, device: Device) -> dict[str, Cost]:
    """Return the costs of rollout, scoring, critic update and update, per optimizer step and rank."""
    fraction = 1 / run.steps_per_rollout
    costs: dict[str, Cost] = {}
    if run.rollout_batches:
        completions = run.completions * run.rollout_batches
        # Servers sample elsewhere, meanwhile or before: their time is not this device's.
        costs["rollout"] = Cost() if run.sampler == "server" else _rollout(run, device, completions) * fraction
    forwards = int(run.reference != "none") + int(run.scores_old)
    if forwards:
        costs["scoring"] = _passes(run, device, run.rows, backward=False) * (forwards * fraction)
    if run.has_critic:
        values = _passes(run, device, run.rows, backward=False, with_head=False) * fraction
        costs["scoring"] = costs.get("scoring", Cost()) + values
        costs["critic update"] = _passes(run, device, run.parts, backward=True, with_head=False) * run.accumulation
    costs["update"] = _passes(run, device, run.parts, backward=True, with_head=run.has_head) * run.accumulation
    if run.ranks > 1:
        # Gradients between ranks, and the weights that each pass of a sharded model gathers.
        moved = 2 * run.method.item * run.method.trained(run.shape)
        if run.sharding in ("fsdp2", "zero3"):
            gathers = (3 if run.method.checkpoints else 2) * len(run.parts) * run.accumulation
            moved += gathers * weight_bytes(run.shape, run.method)["weights"]
        costs["update"] += Cost(0.0, moved / device.link * (1 - LINK_OVERLAP))
    return costs


def _passes(run: Run, device: Device, parts: Sequence[Part], *, backward: bool, with_head: bool = True) -> Cost:
    """Cost of the passes over some parts."""
    shape, method = run.shape, run.method
    weights = weight_bytes(shape, method)["weights"]
    # The backward pass multiplies with the weights for the inputs' gradients, and has as much to do for their own.
    products = 1 + backward * (1 + method.checkpoints + (method.adapters is None))
    forwards = 1 + backward * (2 + method.checkpoints)
    # Tiles repeat the products of an MLP, and its kernels, a third of a layer's; the backward pass runs each again.
    tiled = method.mlp_tiles * (products + backward) - products if is_tiled(shape, method) else 0
    mlps = shape.parameters["mlp"]
    held = method.item if method.bits is None else method.bits / 8
    unpacked = products + tiled * mlps / max(shape.linear_weights, 1)
    flops = seconds = 0.0
    for part in parts:
        work = (
            update_flops(shape, method, part, with_head=with_head)
            if backward
            else forward_flops(shape, part, with_head=with_head)
        )
        seconds += _product_seconds(device, method, work, products * weights + tiled * mlps * held)
        seconds += (forwards + tiled / 3) * shape.layers * LAUNCH_SECONDS + unpacked * _dequantising(run, device)
        if backward and method.activation_offloading:
            moved = 2 * checkpoint_bytes(shape, method, part.tokens) / device.link
            seconds += moved * (1 - LINK_OVERLAP)
        flops += work
    if backward and len(parts) * run.accumulation > 1:
        # Gradients add up in fp32: each pass reads its own, and reads and writes the sum.
        added = method.trained(shape) * (method.item + 8) * len(parts)
        seconds += added / (device.bandwidth * BANDWIDTH)
    if backward:
        # The optimizer reads and writes every state, master and gradient once.
        state = (0 if method.paged_optimizer else method.optimizer_bytes) + 8
        seconds += method.trained(shape) * 2 * state / run.ranks / (device.bandwidth * BANDWIDTH) / run.accumulation
        if method.paged_optimizer:
            seconds += method.trained(shape) * 2 * method.optimizer_bytes / device.link / run.accumulation
    return Cost(flops, seconds)


def _product_seconds(device: Device, method: Method, work: float, weights: float) -> float:
    """Return the larger of compute and reading weights; a CPU packs the weights of each product in bf16 before it.

    Args:
        device: computes.
        method: says in which dtype.
        work: FLOPs.
        weights: bytes of weights, as often as a product takes them.
    """
    compute = work / (device.flops * MATMUL)
    if device.packing is not None and method.bf16:
        return compute + weights / device.packing
    return max(compute, weights / (device.bandwidth * BANDWIDTH))


def _dequantising(run: Run, device: Device) -> float:
    """Seconds to widen all quantised weights once: 4 bits read, 16 written and read again."""
    bits = run.method.bits
    if bits is None:
        return 0.0
    return run.shape.linear_weights * (bits / 8 + 2 * run.method.item) / (device.bandwidth * BANDWIDTH)


def _rollout(run: Run, device: Device, completions: int) -> Cost:
    """Prefill each prompt once, then decode up to 64 completions at a time to their greatest length."""
    shape, method, prompt, length = run.shape, run.method, run.prompt_tokens, run.completion_tokens
    per_token = cache_bytes(shape, method)
    rows = Wave.planned(run).rows
    prompts = -(-completions // run.group)
    prefill = Part(prompt * prompts, prompts, prompts * prompt * prompt // 2)
    flops = forward_flops(shape, prefill)
    forwards = -(-prompt * prompts // max(PREFILL_TOKENS, prompt))
    launch = shape.layers * LAUNCH_SECONDS + _dequantising(run, device)
    seconds = flops / (device.flops * MATMUL) + forwards * launch
    steps = length * -(-completions // rows)
    step = forward_flops(shape, Part(rows, rows, rows * (prompt + length // 2)))
    read = weight_bytes(shape, method)["weights"] - method.item * shape.vocabulary * shape.hidden * (not shape.tied)
    read += per_token * (rows * length // 2 + -(-rows // run.group) * prompt)
    parts = step / (device.flops * MATMUL), read / (device.bandwidth * BANDWIDTH)
    # A core computes little while it waits for memory: half the rows take more than half the time (`make pieces`).
    decode = (sum(parts) if device.is_cpu else max(parts)) + launch
    return Cost(flops + steps * step, seconds + steps * decode)
