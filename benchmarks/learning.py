"""Held-out accuracy over steps and minutes: GRPO on the demo's task, burnish and TRL from one checkpoint (README.md).

Usage: python benchmarks/learning.py [--sides burnish trl-autocast] [--seeds 0 1 2] [--steps 100] [--eval-every 10]

A side and a seed make a run, one process at a time. A run that is complete is a file in the output folder and is not
repeated. Both sides save their weights every few steps, and burnish evaluates them; only training is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from algorithms import panel
from driver import HERE, MODEL, ROOT, Worker, hardware, say, show_spread, source, spread, write
from grpo_step import TRL_SETTINGS

from burnish.cli import stages
from burnish.cli.config import PipelineFile, load_pipeline_file
from burnish.data import disjoint, load_rows

sys.path.insert(0, str(ROOT / "scripts"))
from plot_curves import draw, save

SIDES: dict[str, dict[str, Any]] = {"burnish": {}} | {f"trl-{name}": own for name, own in TRL_SETTINGS.items()}
"""Settings that only one side has. TRL's `bf16` ones are faster, but their weights lose most of a small update."""
KEPT = ("seconds", "cpu_seconds", "rollout_seconds", "update_seconds", "completion_tokens", "mean_reward", "prompts",
        "peak_rss_bytes", "load_before")  # fmt: skip

Rows = list[dict[str, Any]]


class Task:
    """The demo's task: its rows, rubric and recipe, and the checkpoint that every run starts from."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.file: PipelineFile = load_pipeline_file(ROOT / "examples" / "chain_sum.toml", [])
        self.folder, self.checkpoint = options.out, options.out / "sft"
        self.held_out = self._rows("eval")[: options.held_out]

    def _rows(self, name: str) -> Rows:
        return load_rows(getattr(self.file.data, name), f"data.{name}")

    def training_rows(self, name: str = "train") -> Rows:
        """Rows of a data set that no held-out problem is among."""
        return disjoint(self._rows(name), self._rows("eval"), keep_repeats=True)[0]

    def prepare(self) -> dict[str, Any]:
        """Train the checkpoint and evaluate it, once; return its point."""
        done = self.checkpoint / "done"
        if not done.is_file():
            # In fp32: both sides then start from whole weights, not from values rounded to what autocast sees anyway.
            settings = self.file.stages["sft"] | {
                "bf16": False,
                "output_dir": str(self.checkpoint),
                "report_to": "none",
            }
            stages.train("sft", self.file.model, self.training_rows("sft"), settings)
            done.touch()
        found = self.folder / f"start-{len(self.held_out)}.json"
        if not found.is_file():
            write(found, self.evaluate(self.checkpoint, 0, 0.0))
        return json.loads(found.read_text())

    def evaluate(self, folder: Path, step: int, seconds: float) -> dict[str, Any]:
        """Sample held-out problems with the weights in a folder: the same code, seed and precision for both sides."""
        evaluation = stages.evaluate_model(
            str(folder), self.held_out, self.file.rubric, self.file.evaluation, name=f"step {step}"
        )
        interval = asdict(evaluation.pass_at_k[1])
        return {"step": step, "seconds": seconds, "minutes": seconds / 60, "accuracy": interval["mean"], **interval}

    def settings(self, side: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
        """Settings of a worker; writes the file with its prompts, which have the seed's order on both sides."""
        grpo, task = self.file.stages["grpo"], self.folder / f"task-{seed}.json"
        rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in self.training_rows()]
        random.Random(seed).shuffle(rows)
        # TRL's environment has no reasoning-gym. `exact` accepts what its verifier does, except +7 or 7.0.
        rubric = [
            {name: value for name, value in entry.items() if name != "binary"} | {"kind": "exact"}
            if entry["kind"] == "gym"
            else entry
            for entry in self.file.document["rubric"]
        ]
        write(task, {"rows": rows, "rubric": rubric, "max_completion_length": grpo["max_completion_length"]})
        return SIDES[side] | {
            "stage": "grpo", "model": str(self.checkpoint), "task": str(task), "threads": options.threads,
            "completions": grpo["per_device_train_batch_size"], "num_generations": grpo["num_generations"],
            "learning_rate": grpo["learning_rate"], "max_steps": options.steps,
            "output_dir": str(self.folder / f"{side}-{seed}"),
            "recipe": {n: grpo[n] for n in ("scale_rewards", "lr_scheduler_type", "warmup_steps")} | {"seed": seed},
        }  # fmt: skip


