"""How wrong a trace is: bytes that it counts against those of the same step on random weights, and resident memory.

Usage: python benchmarks/traced_bytes.py

Whole models of published dimensions on this CPU, a process for each case. Both sides run the trainer's own step and
follow every storage (`burnish.training.ledger`), one on fake tensors, one with values; rollouts are compared in the
tests. Beside them stands the most memory that the process held above what it held after its imports and the trace,
freed blocks that the C library keeps included. DPO is not among them: its check of the reference refuses random
weights. Writes `results/traced_bytes.json` and prints the table of docs/planning.md.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

from common import _status_bytes
from planner import CHECKPOINTING, METHODS

from burnish.config.stages import Kind
from burnish.planner.devices import find_device
from burnish.planner.models import FoundModel, known_models
from burnish.planner.run import Request
from burnish.training.traced_run import trace_request

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("SmolLM2-135M", "Qwen3-0.6B")
MODES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "checkpointed": {CHECKPOINTING: True},
    "checkpointed, tiled": {CHECKPOINTING: True, "mlp_tiles": 8},
}
STAGES: dict[Kind, dict[str, Any]] = {
    "grpo": {"max_completion_length": 128, "num_iterations": 2},
    "sft": {"max_length": 1024},
    "reward": {"max_length": 1024},
}
"""GRPO trains twice on a rollout, so that it scores its old policy."""


def cases() -> list[tuple[str, Request]]:
    """Name all cases: each method meets each stage and each mode."""
    found: list[tuple[str, Request]] = []
    for model, method, (number, mode) in itertools.product(MODELS, ("full", "LoRA"), enumerate(MODES)):
        stage = tuple(STAGES)[(number + (method == "LoRA")) % len(STAGES)]
        source = FoundModel.of(known_models()[model], model, model)
        training = {"token_budget": 2048, **STAGES[stage], **MODES[mode]}
        given: dict[str, Any] = METHODS[method] if stage == "sft" else {"prompt_tokens": 256, **METHODS[method]}
        request = Request(stage, source, find_device("cpu"), training, **given)
        found.append((f"{model}, {stage}, {method}, {mode}", request))
    return found


def measure(request: Request) -> dict[str, Any]:
    """Count both, in a process of its own; the one with values last, for its resident memory."""
    traced = trace_request(request).by_phase()
    baseline = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    measured = trace_request(request, has_values=True).by_phase()
    resident = _status_bytes("VmHWM") - baseline
    phases = {
        name: {"traced": traced[name].device_bytes, "measured": peak.device_bytes}
        for name, peak in measured.items()
        if name != "optimizer"
    }
    return {"phases": phases, "resident": resident}


def _quiet() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    """Measure all cases and write what was found."""
    rows: list[dict[str, Any]] = []
    print("| | traced | measured | error of the worst phase | resident |\n| --- | --- | --- | --- | --- |")
    for name, request in cases():
        with multiprocessing.get_context("spawn").Pool(1, initializer=_quiet) as pool:
            found = pool.apply(measure, (request,))
        rows.append({"case": name, **found})
        peaks = found["phases"].values()
        worst = max((peak["traced"] / peak["measured"] - 1 for peak in peaks), key=abs)
        traced, measured = (max(peak[side] for peak in peaks) / 1e9 for side in ("traced", "measured"))
        resident = found["resident"] / 1e9
        print(f"| {name} | {traced:.2f} GB | {measured:.2f} GB | {worst:+.1%} | {resident:.2f} GB |", flush=True)
    (ROOT / "benchmarks" / "results" / "traced_bytes.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
