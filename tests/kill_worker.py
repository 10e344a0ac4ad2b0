"""A warm process that forks a training run on request, and lets it be killed at a chosen moment.

Protocol of `main`, one JSON object a line. In: a `Job`. Out: `{"status", "seconds", "events"}`, where `status` is
the exit status of the forked run, negative for a signal.

A moment is a file operation of the run or a time. File operations are what Python's audit hook reports below the run's
folder, and the two writers that open files outside of Python, `torch.save` and safetensors.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BASE = "base"
RUN = "run"
"""Folders of the start model and of the run, below a job's folder."""


@dataclass(frozen=True)
class Configuration:
    """What to train, by the function behind `burnish STAGE FILE`."""

    stage: str
    training: dict[str, Any]
    peft: dict[str, Any] | None = None


@dataclass(frozen=True)
class Job:
    """One run of a configuration in a folder, and when to kill it.

    Attributes:
        configuration: a name in `CONFIGURATIONS`.
        folder: of the job.
        event: number of the file operation to be killed at; None for none.
        torn: leave that write half done, instead of not begun.
        seconds: time after the start of training to be killed at; None for none.
    """

    configuration: str
    folder: str
    event: int | None = None
    torn: bool = False
    seconds: float | None = None


LORA = {"r": 4, "target_modules": "all-linear"}
ONLINE = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "temperature": 1.5}
PPO = {"per_device_train_batch_size": 8, "max_completion_length": 8, "num_iterations": 2}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2}

CONFIGURATIONS: dict[str, Configuration] = {
    "sft": Configuration("sft", {}),
    "sft_bf16": Configuration("sft", {"bf16": True}),
    "sft_lora_bf16": Configuration("sft", {"bf16": True}, LORA),
    "sft_accumulated": Configuration(
        "sft", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5.0}
    ),
    "sft_one_checkpoint": Configuration("sft", {"save_total_limit": 1, "save_steps": 1}),
    "sft_evaluated": Configuration(
        "sft", {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    ),
    "sft_every_fifth_logged": Configuration("sft", {"logging_steps": 5}),
    "reward": Configuration("reward", {}),
    "reward_lora": Configuration("reward", {"bf16": True}, LORA),
    "dpo": Configuration("dpo", {}),
    "dpo_lora": Configuration("dpo", {"save_total_limit": 2}, LORA),
    "dpo_moving": Configuration("dpo", MOVING),
    "dpo_precomputed": Configuration("dpo", {"precompute_ref_log_probs": True}),
    "dpo_bf16": Configuration("dpo", {"bf16": True, "save_total_limit": 1}),
    "kto": Configuration("kto", {}),
    "kto_moving": Configuration("kto", MOVING | {"save_total_limit": 1}),
    "kto_lora": Configuration("kto", {}, LORA),
    "online_dpo": Configuration("online_dpo", ONLINE),
    "online_dpo_lora": Configuration("online_dpo", {**ONLINE, "bf16": True}, LORA),
    "grpo": Configuration("grpo", ONLINE),
    "grpo_bf16": Configuration("grpo", {**ONLINE, "bf16": True}),
    "grpo_lora_kl": Configuration("grpo", {**ONLINE, "beta": 0.1, "save_total_limit": 1}, LORA),
    "grpo_reused": Configuration("grpo", {**ONLINE, "per_device_train_batch_size": 4, "steps_per_generation": 4}),
    "grpo_iterated": Configuration("grpo", {**ONLINE, "num_iterations": 2, "save_steps": 1, "save_total_limit": 2}),
    "grpo_evaluated": Configuration("grpo", {**ONLINE, "eval_strategy": "steps", "eval_steps": 2}),
    "dapo_refills": Configuration("grpo", {**ONLINE, "algorithm": "dapo", "max_sampling_rounds": 3}),
    "grpo_replay": Configuration("grpo", {**ONLINE, "replay_size": 4}),
    "grpo_curriculum": Configuration("grpo", {**ONLINE, "prompt_sampling": "curriculum", "curriculum_target": 0.3}),
    "grpo_weighted": Configuration("grpo", {**ONLINE, "prompt_sampling": "weighted", "loss_type": "sapo"}),
    "grpo_entropy": Configuration("grpo", {**ONLINE, "use_adaptive_entropy": True, "entropy_target": 9.0}),
    "rloo": Configuration("rloo", {**ONLINE, "kl_target": 0.01, "kl_horizon": 10}),
    "rloo_lora": Configuration("rloo", {**ONLINE, "save_total_limit": 1}, LORA),
    "ppo": Configuration("ppo", {**PPO, "value_prefit_steps": 1}),
    "ppo_bf16": Configuration("ppo", {**PPO, "bf16": True, "save_total_limit": 1}),
    "ppo_lora": Configuration("ppo", {**PPO, "save_total_limit": 2}, LORA),
    "ppo_whitened": Configuration("ppo", {**PPO, "whiten_rewards": True, "kl_target": 0.01, "kl_horizon": 10}),
    "pairs": Configuration("pairs", {}),
    "pipeline": Configuration("pipeline", {}),
}
"""All trainers, full and LoRA; PPO's critics, refills, replay, curriculum, moved references, few checkpoints kept."""

