"""What both sides of the benchmarks share: GRPO's prompts and reward, measuring of one step, and the worker protocol.

A worker talks JSON lines: commands on stdin, replies on stdout, everything else on stderr. Both sides run the code of
this file, so a step is cut out of `transformers.Trainer`'s loop at the same place and measured by the same clock.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

__all__ = [
    "LORA",
    "WORKLOADS",
    "Builder",
    "Channel",
    "Grader",
    "Recorder",
    "RolloutRecorder",
    "Scorer",
    "StepGate",
    "Workload",
    "conversation_ids",
    "cpu_seconds",
    "grpo_task",
    "rows",
    "serve",
]

LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
"""The adapters of both sides, where they train adapters."""

PROMPTS_PER_EPOCH = 800
"""Rows of the data set: more than any run uses, so no step crosses the end of an epoch."""

Scorer = Callable[[Sequence[Mapping[str, Any]]], list[list[float]]]
"""(prompt_ids, completion_ids) pairs -> logprob of every completion token, by the side's own training-time path."""

Grader = Callable[[Sequence[Any], Sequence[Any]], list[float]]
"""(completions, answers) -> rewards"""


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of prompt.

    Args:
        examples: worked examples put before the question; they make the prompt long.
        max_new_tokens: limit of one completion.
        ends: False takes the model whose end-of-sequence token never comes: every completion has `max_new_tokens`.
    """

    examples: int
    max_new_tokens: int = 128
    ends: bool = True


WORKLOADS = {
    "short": Workload(examples=0),
    "long": Workload(examples=13),
    "short_fixed": Workload(examples=0, max_new_tokens=48, ends=False),
    "long_fixed": Workload(examples=13, max_new_tokens=48, ends=False),
}

NAMES = ("Tom", "Ana", "Lee", "Mia", "Sam", "Eva")
THINGS = ("apples", "books", "coins", "eggs", "pens", "cards")


def _task(rng: random.Random) -> tuple[str, int]:
    """A question in words and its answer."""
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 60), rng.randint(2, 40)
    if rng.random() < 0.5:
        return f"{name} has {a} {thing} and gets {b} more. How many {thing} now?", a + b
    return f"{name} has {a + b} {thing} and gives away {b}. How many {thing} now?", a


def rows(workload: Workload, *, seed: int = 0, count: int = PROMPTS_PER_EPOCH) -> list[dict[str, Any]]:
    """The data set: conversational prompts with the column `answer`, the same on every machine."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        shots = [_task(rng) for _ in range(workload.examples)]
        question, answer = _task(rng)
        text = "".join(f"Question: {q}\nAnswer: {a}\n" for q, a in shots)
        intro = f"Here are solved examples.\n{text}\n" if shots else ""
        prompt = f"{intro}{question} Answer briefly."
        made.append({"prompt": [{"role": "user", "content": prompt}], "answer": answer})
    return made


def conversation_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a prompt through the chat template, as a trainer makes them."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _reward(text: str, answer: int) -> float:
    """1 for the right last number, less the further off; a brevity term keeps two completions from an equal reward.

    Groups of equal rewards have no gradient, and burnish skips them: here that must not be where its speed comes from.
    """
    numbers = re.findall(r"-?\d+", text.replace(",", ""))
    brevity = 0.1 * math.exp(-len(text) / 200)
    if not numbers:
        return brevity
    return brevity + 1 / (1 + abs(int(numbers[-1][:12]) - answer))


def _grade(completions: Sequence[Any], answers: Sequence[Any]) -> list[float]:
    return [_reward(c[0]["content"], int(answer)) for c, answer in zip(completions, answers, strict=True)]


def _rubric(entries: Sequence[Mapping[str, Any]]) -> Grader:
    """Burnish's own verifiers, which load neither torch nor a trainer."""
    from burnish.rewards import rubric_from_config

    criteria = rubric_from_config(entries).criteria

    def grade(completions: Sequence[Any], answers: Sequence[Any]) -> list[float]:
        columns = {"prompts": list(completions), "completions": list(completions), "answer": list(answers)}
        values = [[criterion.weight * value for value in criterion.function(**columns)] for criterion in criteria]
        return [sum(own) for own in zip(*values, strict=True)]

    return grade


def grpo_task(settings: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Grader, int]:
    """Data set, reward and limit of a completion: of a workload, or of the file that `learning.py` writes."""
    if "task" not in settings:
        workload = WORKLOADS[settings["workload"]]
        return rows(workload), _grade, workload.max_new_tokens
    task = json.loads(Path(settings["task"]).read_text())
    return task["rows"], _rubric(task["rubric"]), task["max_completion_length"]


