"""The stages of `gpu.py`, each run in a process of its own: `python gpu_stages.py NAME SETUP`, with SETUP as JSON.

A stage saves what it has found after every step, so that one that is stopped keeps the steps that it has taken. No
torch is loaded here but by `environment`: the workers of `gpu_side.py` hold the device's memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from driver import ROOT, Worker, hardware, say
from gpu_plan import CONTEXT_BYTES, flops, planned, request_of, shape_of

WORK = ROOT / "outputs" / "gpu"

MEMORY = {"2k": (512, 1536, 8e9), "20k": (512, 19_968, 16e9)}
"""Tokens of a prompt and of a completion, and the bytes of the device that the run is to stay within."""
TINY_LENGTHS = {"2k": (16, 48), "20k": (16, 112)}
SAVING = {"gradient_checkpointing": True, "activation_offloading": True, "mlp_tiles": 8, "embedding_offloading": True}
"""Settings of docs/planning.md, beside a `token_budget` that holds one completion at a time."""
GROUP = 8
LARGEST = (19_968, 9_728, 4_608, 1_536)
"""Completion lengths at which TRL is tried, until one runs."""
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Keeps fragmentation out of a capped run; both sides get it."""
TRL_SPEED: dict[str, dict[str, Any]] = {
    "trl-bf16": {"weights": "bfloat16", "bf16": False},
    "trl-autocast": {"weights": "float32", "bf16": True},
}
SPEED_PROMPTS, SPEED_MICRO_BATCH = 4, 4
SAMPLED_TOKENS, SAMPLED_PROMPTS = 256, 8

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """How a stage runs.

    Args:
        device: "cuda" or "cpu".
        tiny: a few small layers and short rows, to test the code.
        seconds: time for the stage.
        out: file of what the stage finds.
        path: PYTHONPATH of the workers.
        trl_python: interpreter that has TRL; None if there is none.
        began: when the stage began, by `time.monotonic`.
    """

    device: str
    tiny: bool
    seconds: float
    out: str
    path: str
    trl_python: str | None
    began: float = dataclasses.field(default_factory=time.monotonic)

    def allows(self, seconds: float) -> bool:
        """Tell whether so many seconds are left, with some to end the workers."""
        return time.monotonic() - self.began + seconds < self.seconds - 5

    def save(self, found: Mapping[str, Any]) -> None:
        """Replace the file of results, which is whole at any time."""
        draft = Path(f"{self.out}.draft")
        draft.write_text(json.dumps(found))
        draft.replace(self.out)

    def lengths(self, name: str) -> tuple[int, int]:
        """Return the tokens of a prompt and of a completion."""
        return TINY_LENGTHS[name] if self.tiny else MEMORY[name][:2]

    def start(self, name: str, settings: Mapping[str, Any]) -> Worker:
        """Start a worker, and wait until its model is built."""
        python = sys.executable if settings["side"] != "trl" else self.trl_python
        if python is None:
            raise RuntimeError("TRL is not installed here: neither for this Python nor in .venv-trl")
        threads = 1 if self.tiny else len(os.sched_getaffinity(0))
        whole = {"device": self.device, "threads": threads, "output_dir": str(WORK / name), **settings}
        own = {"PYTHONPATH": self.path, "TRL_EXPERIMENTAL_SILENCE": "1", **EXPANDABLE}
        worker = Worker(Path(python), "gpu_side.py", whole, WORK / "logs" / f"{name}.log", own)
        say(f"{name}: ready after {worker.info['start_seconds']:.0f} s")
        return worker

    def quantizes(self, side: str) -> bool:
        """Tell whether a side's interpreter can hold weights in NF4; TRL's own environment may lack bitsandbytes."""
        python = sys.executable if side != "trl" else self.trl_python
        command = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('bitsandbytes') is None)"]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": self.path}, check=False).returncode == 0