COMMON = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "progress": False,
    "seed": 7,
    "resume_from_checkpoint": True,
}

QUESTIONS = [
    {"prompt": f"{i}+{i % 7}=" + "0" * (i % 5), "difficulty": i, "weight": 1 + i % 3, "odd": "\u2028\u0085" * (i % 2)}
    for i in range(16)
]
ANSWERS = [{"prompt": row["prompt"], "completion": str(7 * i) * (1 + i % 2)} for i, row in enumerate(QUESTIONS)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": ANSWERS,
    "kto": [{**row, "label": i % 3 != 0} for i, row in enumerate(ANSWERS)],
    "reward": [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no" + "x" * (i % 4)}
        for i, row in enumerate(ANSWERS)
    ],
}
ROWS["dpo"] = ROWS["reward"]


def even_digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward that is often equal over a group, so that refills and replays happen."""
    return [float(sum(c in "02468" for c in text) > 1) for text in completions]


def num_digits(completions: list[str], **columns: Any) -> list[float]:
    """A reward that is rarely equal over a group, so that there are pairs."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


PIPELINE = """
model = "{start}"
output_dir = "{run}"
[data]
train = {{ path = "{rows}" }}
eval = {{ path = "{held_out}" }}
sft = {{ path = "{rows}" }}
[[rubric]]
kind = "python"
function = "kill_worker:num_digits"
[evaluation]
num_samples = 2
max_completion_length = 4
[sft]
{stage}
[pairs]
num_samples = 8
max_completion_length = 24
[dpo]
{stage}
[grpo]
{stage}
num_generations = 4
max_completion_length = 4
"""
STAGE = """
max_steps = 2
save_steps = 1
bf16 = false
use_cpu = true
progress = false
per_device_train_batch_size = 4
"""


def run_pipeline(folder: Path) -> None:
    """Run, or go on with, a pipeline of four stages."""
    from burnish.cli.main import main

    paths = {"start": folder.parent / BASE, "run": folder / RUN}
    for name, rows in (("rows", ANSWERS[:-4]), ("held_out", ANSWERS[-4:])):
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "pipeline.toml"
    file.write_text(PIPELINE.format(**paths, stage=STAGE))
    assert main(["pipeline", str(file)]) == 0


def sample_pairs(folder: Path) -> None:
    """Sample and write preference pairs, as `burnish pairs` does."""
    from burnish.cli import stages
    from burnish.cli.config import PairsSection
    from burnish.rewards import Rubric

    section = PairsSection(output_dir=str(folder / RUN), num_samples=8, max_completion_length=24)
    stages.make_pairs(str(folder.parent / BASE), QUESTIONS, Rubric.from_functions(num_digits), section)


def train_stage(configuration: Configuration, folder: Path) -> None:
    """Train and save, from the last usable checkpoint where there is one."""
    from burnish.cli import stages
    from burnish.rewards import Rubric

    is_online = configuration.stage not in ROWS
    rows = ROWS.get(configuration.stage, QUESTIONS)
    training = {**COMMON, "output_dir": str(folder / RUN), **configuration.training}
    if is_online:
        training["log_completions"] = True
    stages.train(
        configuration.stage,
        str(folder.parent / BASE),
        rows[:-4],
        training,
        rubric=Rubric.from_functions(even_digits) if is_online else None,
        eval_rows=rows[-4:] if "eval_strategy" in training else None,
        peft=configuration.peft,
    )


