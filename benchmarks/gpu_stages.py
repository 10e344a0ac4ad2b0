"""The stages of `gpu.py`, each run in a process of its own: `python gpu_stages.py NAME SETUP`, with SETUP as JSON.

A stage saves what it has found after every step, so that one that is stopped keeps the steps that it has taken. No
torch is loaded here but by `environment`: the workers of `gpu_side.py` hold the device's memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from driver import ROOT, Worker, hardware, say
from gpu_plan import CONTEXT_BYTES, planned, request_of, shape_of
from gpu_setup import LIMITS, TINY_LENGTHS, Found, Setup, failure, measure, summary

SAVING = {"gradient_checkpointing": True, "activation_offloading": True, "mlp_tiles": 8, "embedding_offloading": True}
"""Settings of docs/planning.md, beside a `token_budget` that holds one completion at a time."""
GROUP = 8
LARGEST = (19_968, 9_728, 4_608, 1_536)
"""Completion lengths at which TRL is tried, until one runs."""
TRL_SPEED: dict[str, dict[str, Any]] = {
    "trl-bf16": {"weights": "bfloat16", "bf16": False},
    "trl-autocast": {"weights": "float32", "bf16": True},
}
SPEED_PROMPTS, SPEED_MICRO_BATCH = 4, 4
SAMPLED_TOKENS, SAMPLED_PROMPTS = 256, 8


def qlora(setup: Setup, side: str, model: str, lengths: tuple[int, int], training: Mapping[str, Any]) -> Found:
    """Settings of a worker that trains adapters of rank 16 on all linear layers, one prompt with G completions."""
    prompt, completion = lengths
    batch = {"completions": GROUP, "micro_batch": 1} if side == "trl" else {"per_device_train_batch_size": GROUP}
    return {
        "side": side, "config": shape_of(model, tiny=setup.tiny), "quantized": setup.quantizes(side), "lora": True,
        "prompt": prompt, "completion": completion, "num_generations": GROUP, "short_steps": 1, "fixed": True,
        "training": {**batch, **training},
    }  # fmt: skip


def memory(setup: Setup, model: str, name: str, *, fixed: bool = True) -> None:
    """Take capped QLoRA steps; where they fail, uncapped ones say how much was missing.

    The cap is the limit less the CUDA context that the planner assumes; what the context really takes is `used_bytes`
    less what the allocator has reserved.
    """
    lengths, limit = setup.lengths(name), LIMITS[name][2]
    settings = qlora(setup, "burnish", model, lengths, {**SAVING, "token_budget": sum(lengths)})
    settings |= {"fixed": fixed, "short_steps": int(fixed)}
    found: Found = {
        "model": model, "limit_bytes": limit, "cap_bytes": limit - CONTEXT_BYTES,
        "planned": planned(request_of(settings, setup.device)),
    }  # fmt: skip
    setup.save(found)
    steps = 1 if not fixed else 2 if name == "20k" else 3
    try:
        capped = settings | {"cap_bytes": limit - CONTEXT_BYTES}
        made = measure(setup, f"memory-{name}", capped, steps, lambda made: setup.save(found | made))
    except RuntimeError as error:
        found["capped"] = failure(error)
        setup.save(found)
        made = measure(setup, f"memory-{name}-uncapped", settings, 1, lambda made: setup.save(found | made))
    found |= made
    if setup.device == "cuda":
        # At the end of a step, when the libraries and kernels that it needs are loaded.
        found["context_bytes"] = max(step["used_bytes"] - step["reserved_bytes"] for step in made["steps"])
        found["within_limit"] = made["max_reserved_bytes"] + CONTEXT_BYTES <= limit
        found["within_limit_as_used"] = made["used_bytes"] <= limit
    setup.save(found)


def largest(setup: Setup) -> None:
    """QLoRA at the largest completion length that TRL can run, uncapped: TRL, then burnish with checkpointing only."""
    found: Found = {"model": "Llama-3.1-8B", "trl": {}}
    tried = [lengths[1] for lengths in TINY_LENGTHS.values()][::-1] if setup.tiny else LARGEST
    prompt = setup.lengths("2k")[0]
    for completion in tried:
        if not setup.allows(10):
            break

        def save(made: Found, completion: int = completion) -> None:
            found["trl"][str(completion)] = made
            setup.save(found)

        settings = qlora(
            setup, "trl", "Llama-3.1-8B", (prompt, completion), {"gradient_checkpointing": True, "bf16": True}
        )
        try:
            save(measure(setup, f"largest-trl-{completion}", settings, 2, save, kept_seconds=90))
        except RuntimeError as error:
            save(failure(error))
            continue
        found["completion"] = completion
        break
    completion = found.get("completion", tried[-1])
    settings = qlora(setup, "burnish", "Llama-3.1-8B", (prompt, completion), {"gradient_checkpointing": True})
    made = measure(setup, "largest-burnish", settings, 2, lambda made: setup.save(found | {"burnish": made}))
    setup.save(found | {"burnish": made})


def speed_sides(setup: Setup) -> dict[str, Found]:
    """Settings of the workers that train all weights of the 0.6B, by name."""
    prompt, completion = setup.lengths("2k")
    prompts = 1 if setup.tiny else SPEED_PROMPTS
    base = {
        "config": shape_of("Qwen3-0.6B", tiny=setup.tiny), "quantized": False, "lora": False, "fixed": True,
        "prompt": prompt, "completion": completion, "num_generations": GROUP, "short_steps": 1,
    }  # fmt: skip
    own = {"side": "burnish", "training": {"per_device_train_batch_size": prompts * GROUP}}
    sides: dict[str, Found] = {"burnish": base | own}
    for name, setting in TRL_SPEED.items():
        training = {"completions": prompts * GROUP, "micro_batch": SPEED_MICRO_BATCH, "gradient_checkpointing": False}
        training["bf16"] = setting["bf16"]
        sides[name] = base | {"side": "trl", "weights": setting["weights"], "training": training}
    return sides


def speed(setup: Setup) -> None:
    """Steps of burnish and of TRL at two settings, in turns whose order rotates, on the same completions."""
    sides, workers = speed_sides(setup), dict[str, Worker]()
    found: Found = {"model": "Qwen3-0.6B", "sides": {}}
    try:
        for name, settings in sides.items():
            try:
                worker = setup.start(f"speed-{name}", settings)
                found["sides"][name] = {"start": worker.info, "short_steps": [worker.step()], "steps": []}
                workers[name] = worker
            except RuntimeError as error:
                found["sides"][name] = failure(error)
            setup.save(found)
        if not workers:
            raise RuntimeError("no side could be started")
        longest, rounds = 0.0, 2 if setup.tiny else 5
        for number in range(rounds):
            if not setup.allows(longest):
                break
            began, turn = time.monotonic(), number % len(workers)
            order = [*workers][turn:] + [*workers][:turn]
            made = {name: workers[name].step() for name in order}
            found["same_rows"] = found.get("same_rows", True) and len({step["rows"] for step in made.values()}) == 1
            for name, step in made.items():
                own = found["sides"][name]
                own["steps"].append(step)
                own |= summary(sides[name], own["steps"], setup.device)
            longest = max(longest, 1.1 * (time.monotonic() - began))
            setup.save(found)
            say(", ".join(f"{name} {step['seconds']:.2f} s" for name, step in made.items()))
    finally:
        for worker in workers.values():
            worker.close()


def rollouts(setup: Setup) -> None:
    """Tokens per second of the native engine and of `generate`, in turns."""
    found: Found = {}
    for model in ("Qwen3-0.6B", "Llama-3.1-8B"):
        if not setup.allows(20):
            break
        found[model] = {"turns": {"native": [], "generate": []}}
        prompts, tokens = (2, 8) if setup.tiny else (SAMPLED_PROMPTS, SAMPLED_TOKENS)
        settings = {
            "side": "samplers", "config": shape_of(model, tiny=setup.tiny), "prompt": setup.lengths("2k")[0],
            "prompts": prompts, "num_generations": GROUP,
        }  # fmt: skip
        worker, longest = setup.start(f"rollouts-{model}", settings), 0.0
        try:
            for number in range(3):
                for engine in ("native", "generate") if number % 2 else ("generate", "native"):
                    if not setup.allows(longest):
                        break
                    asked = 4 if number == 0 else tokens  # the first round compiles and warms up
                    turn = worker.ask({"command": "sample", "engine": engine, "tokens": asked})
                    if number:
                        longest = max(longest, 1.1 * turn["seconds"])
                        found[model]["turns"][engine].append(turn)
                        found[model][engine] = median(t["tokens"] / t["seconds"] for t in found[model]["turns"][engine])
                        setup.save(found)
            say(f"{model}: tokens/s: " + ", ".join(f"{e} {found[model].get(e, 0):.0f}" for e in ("native", "generate")))
        finally:
            worker.close()


def environment(setup: Setup) -> None:
    """The device, its driver, and the versions of all that is measured."""
    import torch

    packages = ("torch", "transformers", "accelerate", "peft", "triton", "bitsandbytes", "trl", "datasets", "pydantic")
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    found: Found = {
        "python": sys.version.split()[0],
        "versions": {name: metadata.version(name) if name in installed else None for name in packages},
        "cuda": torch.version.cuda,
        "compilers": {name: shutil.which(name) for name in ("cc", "gcc", "g++", "nvcc")},
        "hardware": hardware(len(os.sched_getaffinity(0))),
    }
    setup.save(found)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found["device"] = {"name": device.name, "memory_bytes": device.total_memory, "count": torch.cuda.device_count()}
        found["device"]["capability"] = list(torch.cuda.get_device_capability(0))
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    setup.save(found)


def tests(setup: Setup) -> None:
    """Run the tests marked `gpu`; only their files are collected, since others import what may not be installed."""
    if setup.device != "cuda":
        setup.save({"skipped": "no CUDA device"})
        return
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    report = Path(setup.work, "tests.xml")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": setup.path},
    )  # fmt: skip
    found: Found = {"files": [Path(name).name for name in files], "exit": done.returncode}
    if report.exists():
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped"):
            found[name] = sum(int(suite.get(name, 0)) for suite in suites)
    setup.save(found | {"tail": (done.stdout + done.stderr)[-3000:]})


STAGES: dict[str, tuple[float, Callable[[Setup], None]]] = {
    "environment": (90, environment),
    "tests": (120, tests),
    "memory-2k": (150, lambda setup: memory(setup, "Llama-3.1-8B", "2k")),
    "memory-20k": (200, lambda setup: memory(setup, "Llama-3.1-8B", "20k")),
    "largest": (240, largest),
    "speed": (110, speed),
    "rollouts": (90, rollouts),
    "memory-2k-qwen": (110, lambda setup: memory(setup, "Qwen3-8B", "2k")),
    "memory-2k-native": (240, lambda setup: memory(setup, "Llama-3.1-8B", "2k", fixed=False)),
}
"""Seconds at most and function of each stage, the most important first."""

if __name__ == "__main__":
    STAGES[sys.argv[1]][1](Setup(**json.loads(sys.argv[2])))
