"""How wrong the planner's formulas are: predicted against traced bytes of each phase, over many configurations.

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
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainingArguments

from burnish.config.stages import STAGES, Kind
from burnish.planner.devices import DEVICES
from burnish.planner.models import FoundModel, known_models
from burnish.planner.plan import estimate
from burnish.planner.run import Request
from burnish.training.traced_run import trace_request

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "Llama-3.1-8B": 3, "Qwen3-8B": 3, "Qwen3-0.6B": 4, "SmolLM2-135M": 6, "Mistral-7B-v0.3": 3, "gemma-2-2b": 3,
    "Qwen3-30B-A3B": 2, "Mixtral-8x7B-v0.1": 2,
}  # fmt: skip
MIXTURES = ("Qwen3-30B-A3B", "Mixtral-8x7B-v0.1")
PAIR = ("Llama-3.1-8B", "Qwen3-0.6B")
OTHERS: tuple[Kind, ...] = ("sft", "reward", "dpo", "kto", "online_dpo", "ppo")
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
    "checkpointed + offloaded + tiled": {CHECKPOINTING: True, "activation_offloading": True, "mlp_tiles": 8},
}


def cases() -> list[tuple[str, Request]]:
    """Name all cases: GRPO for every model, the other stages for two, and several ranks; modes take turns."""
    found: list[tuple[str, Request]] = []
    modes = itertools.cycle(MODES)

    def add(stage: Kind, model: str, method: str, mode: str, ranks: int = 1, **more: Any) -> None:
        config = known_models()[model] | {"num_hidden_layers": LAYERS[model]}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: LAYERS[model]]
        online = STAGES[stage].online
        training = {"token_budget": 4096, **MODES[mode], **({} if online else {"max_length": 1024}), **more}
        if model in MIXTURES:
            # Experts have no gated MLP that could be tiled.
            training.pop("mlp_tiles", None)
        source = FoundModel.of(config, model, model)
        request = Request(stage, source, DEVICES["H100"], training, ranks=ranks, **METHODS[method])
        lengths = "".join(f", {name} {value}" for name, value in more.items())
        label = f"{ranks} rank" + "s" * (ranks > 1)
        found.append((f"{stage}, {model}, {method}, {mode}, {label}{lengths}", request))

    for model, method in itertools.product(LAYERS, METHODS):
        # They stay in 16 bits, too, and in full their optimizer is nearly all there is.
        if model not in MIXTURES or method == "LoRA":
            add("grpo", model, method, next(modes))
            longer = {"max_completion_length": 1024, "per_device_train_batch_size": 64}
            add("grpo", model, method, next(modes), **longer)
    for stage, model in itertools.product(OTHERS, PAIR):
        next(modes)  # each method meets each mode
        for method in METHODS:
            add(stage, model, method, next(modes))
    for ranks, method in itertools.product((2, 4), ("full", "LoRA")):
        add("grpo", "Llama-3.1-8B", method, next(modes), ranks)
        add("sft", "Qwen3-0.6B", method, next(modes), ranks, gradient_accumulation_steps=1)
    return found


def main() -> None:
    """Trace all cases and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name has this text, and write nothing")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for name, request in cases():
        if options.only not in name:
            continue
        began, plan = time.perf_counter(), estimate(request)
        traced = trace_request(request).by_phase()
        phases: dict[str, dict[str, float]] = {}
        for planned in plan.phases:
            if planned.name in traced:
                expected, found = plan.total(planned) - plan.fixed["context"], traced[planned.name].device_bytes
                phases[planned.name] = {"predicted": expected, "traced": found, "error": expected / found - 1}
        rows.append({"case": name, "seconds": time.perf_counter() - began, "phases": phases})
        errors = ", ".join(f"{phase} {values['error']:+.1%}" for phase, values in phases.items())
        print(f"{rows[-1]['seconds']:5.1f} s  {name}: {errors}", flush=True)
    if not options.only:
        (ROOT / "benchmarks" / "results" / "planner.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Write median and worst error of each phase and, over all phases, by part of a case's name."""
    lines = ["| | configurations | median error | worst |", "| --- | --- | --- | --- |"]

    def add(label: str, errors: list[float]) -> None:
        if errors:
            worst = max(errors, key=abs)
            lines.append(f"| {label} | {len(errors)} | {median(map(abs, errors)):.1%} | {worst:+.1%} |")

    for phase in dict.fromkeys(phase for row in rows for phase in row["phases"]):
        add(phase, [row["phases"][phase]["error"] for row in rows if phase in row["phases"]])
    parts = [row["case"].split(", ") for row in rows]
    for label in dict.fromkeys(name for names in zip(*(part[:5] for part in parts), strict=True) for name in names):
        chosen = [row for row, part in zip(rows, parts, strict=True) if label in part]
        add(label, [max((p["error"] for p in row["phases"].values()), key=abs) for row in chosen])
    add("all", [max((p["error"] for p in row["phases"].values()), key=abs) for row in rows])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
