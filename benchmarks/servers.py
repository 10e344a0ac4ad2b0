"""GRPO with samples from a vLLM server: against the native engine, and one rollout ahead of training.

Usage: python benchmarks/servers.py [--arms native server ahead native-lora server-lora] [--seeds 0 1 2] [--steps 30]

All arms train the demo's task from one SFT checkpoint. The trainer has one core and a server another, so that a run
ahead has what it needs to gain: two devices. Each run is a process of its own and a JSON file of its own in the output
folder; a run that is there is not repeated. Only steps are timed; all arms are judged by the native engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import torch
from algorithms import make_clock
from driver import HERE, MODEL, ROOT, hardware, say, source, write
from learning import Task
from peft import LoraConfig

from burnish import GRPOConfig, GRPOTrainer
from burnish.rewards import rubric_from_config

RANK = 16
SERVER: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 900.0}
LORA: dict[str, Any] = {"learning_rate": 2e-4}
ARMS: dict[str, dict[str, Any]] = {
    "native": {},
    "server": SERVER,
    "ahead": SERVER | {"max_staleness": 1},
    "native-lora": LORA,
    "server-lora": LORA | SERVER,
}
"""Settings of an arm beside those of the demo."""
TIMED = ("server", "ahead")
"""Arms that are compared by the clock, in all seeds; the others have two."""
KEPT = (
    "reward",
    "kl",
    "entropy",
    "completions/mean_length",
    "sampling/kl",
    "sampling/logprob_difference/mean",
    "sampling/staleness/mean",
    "sampling/staleness/max",
)
"""What is kept of a step's metrics, beside all seconds."""

Run = dict[str, Any]