class FileOperations:
    """Numbers the file operations of this process below a folder, and kills it at one of them.

    Args:
        folder: of the run.
        event: number of the operation to be killed at.
        torn: leave a write half done.
        report: gets a line for each operation.
    """

    def __init__(self, folder: Path, event: int | None, torn: bool, report: Callable[[str], None]) -> None:
        self.folder = str(folder)
        self.event, self.torn, self.report = event, torn, report
        self.count = 0
        self.is_ours = False
        """Whether an operation is one of this class."""

    def install(self) -> None:
        """Watch from now on; a hook cannot be removed."""
        import safetensors.torch
        import torch

        sys.addaudithook(self._hook)
        save, serialize_file = torch.save, safetensors.torch.serialize_file
        torch.save = lambda value, f, *a, **k: self._outside_of_python(f, lambda: save(value, f, *a, **k))
        safetensors.torch.serialize_file = lambda tensors, f, *a, **k: self._outside_of_python(
            f, lambda: serialize_file(tensors, f, *a, **k)
        )

    def _hook(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.is_ours:
            return
        if name == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            self._happens("open", path, lambda target: _tear(target, flags))
        elif name in ("os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.truncate"):
            directory = arguments[2] if name == "os.mkdir" else arguments[-1]
            path = arguments[1] if name == "os.rename" else arguments[0]
            self._happens(name, path, None, directory)

    def _happens(self, name: str, path: Any, tear: Callable[[str], None] | None, directory: int = -1) -> None:
        target = os.fsdecode(path)
        if isinstance(directory, int) and directory >= 0 and not os.path.isabs(target):
            target = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), target)
        target = os.path.abspath(target)
        is_refused = name == "os.mkdir" and os.path.isdir(target)
        if is_refused or not target.startswith(self.folder):
            return
        with self._own():
            if self.count == self.event:
                if self.torn and tear is not None:
                    tear(target)
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            self.report(f"{name} {os.path.relpath(target, self.folder)}")

    def _outside_of_python(self, path: Any, write: Callable[[], Any]) -> Any:
        if not isinstance(path, str | os.PathLike):
            return write()

        def tear(target: str) -> None:
            write()
            os.truncate(target, os.path.getsize(target) // 2)

        self._happens("save", path, tear)
        return write()

    @contextmanager
    def _own(self) -> Iterator[None]:
        self.is_ours = True
        try:
            yield
        finally:
            self.is_ours = False


def _tear(target: str, flags: int) -> None:
    """What a kill in the middle of a write leaves: the beginning of something."""
    if os.path.isdir(target):
        return
    descriptor = os.open(target, flags | os.O_CREAT, 0o666)
    os.write(descriptor, b'{"step": 1, "half": "')
    os.close(descriptor)


def run(job: Job) -> None:
    """Run a job in this process, which the job may kill."""
    import torch

    torch.set_num_threads(1)
    folder, configuration = Path(job.folder), CONFIGURATIONS[job.configuration]
    with (folder / "events.txt").open("a") as events:

        def report(line: str) -> None:
            events.write(line + "\n")
            events.flush()

        FileOperations(folder / RUN, job.event, job.torn, report).install()
        if job.seconds is not None:
            _end_after(job.seconds)
        if configuration.stage == "pairs":
            sample_pairs(folder)
        elif configuration.stage == "pipeline":
            run_pipeline(folder)
        else:
            train_stage(configuration, folder)


def _end_after(seconds: float) -> None:
    """End this process so long after training begins, wherever it is."""
    from burnish.training.learner import Learner

    train = Learner.train

    def timed_train(*arguments: Any, **keywords: Any) -> Any:
        # The default action ends the process without a word, in the middle of native code too.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))
        return train(*arguments, **keywords)

    Learner.train = timed_train  # type: ignore[method-assign]


def fork(job: Job) -> dict[str, Any]:
    """Run a job in a child and wait for it."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.txt").write_text("")
    started = time.perf_counter()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.setsid()
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run(job)
            (folder / "modules.txt").write_text("\n".join(sys.modules))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    _warm(folder / "modules.txt")
    lines = (folder / "events.txt").read_text().splitlines()
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "events": [re.sub(r"\d+", "#", line) for line in lines],
    }


def _warm(modules: Path) -> None:
    """Import what a run that was not killed imported, which is most of the time of a short run, for those after it."""
    if not modules.exists():
        return
    for name in modules.read_text().splitlines():
        if name not in sys.modules:
            with suppress(Exception):  # made by hand, or not by this name
                importlib.import_module(name)
    modules.unlink()


def save_start(folder: Path) -> None:
    """The tiny model that every run starts from."""
    import tiny

    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def main() -> None:
    """Serve jobs from standard input; the first line names a folder for the start model."""
    import torch

    import burnish.cli.stages  # noqa: F401 - what makes the process warm

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = Path(sys.stdin.readline().strip())
    if not start.is_dir():
        save_start(start)
    for line in sys.stdin:
        replies.write(json.dumps(fork(Job(**json.loads(line)))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()


class Zygote:
    """A client of `main` in a process of its own."""

    def __init__(self, start: Path) -> None:
        import subprocess

        self.start = start
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._say(str(start))

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def run(self, job: Job) -> dict[str, Any]:
        """Run a job; the reply of `main`."""
        self._say(json.dumps(asdict(job)))
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
