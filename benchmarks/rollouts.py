"""Sampling speed on a CPU: burnish's engine, transformers' `generate` and vLLM, in turns: see README.md.

Usage: python benchmarks/rollouts.py [--repeats 4] [--workloads short uneven full] [--no-speculate] [--no-pack]

Each engine is a process of its own that holds the model in bf16. In a round all get the same prompts, one engine at a
time, and the order is reversed from round to round. The first round warms up and is reported apart.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from common import WORKLOADS, conversation_ids, cpu_seconds, rows
from driver import HERE, MODEL, ROOT, WORK, Worker, hardware, make_model, say, show_spread, source, spread, write
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT / "scripts"))
from plot_curves import draw, save

PROMPTS, SAMPLES = 4, 8


@dataclass(frozen=True, slots=True)
class Load:
    """What a call of an engine samples: 4 prompts, 8 completions each.

    Args:
        max_new_tokens: limit of one completion.
        ends: False has every completion go on to the limit.
        open_questions: how many prompts ask for a long text instead of a number.
    """

    max_new_tokens: int = 128
    ends: bool = True
    open_questions: int = 0


LOADS = {"short": Load(), "uneven": Load(512, open_questions=2), "full": Load(ends=False)}

VLLM = {
    "iomp": "one process, Intel's OpenMP",
    "gomp": "one process, GNU's OpenMP",
    "processes": "three processes, as a server has them, Intel's OpenMP",
}
"""Ways to run vLLM."""

TASKS = ("Explain how {} works.", "Write a short story about {}.", "What should I know about {}?", "Write about {}.")
TOPICS = ("a bicycle", "the sea", "a lighthouse", "bread", "a telescope", "winter", "a market", "music", "a garden")

Turn = dict[str, Any]


def prompts(load: Load, tokenizer: Any, seed: int) -> list[list[int]]:
    """Token ids of the prompts of one call; another seed asks other questions, so that no cache of prompts helps."""
    asked = [row["prompt"] for row in rows(WORKLOADS["short"], seed=seed, count=PROMPTS - load.open_questions)]
    rng = random.Random(seed)
    for topic in rng.sample(TOPICS, load.open_questions):
        asked.append([{"role": "user", "content": rng.choice(TASKS).format(topic)}])
    return [conversation_ids(tokenizer, messages) for messages in asked]


def contenders(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Engines by name: which worker, with which options, in which environment."""
    own = {"engine": "native", "python": Path(sys.executable)}
    found: dict[str, dict[str, Any]] = {"native": own, "hf": own | {"engine": "hf"}}
    if options.compiled:
        found["native-compiled"] = own | {"options": {"compile_forward": True}}
    for name in options.vllm:
        found[f"vllm-{name}"] = {"engine": "vllm", "python": options.vllm_python, "variables": variables(name, options)}
    if options.no_speculate:
        found["native-no-speculate"] = own | {"options": {"speculate": False}}
    if options.no_pack:
        found["native-no-pack"] = own | {"options": {"pack_weights": False}}
    return found


def variables(name: str, options: argparse.Namespace) -> dict[str, str]:
    """The environment of a way to run vLLM, which would set most of it by itself for the processes that it starts."""
    root = options.vllm_python.parent.parent
    gomp = next(root.glob("lib/python3*/site-packages/torch/lib/libgomp.so.1"))
    intel = {"LD_PRELOAD": str(root / "lib" / "libiomp5.so"), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    # By default vLLM leaves a core free, so that it would compute with one thread less than the others.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: options.threads]))
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if name == "processes" else "0",
    } | ({"LD_PRELOAD": str(gomp)} if name == "gomp" else intel)  # fmt: skip


def start(name: str, contender: Mapping[str, Any], options: argparse.Namespace) -> Worker:
    """Start an engine and wait until it holds the model."""
    settings = {"model": str(WORK / "ends"), "threads": options.threads, "engine": contender["engine"]}
    settings["options"] = contender.get("options", {})
    log = WORK / "logs" / f"rollouts-{name}.log"
    worker = Worker(contender["python"], "rollout_side.py", settings, log, contender.get("variables"))
    say(f"{name}: ready after {worker.info['start_seconds']:.0f} s")
    return worker


def take_turn(name: str, workers: Mapping[str, Worker], load: Load, tokenizer: Any, number: int) -> Turn:
    """Sample first tokens of some prompts, then whole completions of others, and watch that the others rest."""

    def rest() -> float:
        return sum(cpu_seconds(worker.pid) for other, worker in workers.items() if other != name)

    before, load_before = rest(), os.getloadavg()[0]
    shared = {"command": "sample", "samples": SAMPLES, "ends": load.ends, "seed": number}
    first = workers[name].ask(shared | {"prompts": prompts(load, tokenizer, 2 * number), "max_new_tokens": 1})
    asked = prompts(load, tokenizer, 2 * number + 1)
    turn = workers[name].ask(shared | {"prompts": asked, "max_new_tokens": load.max_new_tokens})
    lengths = sorted(turn.pop("lengths"))
    seconds = first["seconds"] + turn["seconds"]
    return turn | {
        "first_token_seconds": first["seconds"],
        "tokens_per_second": turn["tokens"] / turn["seconds"],
        "tokens_per_cpu_second": turn["tokens"] / turn["cpu_seconds"],
        "cache_bytes_per_token": turn["cache_bytes"] / (turn["tokens"] + sum(map(len, asked))),
        "lengths": {"min": lengths[0], "median": median(lengths), "max": lengths[-1]},
        "idle_cpu_share": (rest() - before) / seconds,
        "load_before": load_before,
    }


