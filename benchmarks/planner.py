"""How wrong the planner's formulas are: predicted against traced bytes of an update, over many configurations.

Usage: python benchmarks/planner.py [--only TEXT]

Each case is a stage, a model of published dimensions cut to a few layers, a way to train and a way to save memory.
The trace runs the trainer's own step on fake tensors and counts every byte (`burnish plan --trace`); the CUDA context,
which both would add, is left out. Writes `results/planner.json` and prints the tables of docs/planning.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainingArguments

from burnish.config.stages import Kind
from burnish.planner.devices import DEVICES
from burnish.planner.models import FoundModel, known_models
from burnish.planner.plan import estimate
from burnish.planner.run import Request
from burnish.training.traced_run import trace_request

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "Llama-3.1-8B": 4, "Qwen3-8B": 4, "Qwen3-0.6B": 8, "SmolLM2-135M": 8, "Mistral-7B-v0.3": 4, "gemma-2-2b": 4,
    "Qwen3-30B-A3B": 2,
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"peft": LORA},
    "QLoRA": {"peft": LORA, "model_init": {"quantization_config": "nf4"}},
}
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
MODES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "checkpointed": {CHECKPOINTING: True},
    "checkpointed, offloaded, tiled": {CHECKPOINTING: True, "activation_offloading": True, "mlp_tiles": 8},
}


def cases() -> list[tuple[str, Request]]:
    """Name all cases: GRPO for every model, other stages for two."""
    found: list[tuple[str, Request]] = []
    stages: dict[Kind, list[str]] = {"grpo": list(LAYERS)}
    stages |= {kind: ["Llama-3.1-8B", "Qwen3-0.6B"] for kind in ("sft", "dpo", "kto", "reward")}
    for stage, models in stages.items():
        for model, (method, how), (mode, fields) in itertools.product(models, METHODS.items(), MODES.items()):
            config = known_models()[model] | {"num_hidden_layers": LAYERS[model]}
            if "layer_types" in config:
                config["layer_types"] = config["layer_types"][: LAYERS[model]]
            # Experts have no gated MLP that could be tiled, and stay in 16 bits.
            is_mixture = model == "Qwen3-30B-A3B"
            if is_mixture and method != "LoRA":
                continue
            training = {"token_budget": 4096, **fields, **({} if stage == "grpo" else {"max_length": 1024})}
            if is_mixture:
                training.pop("mlp_tiles", None)
            request = Request(stage, FoundModel.of(config, model, model), DEVICES["H100"], training, **how)
            found.append((f"{stage}, {model}, {method}, {mode}", request))
    return found


def main() -> None:
    """Trace all cases and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name has this text, and write nothing")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    for name, request in cases():
        if options.only not in name:
            continue
        began, plan = time.perf_counter(), estimate(request)
        trace = trace_request(request)
        expected = {phase.name: plan.total(phase) - plan.fixed["context"] for phase in plan.phases}
        row = {"case": name, "predicted": expected["update"], "traced": trace.update.device_bytes}
        row |= {"error": row["predicted"] / row["traced"] - 1, "seconds": time.perf_counter() - began}
        if "scoring" in expected:
            row["scoring_error"] = expected["scoring"] / trace.scoring.device_bytes - 1
        rows.append(row)
        print(f"{row['error']:+7.1%}  {row['traced'] / 1e9:8.3f} GB  {row['seconds']:5.1f} s  {name}", flush=True)
    if not options.only:
        (ROOT / "benchmarks" / "results" / "planner.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Write median and worst error by model and by way to train."""
    lines = ["| | cases | median error | worst |", "| --- | --- | --- | --- |"]
    for label in (*LAYERS, *METHODS, *MODES, "all"):
        errors = [
            row["error"] for row in rows if label == "all" or label in [part.strip() for part in _parts(row["case"])]
        ]
        if errors:
            worst = max(errors, key=abs)
            lines.append(f"| {label} | {len(errors)} | {median(map(abs, errors)):.1%} | {worst:+.1%} |")
    return "\n".join(lines)


def _parts(case: str) -> list[str]:
    return case.split(", ", 3)


if __name__ == "__main__":
    main()