def train(arm: str, seed: int, options: argparse.Namespace) -> None:
    """Train one run and judge it; its file is written when it is complete."""
    task = make_task(options)
    settings = arguments(arm, seed, options, task)
    folder = options.out / f"{arm}-{seed}"
    args = GRPOConfig(
        output_dir=str(folder), report_to="none", progress=False, logging_steps=1, overwrite_output_dir=True,
        **settings, **({"vllm_server_base_url": options.url} if options.url else {}),
    )  # fmt: skip
    adapters = (
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        if arm.endswith("-lora")
        else None
    )
    trainer = GRPOTrainer(
        str(task.checkpoint),
        rubric_from_config(task.file.document["rubric"]),
        args,
        task.training_rows(),
        peft_config=adapters,
    )
    clock = make_clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.save_model()
    steps = [
        {"step": log["step"]} | {name: log[name] for name in log if name in KEPT or name.startswith("seconds/")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    for step in steps:
        step["clock"] = clock.seconds[step["step"]][0]
    last = task.evaluate(folder, options.steps, clock.seconds[options.steps][0])
    write(
        options.out / f"{arm}-{seed}.json",
        {"arm": arm, "seed": seed, "settings": settings, "commit": source(), "last": last, "steps": steps},
    )


def arguments(arm: str, seed: int, options: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Settings of a run but for places: the demo's, the arm's, and the number of steps."""
    demo = {name: value for name, value in task.file.stages["grpo"].items() if name not in ("output_dir", "save_steps")}
    own = {"max_steps": options.steps, "seed": seed, "save_strategy": "no", "compile_rollouts": False, "bf16": True}
    return demo | own | ARMS[arm]


def make_task(options: argparse.Namespace) -> Task:
    """The demo's task and its checkpoint, which learning.py makes."""
    return Task(SimpleNamespace(out=options.out, held_out=options.held_out))


@contextlib.contextmanager
def served(folder: Path, options: argparse.Namespace, *words: str) -> Generator[str]:
    """Run `burnish serve` on its core; yield its URL when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["taskset", "-c", str(options.cores[1]), sys.executable, "-m", "burnish", "serve", str(folder),
               "--dtype", "bfloat16", "--max-model-len", "512", "--port", str(port), *words]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(options.cores[1]),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": "1",
    }
    log = options.out / f"serve{'-lora' if words else ''}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=ROOT)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 900.0) -> None:
    """Wait until a server answers."""
    began = time.monotonic()
    while time.monotonic() - began < seconds and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise SystemExit(f"the server did not start: see {log}")


def stored(arm: str, seed: int, options: argparse.Namespace) -> Run | None:
    """Return the run if it is complete; one that was made otherwise is an error."""
    file = options.out / f"{arm}-{seed}.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["settings"] != json.loads(json.dumps(arguments(arm, seed, options, make_task(options)))):
        raise SystemExit(f"{file} was made with other settings: use another --out, or remove it.")
    return found


def start(arm: str, seed: int, url: str | None, core: int, options: argparse.Namespace) -> None:
    """Run one arm and seed in a process of its own, on one core."""
    log = options.out / f"{arm}-{seed}.log"
    command = ["taskset", "-c", str(core), sys.executable, __file__, "--one", arm, str(seed),
               f"--steps={options.steps}", f"--held-out={options.held_out}", f"--out={options.out}"]  # fmt: skip
    command += ["--url", url] if url else []
    with log.open("w") as stream:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if subprocess.run(command, stdout=stream, stderr=stream, env=environment, check=False).returncode:
            raise SystemExit(f"{arm} seed {seed} failed: see {log}")


def summarise(runs: dict[str, list[Run]], first: dict[str, Any]) -> dict[str, Any]:
    """Accuracy before and after by seed, seconds a step, and how far behind the samples were."""
    found: dict[str, Any] = {"before": first["accuracy"]}
    for arm, own in runs.items():
        # The first steps of a process warm up: memory, kernels, the server's prefix cache.
        by_step = [
            [
                after["clock"] - before["clock"]
                for before, after in zip(run["steps"][2:], run["steps"][3:], strict=False)
            ]
            for run in own
        ]
        found[arm] = {
            "after": [run["last"]["accuracy"] for run in own],
            "intervals": [[run["last"]["low"], run["last"]["high"]] for run in own],
            "gain": fmean(run["last"]["accuracy"] for run in own) - first["accuracy"],
            "seconds_per_step": [median(seconds) for seconds in by_step],
            "total_seconds": [run["steps"][-1]["clock"] for run in own],
            "sampler_kl": fmean(step["sampling/kl"] for run in own for step in run["steps"] if "sampling/kl" in step),
            "most_stale": max(step.get("sampling/staleness/max", 0) for run in own for step in run["steps"]),
        }
    return found


def main() -> None:
    """Train what is missing, seed by seed, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=200, help="problems to evaluate on")
    parser.add_argument("--cores", nargs=2, type=int, default=sorted(os.sched_getaffinity(0))[:2])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "servers")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "servers.json")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="a single run, in this process")
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        train(options.one[0], int(options.one[1]), options)
        return
    task = make_task(options)
    first = task.prepare()
    say(f"start: {first['accuracy']:.1%}")
    # The order of arms alternates, so that a machine that slows down favours none.
    missing = [
        (arm, seed)
        for number, seed in enumerate(options.seeds)
        for arm in (options.arms if number % 2 == 0 else options.arms[::-1])
        if (seed < 2 or arm in TIMED) and stored(arm, seed, options) is None
    ]

    def run(arm: str, seed: int, url: str | None, core: int) -> None:
        start(arm, seed, url, core, options)
        found = stored(arm, seed, options) or {}
        say(f"{arm} seed {seed}: {found['last']['accuracy']:.1%} after {found['steps'][-1]['clock'] / 60:.1f} min")

    for adapters in (False, True):
        mine = [(arm, seed) for arm, seed in missing if "use_vllm" in ARMS[arm] and arm.endswith("-lora") == adapters]
        if mine:
            with served(task.checkpoint, options, *(("--lora-rank", str(RANK)) if adapters else ())) as url:
                for arm, seed in mine:
                    run(arm, seed, url, options.cores[0])
    # These use one core each and are not timed against each other.
    alone = [(arm, seed) for arm, seed in missing if "use_vllm" not in ARMS[arm]]
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(lambda n=n: [run(*one, None, options.cores[n]) for one in alone[n::2]]) for n in (0, 1)]
        for half in halves:
            half.result()
    runs = {arm: [run for seed in options.seeds if (run := stored(arm, seed, options))] for arm in options.arms}
    summary = summarise({arm: own for arm, own in runs.items() if own}, first)
    about = {"hardware": hardware(1), "model": MODEL, "task": "examples/chain_sum.toml", "summary": summary}
    write(options.json, about | {"runs": [run for own in runs.values() for run in own]})
    say(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