def summarise(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Spreads over rounds, and ratios of the native engine to every other within a round."""
    names = (
        "tokens_per_second",
        "first_token_seconds",
        "cache_bytes_per_token",
        "forwards",
        "tokens",
        "idle_cpu_share",
    )
    found = {name: {key: spread([turn[key] for turn in own]) for key in names} for name, own in turns.items()}

    def ratio(other: str, key: str) -> dict[str, float]:
        return spread([a[key] / b[key] for a, b in zip(turns["native"], turns[other], strict=True)])

    keys = ("tokens_per_second", "tokens_per_cpu_second", "first_token_seconds", "cache_bytes_per_token")
    ratios = {other: {key: ratio(other, key) for key in keys} for other in turns if other != "native"}
    return {"engines": found, "native_over": ratios}


def measure(
    workers: Mapping[str, Worker], name: str, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All rounds of one workload, kept after each."""
    tokenizer = AutoTokenizer.from_pretrained(WORK / "ends")
    warm_up: dict[str, Turn] = {}
    turns: dict[str, list[Turn]] = {engine: [] for engine in workers}
    for number in range(options.repeats + 1):
        order = list(workers) if number % 2 == 0 else list(workers)[::-1]
        made = {engine: take_turn(engine, workers, LOADS[name], tokenizer, number) for engine in order}
        rates = ", ".join(f"{engine} {made[engine]['tokens_per_second']:.0f}" for engine in workers)
        say(f"{name}, {'warm-up' if number == 0 else f'round {number}/{options.repeats}'}: tokens/s: {rates}")
        if number == 0:
            warm_up = made
            continue
        for engine, turn in made.items():
            turns[engine].append(turn)
        keep({"warm_up": warm_up, "rounds": turns, **summarise(turns)})


def table(workloads: Mapping[str, Any]) -> str:
    """What was found, as text: medians, of rates with smallest and largest."""
    lines: list[str] = []
    for name, found in workloads.items():
        lines.append(f"{name}: {len(found['rounds']['native'])} rounds")
        for engine, values in found["engines"].items():
            rate, middle = values["tokens_per_second"], {key: value["median"] for key, value in values.items()}
            lines.append(
                f"  {engine:20}{rate['median']:5.0f} [{rate['min']:.0f}, {rate['max']:.0f}] tokens/s, first tokens "
                f"after {middle['first_token_seconds']:.2f} s, {middle['cache_bytes_per_token'] / 1000:.1f} KB of "
                f"cache a token, {middle['forwards']:.0f} decode forwards for {middle['tokens']:.0f} tokens, "
                f"others at {values['idle_cpu_share']['max']:.1%} of a core at most"
            )
        for engine, ratios in found["native_over"].items():
            by_cpu = show_spread(ratios["tokens_per_cpu_second"])
            lines.append(f"  native / {engine}: {show_spread(ratios['tokens_per_second'])}; by CPU seconds {by_cpu}")
    return "\n".join(lines)


def panel(name: str, rounds: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """The rate of every engine in every round of a workload."""
    series = [
        {"name": engine, "x": list(range(1, len(own) + 1)), "y": [turn["tokens_per_second"] for turn in own]}
        for engine, own in rounds.items()
    ]
    return {"title": name, "x_label": "round", "y_label": "tokens/s", "series": series}


def main() -> None:
    """Start the engines, measure, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--workloads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--compiled", action="store_true", help="also the native engine with a compiled forward")
    parser.add_argument("--no-speculate", action="store_true", help="also the native engine without guesses")
    parser.add_argument("--no-pack", action="store_true", help="also the native engine without packed weights")
    parser.add_argument(
        "--vllm", nargs="*", choices=VLLM, default=["iomp", "gomp"], help="; ".join(map(": ".join, VLLM.items()))
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "rollouts.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "rollouts.svg")
    options = parser.parse_args()
    make_model()
    workers: dict[str, Worker] = {}
    results: dict[str, Any] = {"hardware": hardware(options.threads), "commit": source(), "model": f"{MODEL}, in bf16"}
    results["workloads"] = {}
    try:
        for name, contender in contenders(options).items():
            workers[name] = start(name, contender, options)
        results["engines"] = {name: worker.info for name, worker in workers.items()}
        for name in options.workloads:

            def keep(found: dict[str, Any], name: str = name) -> None:
                results["workloads"][name] = found
                write(options.json, results)

            measure(workers, name, options, keep)
    finally:
        for worker in workers.values():
            worker.close()
    panels = [panel(name, found["rounds"]) for name, found in results["workloads"].items()]
    save(draw(panels, "Sampling on a CPU, SmolLM2-135M in bf16"), options.svg)
    print(table(results["workloads"]))


if __name__ == "__main__":
    main()
