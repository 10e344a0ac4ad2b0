"""How a stage of `gpu.py` runs: its time, its workers, and what it saves of their steps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from driver import Worker, say
from gpu_plan import flops, request_of

__all__ = ["LIMITS", "TINY_LENGTHS", "Found", "Setup", "failure", "measure", "summary"]

LIMITS = {"2k": (512, 1536, 8e9), "20k": (512, 19_968, 16e9)}
"""Tokens of a prompt and of a completion, and the bytes of the device that the run is to stay within."""
TINY_LENGTHS = {"2k": (16, 48), "20k": (16, 112)}
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Keeps fragmentation out of a capped run; both sides get it."""

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Setup:
    """How a stage runs.

    Args:
        device: "cuda" or "cpu".
        tiny: a few small layers and short rows, to test the code.
        seconds: time for the stage.
        work: folder of logs and of `stage.json`, what the stage has found.
        path: PYTHONPATH of the workers.
        trl_python: interpreter that has TRL; None if there is none.
        began: when the stage began, by `time.monotonic`.
    """

    device: str
    tiny: bool
    seconds: float
    work: str
    path: str
    trl_python: str | None
    began: float = dataclasses.field(default_factory=time.monotonic)

    def allows(self, seconds: float) -> bool:
        """Tell whether so many seconds are left, with some to end the workers."""
        return time.monotonic() - self.began + seconds < self.seconds - 5

    def save(self, found: Mapping[str, Any]) -> None:
        """Replace the file of results, which is whole at any time."""
        draft = Path(self.work, "stage.draft")
        draft.write_text(json.dumps(found))
        draft.replace(draft.with_suffix(".json"))

    def lengths(self, name: str) -> tuple[int, int]:
        """Return the tokens of a prompt and of a completion."""
        return TINY_LENGTHS[name] if self.tiny else LIMITS[name][:2]

    def start(self, name: str, settings: Mapping[str, Any]) -> Worker:
        """Start a worker, and wait until its model is built."""
        python = sys.executable if settings["side"] != "trl" else self.trl_python
        if python is None:
            raise RuntimeError("TRL is not installed here: neither for this Python nor in .venv-trl")
        threads = 1 if self.tiny else len(os.sched_getaffinity(0))
        whole = {"device": self.device, "threads": threads, "output_dir": str(Path(self.work, name)), **settings}
        own = {"PYTHONPATH": self.path, "TRL_EXPERIMENTAL_SILENCE": "1", **EXPANDABLE}
        worker = Worker(Path(python), "gpu_side.py", whole, Path(self.work, "logs", f"{name}.log"), own)
        say(f"{name}: ready after {worker.info['start_seconds']:.0f} s")
        return worker

    def quantizes(self, side: str) -> bool:
        """Tell whether a side's interpreter can hold weights in NF4; TRL's own environment may lack bitsandbytes."""
        python = sys.executable if side != "trl" else self.trl_python
        command = [str(python), "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('bitsandbytes') is None)"]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": self.path}, check=False).returncode == 0


def summary(settings: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], device: str) -> Found:
    """Rates of the steps after the first, which may still compile, and the peaks of all."""
    counted = steps[1:] or steps
    seconds = median(step["seconds"] for step in counted)
    update = median(step["seconds"] - step["rollout_seconds"] for step in counted)
    request = request_of(settings, device)
    needed, executed = flops(request, by_sequence=settings["side"] == "trl")
    completions = steps[-1]["completions"]
    prompt_tokens = settings["prompt"] * completions // settings["num_generations"]
    found: Found = {
        "seconds": seconds,
        "update_seconds": update,
        "tokens_per_second": (median(step["completion_tokens"] for step in steps) + prompt_tokens) / seconds,
        "mfu": needed / update / request.device.flops,
        "hfu": executed / update / request.device.flops,
        "flops": needed,
        "executed_flops": executed,
    }
    for name in ("max_allocated_bytes", "max_reserved_bytes", "used_bytes"):
        values = [step[name] for step in steps if step[name] is not None]
        found[name] = max(values) if values else None
    return found


def measure(
    setup: Setup,
    name: str,
    settings: Found,
    num_steps: int,
    save: Callable[[Found], None],
    *,
    kept_seconds: float = 0,
) -> Found:
    """Take steps of one worker, as many as the time allows; the first on full completions is always taken.

    Args:
        setup: the stage's.
        name: of the worker.
        settings: of the worker.
        num_steps: steps on full completions at most.
        save: is given what was found, after every step.
        kept_seconds: time of the stage to leave for others.
    """
    worker = setup.start(name, settings)
    found: Found = {"settings": settings | {"config": settings["config"]["model_type"]}, "start": worker.info}
    steps: list[Found] = []
    try:
        found["short_steps"] = [worker.step() for _ in range(settings["short_steps"])]
        save(found)
        while len(steps) < num_steps and (not steps or setup.allows(1.1 * steps[-1]["seconds"] + kept_seconds)):
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
