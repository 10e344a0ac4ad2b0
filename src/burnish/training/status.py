"""The status file of a training run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from burnish.runs.status import RunStatus

__all__ = ["recorded_status"]


def recorded_status(trainer: Any) -> RunStatus:
    """Return the status of a trainer's run, which follows its steps; the first rank writes it to `output_dir`."""
    args = trainer.args
    status = RunStatus(args.output_dir if args.process_index == 0 else None, args.kind)
    trainer.add_callback(_StatusCallback(status))
    return status


class _StatusCallback(TrainerCallback):
    """Update the status at the start, with every log and with every checkpoint."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the number of steps."""
        self.status.update(doing="training", step=state.global_step, max_steps=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self.status.count(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step."""
        self.status.update(step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step."""
        self.status.update(step=state.global_step)