def train(task: Task, side: str, seed: int, start: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run: its curve, and what each step was made of."""
    settings = task.settings(side, seed, options)
    python = Path(sys.executable) if side == "burnish" else options.trl_python
    script = "burnish_side.py" if side == "burnish" else "trl_side.py"
    weights = task.folder / f"{side}-{seed}" / "weights"
    points, steps, seconds = [start], list[dict[str, Any]](), 0.0
    worker = Worker(python, script, settings, task.folder / f"{side}-{seed}.log")
    try:
        for step in range(1, options.steps + 1):
            made = worker.step()
            steps.append({name: made[name] for name in KEPT})
            seconds += made["seconds"]
            if step % options.eval_every == 0 or step == options.steps:
                worker.ask({"command": "save", "folder": str(weights)})
                points.append(task.evaluate(weights, step, seconds))
                say(f"{side} seed {seed}, step {step}: {seconds / 60:.1f} min, {points[-1]['accuracy']:.1%} held out")
    finally:
        worker.close()
    return {"side": side, "seed": seed, **identity(settings, options), "versions": worker.info["versions"],
            "commit": source(), "points": points, "steps": steps}  # fmt: skip


def identity(settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a stored run must have in common with this one: all but names of folders."""
    own = {name: value for name, value in settings.items() if name not in ("model", "task", "output_dir")}
    return {"settings": own, "eval_every": options.eval_every, "held_out_problems": options.held_out}


def stored(task: Task, side: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """The run if it is complete; one that was made otherwise is an error."""
    file = task.folder / f"{side}-{seed}.json"
    if not file.is_file():
        return None
    found, wanted = json.loads(file.read_text()), identity(task.settings(side, seed, options), options)
    if any(found[name] != value for name, value in wanted.items()):
        raise SystemExit(f"{file} was made with other options: use another --out, or remove it.")
    return found


def report(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The JSON, the picture and the table of all runs."""
    for seed in options.seeds:
        if len({json.dumps([step["prompts"] for step in run["steps"]]) for run in runs if run["seed"] == seed}) > 1:
            raise SystemExit(f"seed {seed}: the sides were not given the same prompts in the same steps.")
    about = {"hardware": hardware(options.threads), "model": MODEL, "task": "examples/chain_sum.toml"}
    write(options.json, about | {"runs": runs})
    sides = {side: [run for run in runs if run["side"] == side] for side in options.sides}
    panels = [
        panel(sides, column, label, "mean, least and most of the seeds")
        for column, label in (("step", "steps"), ("minutes", "minutes of training"))
    ]
    save(draw(panels, "Held-out accuracy, GRPO from one SFT checkpoint"), options.svg)
    first = [run["points"][-1] for run in sides[options.sides[0]]]
    for side, own in sides.items():
        last = [run["points"][-1] for run in own]
        ratio = show_spread(
            spread([theirs["seconds"] / ours["seconds"] for theirs, ours in zip(last, first, strict=True)])
        )
        accuracies = ", ".join(f"{p['accuracy']:.1%} [{p['low']:.1%}, {p['high']:.1%}]" for p in last)
        say(
            f"{side}: {own[0]['points'][0]['accuracy']:.1%} -> {accuracies} after {options.steps} steps, "
            f"{fmean(p['minutes'] for p in last):.1f} min; takes {ratio} the time of {options.sides[0]}"
        )


def main() -> None:
    """Train what is missing, sides in turns, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["burnish", "trl-autocast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=200, help="problems to evaluate on")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "learning")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "learning.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "learning.svg")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = Task(options)
    start, runs = task.prepare(), list[dict[str, Any]]()
    for number, seed in enumerate(options.seeds):
        for side in options.sides if number % 2 == 0 else reversed(options.sides):
            run = stored(task, side, seed, options)
            if run is None:
                run = train(task, side, seed, start, options)
                write(options.out / f"{side}-{seed}.json", run)
            runs.append(run)
    report(runs, options)


if __name__ == "__main__":
    main()
