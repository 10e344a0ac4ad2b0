"""What a run shows and writes while it goes: live progress with an ETA, and metrics as JSON lines."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from burnish.progress import format_seconds, say
from burnish.runs.files import write_json
from burnish.runs.records import StepRecords
from burnish.training.environment import environment
from burnish.training.plan import describe_plan

__all__ = ["EngineProgress", "MetricsCallback", "ProgressCallback", "RecordsCallback"]

SHOWN = ("loss", "reward", "eval_loss", "eval_reward", "completions/mean_length", "entropy", "grad_norm")


class ProgressCallback(TrainerCallback):
    """A bar with the latest metrics and the time left on a terminal, a line per log elsewhere.

    The time left follows the steps of this process only, so it is right after a resume.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what will be done; start the clock and the bar."""
        self._started, self._first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        say(describe_plan(args, first_step=state.global_step, max_steps=state.max_steps))
        if not sys.stderr.isatty():
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, TextColumn("left {task.fields[left]}  {task.fields[shown]}"), console=Console(stderr=True)
        )
        self._task = self._bar.add_task(
            self.stage, total=state.max_steps, left="?", shown="", completed=state.global_step
        )
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, left=self._left(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the metrics people watch."""
        if not state.is_world_process_zero:
            return
        shown = "  ".join(f"{name.split('/')[-1]} {logs[name]:.3g}" for name in SHOWN if logs and name in logs)
        if self._bar is not None:
            self._bar.update(self._task, shown=shown)
        elif shown:
            say(f"{self.stage} {state.global_step}/{state.max_steps}  left {self._left(state)}  {shown}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        if not done:
            return "?"
        return format_seconds((time.monotonic() - self._started) / done * (state.max_steps - state.global_step))


class RecordsCallback(TrainerCallback):
    """Drops what an earlier run recorded after the step at which this one starts."""

    def __init__(self, *files: StepRecords) -> None:
        self.files = files

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the records back to the checkpoint, or to nothing."""
        if state.is_world_process_zero:
            for records in self.files:
                records.start_at(state.global_step)


class MetricsCallback(RecordsCallback):
    """Appends every log to `metrics.jsonl`; a run that starts or resumes first drops the records after its step.

    Versions and hardware of the run go beside it, into `environment.json`.
    """

    def __init__(self, args: Any) -> None:
        self.records = StepRecords.of_run(args, args.log_metrics, "metrics.jsonl")
        super().__init__(self.records)
        self._resumes = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut the records back to the checkpoint, or to nothing."""
        super().on_train_begin(args, state, control, **kwargs)
        self._resumes = state.global_step > 0
        if state.is_world_process_zero and self.records.file is not None:
            write_json(self.records.file.with_name("environment.json"), environment())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record from here on: `eval_on_start` evaluates again in a resumed run."""
        self._resumes = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one record."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs and not self._resumes:
            self.records.append([{"step": state.global_step, "time": time.time(), **logs}])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record evaluations after a run that had no step left."""
        self._resumes = False


class EngineProgress:
    """An engine that shows how far each `generate` is, with the time left; a context manager."""

    def __init__(self, engine: Any, title: str, total: int) -> None:
        self._engine = engine
        self._title = title
        self._total = total
        self._started = time.monotonic()
        self._shown = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> EngineProgress:
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("left {task.fields[left]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total, left="?")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def generate(self, requests: Any, *, seed: int, step: int) -> Any:
        """As the engine does."""
        return self._engine.generate(requests, seed=seed, step=step, on_progress=self._show)

    def sync(self, version: int) -> None:
        """As the engine does."""
        self._engine.sync(version)

    def close(self) -> None:
        """As the engine does."""
        self._engine.close()

    def _show(self, finished: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.2 if self._bar is not None else 20.0):
            return
        self._shown = now
        left = format_seconds((now - self._started) / finished * (total - finished)) if finished else "?"
        if self._bar is not None:
            self._bar.update(self._task, completed=finished, left=left)
        else:
            say(f"{self._title} {finished}/{total}  left {left}  {tokens} tokens")