def _status_bytes(name: str) -> int:
    """A memory field of this process, e.g. VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: the benchmark measures memory on Linux only.")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its living children, to a hundredth of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = [int(c) for file in Path(f"/proc/{pid}/task").glob("*/children") for c in file.read_text().split()]
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


class Recorder:
    """Measures one optimizer step at a time; a subclass adds what the step was made of."""

    def __init__(self) -> None:
        self.started = self.cpu_started = 0.0

    def start(self) -> None:
        """Begin a step: let the kernel forget the peak memory of the last one."""
        Path("/proc/self/clear_refs").write_text("5")
        self.cpu_started = time.process_time()
        self.started = time.perf_counter()

    def details(self, now: float) -> dict[str, Any]:
        """What the step that ended at `now` was made of."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """End the step: what it took and what it was made of."""
        now, cpu_now = time.perf_counter(), time.process_time()
        return {
            "seconds": now - self.started,
            "cpu_seconds": cpu_now - self.cpu_started,
            **self.details(now),
            "peak_rss_bytes": _status_bytes("VmHWM"),
            "rss_bytes": _status_bytes("VmRSS"),
        }


class RolloutRecorder(Recorder):
    """Measures GRPO steps; its `reward` is the reward function of both sides.

    The first reward call ends the rollout and the last one starts the update, so the split needs no hook inside a
    trainer.
    """

    def __init__(self, tokenizer: Any, num_generations: int, grade: Grader) -> None:
        super().__init__()
        self.tokenizer, self.num_generations, self.grade = tokenizer, num_generations, grade
        self.reward_began = self.reward_ended = 0.0
        self.lengths: list[int] = []
        self.ended: list[bool] = []
        self.prompts: list[str] = []
        self.prompt_lengths: list[int] = []
        self.rewards: list[float] = []

    def start(self) -> None:
        """Begin a step: forget the last one."""
        for values in (self.lengths, self.ended, self.prompts, self.prompt_lengths, self.rewards):
            values.clear()
        self.reward_began = self.reward_ended = 0.0
        super().start()

    def reward(self, prompts: Any, completions: Any, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        """The reward function, by TRL's calling convention; takes down what it sees."""
        self.reward_began = self.reward_began or time.perf_counter()
        rewards = self.grade(completions, answer)
        self.rewards += rewards
        self.lengths += [len(ids) for ids in completion_ids]
        self.ended += [ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids]
        self.prompts += [messages[-1]["content"] for messages in prompts]
        self.prompt_lengths += [len(conversation_ids(self.tokenizer, messages)) for messages in prompts]
        self.reward_ended = time.perf_counter()
        return rewards

    def details(self, now: float) -> dict[str, Any]:
        """Parts of the step, its completions and its prompts."""
        g = self.num_generations
        groups = [self.rewards[i : i + g] for i in range(0, len(self.rewards), g)]
        return {
            "rollout_seconds": self.reward_began - self.started,
            "reward_seconds": self.reward_ended - self.reward_began,
            "update_seconds": now - self.reward_ended,
            "completions": len(self.lengths),
            "completion_tokens": sum(self.lengths),
            "longest_completion": max(self.lengths),
            "truncated_completions": self.ended.count(False),
            "prompt_tokens": sum(self.prompt_lengths),
            "longest_prompt": max(self.prompt_lengths),
            "padded_tokens": len(self.lengths) * (max(self.lengths) + max(self.prompt_lengths)),
            "unique_tokens": sum(self.lengths) + sum(self.prompt_lengths) // g,
            "groups_with_equal_rewards": sum(len(set(group)) == 1 for group in groups),
            "mean_reward": sum(self.rewards) / len(self.rewards),
            "prompts": sha256("".join(sorted(set(self.prompts))).encode()).hexdigest()[:16],
        }


Builder = Callable[[Mapping[str, Any]], tuple[Any, Recorder, Scorer]]
"""settings -> (trainer, recorder, scorer)"""


class Channel:
    """JSON lines over the process's stdin and stdout; later prints of any library go to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next command; the end of stdin means exit."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"command": "exit"}

    def send(self, reply: Mapping[str, Any]) -> None:
        """Answer."""
        print(json.dumps(reply), file=self._out, flush=True)


class StepGate(TrainerCallback):
    """Holds a trainer between optimizer steps until the driver asks for one.

    The gate stands at the start of the epoch and after each step, not at `on_step_begin`: a trainer may roll out while
    it fetches the step's batches, which comes before that event.
    """

    def __init__(self, channel: Channel, recorder: Recorder, score: Scorer, save: Callable[[str], None]) -> None:
        self._channel, self._recorder, self._score, self._save = channel, recorder, score, save

    def _hold(self) -> None:
        while True:
            command = self._channel.receive()
            match command["command"]:
                case "logprobs":
                    self._channel.send({"logprobs": self._score(command["pairs"])})
                case "step":
                    self._recorder.start()
                    return
                case "save":
                    self._save(command["folder"])
                    self._channel.send({})
                case "exit":
                    raise SystemExit(0)
                case other:
                    raise ValueError(f"unknown command {other!r}")

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the first step."""
        self._hold()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report the step, then wait for the next."""
        self._channel.send(self._recorder.finish())
        self._hold()


def serve(builders: Mapping[str, Builder], *, versions: Mapping[str, str]) -> None:
    """Run a worker: read its settings, build its trainer, then train one step for each command.

    Args:
        builders: by stage: settings -> (trainer, recorder, scorer).
        versions: of what only this side uses, by name.
    """
    import torch

    # Of all that runs on the machine, a worker that outgrows its memory is what the kernel should end.
    Path("/proc/self/oom_score_adj").write_text("1000")
    channel = Channel()
    settings = channel.receive()
    torch.set_num_threads(settings["threads"])
    trainer, recorder, score = builders[settings["stage"]](settings)
    trainer.add_callback(StepGate(channel, recorder, score, trainer.save_model))
    shared = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    found = {"python": sys.version.split()[0]} | shared | dict(versions)
    channel.send({"versions": found, "rss_bytes": _status_bytes("VmRSS")})
    trainer.train()
    raise RuntimeError("the data set ended before the benchmark did")
