"""Callbacks that show live progress and record metrics as JSON lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from burnish.progress import Progress, format_seconds, say
from burnish.runs.files import write_json
from burnish.runs.records import StepRecords
from burnish.training.environment import environment, warn_of_untested
from burnish.training.run_length import describe_run_length

__all__ = ["EngineProgress", "MetricsCallback", "ProgressCallback", "RecordsCallback"]

_SHOWN = (
    "loss", "reward", "eval_loss", "eval_reward", "accuracy", "rewards/accuracies", "completions/mean_length",
    "entropy", "grad_norm",
)  # fmt: skip


class ProgressCallback(TrainerCallback):
    """Show progress with the latest metrics, which stay as the last line."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._progress: Progress | None = None
        self._metrics: dict[str, float] = {}
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Describe the length of the run and start the progress bar."""
        if state.is_world_process_zero:
            say(describe_run_length(args, first_step=state.global_step, max_steps=state.max_steps))
            self._started, self._metrics = time.monotonic(), {}
            self._progress = Progress(self.stage, state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the progress bar."""
        if self._progress is not None:
            self._progress.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the main metrics."""
        logged = {name: logs[name] for name in _SHOWN if name in logs} if logs else {}
        self._metrics |= logged
        if self._progress is not None and logged:
            self._progress.update(state.global_step, _line(logged), now=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the progress bar and print the last metrics."""
        if self._progress is not None:
            self._progress.stop()
            elapsed = format_seconds(time.monotonic() - self._started)
            say(f"{self.stage}: step {state.global_step} after {elapsed}  {_line(self._metrics)}".rstrip())
            self._progress = None


def _line(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name.split('/')[-1]} {value:.3g}" for name, value in metrics.items())


class RecordsCallback(TrainerCallback):
    """Drop records of an earlier run after the step at which this one starts."""

    def __init__(self, *files: StepRecords) -> None:
        self.files = files

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Truncate the records to the checkpoint's step, or empty them."""
        if state.is_world_process_zero:
            for records in self.files:
                records.start_at(state.global_step)


class MetricsCallback(RecordsCallback):
    """Append every log to `metrics.jsonl`, and write versions and hardware to `environment.json` beside it.

    A run that starts or resumes drops the records after its step first.
    """

    def __init__(self, args: Any) -> None:
        self.records = StepRecords.of_run(args, args.log_metrics, "metrics.jsonl")
        super().__init__(self.records)
        self._resumes = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Truncate the records to the checkpoint's step, or empty them."""
        super().on_train_begin(args, state, control, **kwargs)
        self._resumes = state.global_step > 0
        if state.is_world_process_zero:
            warn_of_untested()
        if state.is_world_process_zero and self.records.file is not None:
            write_json(self.records.file.with_name("environment.json"), environment())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start recording: in a resumed run `eval_on_start` repeats an evaluation that is already recorded."""
        self._resumes = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the last steps too, where `logging_steps` would skip them."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append one record."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs and not self._resumes:
            self.records.append([{"step": state.global_step, "time": time.time(), **logs}])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record later evaluations even if no step was left to take."""
        self._resumes = False


class EngineProgress:
    """Wrap an engine to show the progress of each `generate`; a context manager."""

    def __init__(self, engine: Any, title: str, total: int) -> None:
        self._engine = engine
        self._progress = Progress(title, total)

    def __enter__(self) -> EngineProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def generate(self, requests: Any, *, seed: int, step: int) -> Any:
        """Generate with the engine, and show progress."""

        def show(finished: int, total: int, tokens: int) -> None:
            self._progress.update(finished, f"{tokens} tokens")

        return self._engine.generate(requests, seed=seed, step=step, on_progress=show)

    def sync(self, version: int) -> None:
        """Sync the engine."""
        self._engine.sync(version)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