def qlora(setup: Setup, side: str, model: str, lengths: tuple[int, int], training: Mapping[str, Any]) -> Found:
    """Settings of a worker that trains adapters of rank 16 on all linear layers, one prompt with G completions."""
    prompt, completion = lengths
    batch = {"completions": GROUP, "micro_batch": 1} if side == "trl" else {"per_device_train_batch_size": GROUP}
    return {
        "side": side, "config": shape_of(model, tiny=setup.tiny), "quantized": setup.quantizes(side), "lora": True,
        "prompt": prompt, "completion": completion, "num_generations": GROUP, "short_steps": 1, "fixed": True,
        "training": {**batch, **training},
    }  # fmt: skip


def summary(settings: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], device: str) -> Found:
    """Rates of the steps after the first, which may still compile, and the peaks of all."""
    seconds = median(step["seconds"] for step in (steps[1:] or steps))
    request = request_of(settings, device)
    needed, executed = flops(request, by_sequence=settings["side"] == "trl")
    completions = steps[-1]["completions"]
    prompt_tokens = settings["prompt"] * completions // settings["num_generations"]
    found: Found = {
        "seconds": seconds,
        "tokens_per_second": (median(step["completion_tokens"] for step in steps) + prompt_tokens) / seconds,
        "mfu": needed / seconds / request.device.flops,
        "hfu": executed / seconds / request.device.flops,
        "flops": needed,
        "executed_flops": executed,
    }
    for name in ("max_allocated_bytes", "max_reserved_bytes", "used_bytes"):
        values = [step[name] for step in steps if step[name] is not None]
        found[name] = max(values) if values else None
    return found


def measure(
    setup: Setup, name: str, settings: Mapping[str, Any], num_steps: int, save: Callable[[Found], None]
) -> Found:
    """Take steps of one worker, as many as the time allows; the first on full completions is always taken."""
    worker = setup.start(name, settings)
    found: Found = {"settings": settings | {"config": settings["config"]["model_type"]}, "start": worker.info}
    steps: list[Found] = []
    try:
        found["short_steps"] = [worker.step() for _ in range(settings["short_steps"])]
        save(found)
        while len(steps) < num_steps and (not steps or setup.allows(1.1 * steps[-1]["seconds"])):
            steps.append(worker.step())
            found |= {"steps": steps, **summary(settings, steps, setup.device)}
            save(found)
            say(f"{name}: {steps[-1]['seconds']:.2f} s, {found['tokens_per_second']:.0f} tokens/s")
    finally:
        worker.close()
    return found


def failure(error: RuntimeError) -> Found:
    """Describe a worker that ended early."""
    return {"failed": str(error)[-3000:]}


def memory(setup: Setup, model: str, name: str, *, fixed: bool = True) -> None:
    """Take capped QLoRA steps; where they fail, uncapped ones say how much was missing.

    The cap is the limit less the CUDA context that the planner assumes; what the context really takes is `used_bytes`
    less what the allocator has reserved.
    """
    lengths, limit = setup.lengths(name), MEMORY[name][2]
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
        found["context_bytes"] = made["start"]["used_bytes"] - made["start"]["reserved_bytes"]
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
            save(measure(setup, f"largest-trl-{completion}", settings, 2, save))
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
    report = WORK / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
    WORK.mkdir(parents=True, exist_ok=True)
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
    "environment": (40, environment),
    "tests": (90, tests),
    "memory-2k": (110, lambda setup: memory(setup, "Llama-3.1-8B", "2k")),
    "memory-20k": (170, lambda setup: memory(setup, "Llama-3.1-8B", "20k")),
    "largest": (190, largest),
    "speed": (110, speed),
    "rollouts": (90, rollouts),
    "memory-2k-qwen": (90, lambda setup: memory(setup, "Qwen3-8B", "2k")),
    "memory-2k-native": (240, lambda setup: memory(setup, "Llama-3.1-8B", "2k", fixed=False)),
}
"""Seconds at most and function of each stage, the most important first."""

if __name__ == "__main__":
    STAGES[sys.argv[1]][1](Setup(**json.loads(sys.argv[2])))
