"""Handle preemption: on a signal, save a checkpoint at the next step boundary and end the run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from burnish.errors import Interrupted

if TYPE_CHECKING:
    from burnish.training.learner import Learner

__all__ = ["stopping_on_signals"]

_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1")

_ECHO_SECONDS = 0.1
"""A signal repeated this soon is the same one: `timeout` sends it to its child and to the child's group."""

_LAUNCHER_ECHO_SECONDS = 2.0
"""The same under a launcher, which forwards signals that the scheduler has already sent to its workers."""


@contextmanager
def stopping_on_signals(trainer: Learner[Any]) -> Generator[None]:
    """Stop training at the next step boundary after SIGTERM, SIGHUP or SIGUSR1, with a checkpoint.

    Only signals with the default disposition are handled, and only in the main thread: those that are ignored (nohup)
    or handled already (by a cluster's hooks) stay as they are. A second signal ends the process at once.

    Raises:
        Interrupted: after the checkpoint was saved, on every rank.
    """
    received = _Received(trainer.args.process_index == 0)
    stop = _StopCallback(trainer, received)
    trainer.add_callback(stop)  # the last one, so that the others have seen the checkpoint when it raises
    try:
        with received.handled():
            yield
        stop.raise_if_signalled(trainer.state.global_step)
    finally:
        trainer.remove_callback(stop)


class _StopCallback(TrainerCallback):
    """Agree on signals over all ranks at step boundaries, and request the checkpoint."""

    def __init__(self, trainer: Learner[Any], received: _Received) -> None:
        self.trainer = trainer
        self.received = received
        self.signum = 0
        self._saved_step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint of this step if any rank has received a signal."""
        self._agree(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do the same after the last step's evaluation, and if `save_strategy = "best"` saved nothing."""
        self._agree(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training once the checkpoint is complete."""
        self._saved_step = state.global_step
        self._raise_if_saved(state)

    def raise_if_signalled(self, step: int) -> None:
        """End a run that took its last step before any rank could stop it.

        Raises:
            Interrupted: a rank has received a signal.
        """
        if signum := int(self.trainer.ranks.max(self.received.signum)):
            raise Interrupted(signum, step, self._checkpoint() if self._saved_step == step else None)

    def _agree(self, state: TrainerState, control: TrainerControl) -> None:
        self.signum = self.signum or int(self.trainer.ranks.max(self.received.signum))
        if self.signum:
            self._raise_if_saved(state)
            control.should_save = control.should_training_stop = True

    def _raise_if_saved(self, state: TrainerState) -> None:
        if self.signum and self._saved_step == state.global_step:
            # A launcher ends all ranks when one exits, so none may before the checkpoint is finished.
            self.trainer.accelerator.wait_for_everyone()
            raise Interrupted(self.signum, state.global_step, self._checkpoint())

    def _checkpoint(self) -> str:
        return str(Path(self.trainer.args.output_dir) / f"checkpoint-{self._saved_step}")


class _Received:
    """Record the first signal; the second ends the process."""

    def __init__(self, speaks: bool) -> None:
        self.signum = 0
        self._speaks = speaks
        self._when = 0.0
        self._taken: list[int] = []

    @contextmanager
    def handled(self) -> Generator[None]:
        """Handle the signals with the default disposition inside."""
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
            self._taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
        _active.add(self)
        for number in self._taken:
            signal.signal(number, self._receive)
        try:
            with _watching(self._taken, self._end_if_stuck):
                yield
        finally:
            self._restore()
            _active.discard(self)

    def leave_to_parent(self) -> None:
        """Restore default signals in a fork, such as a dataloader worker, without waking the parent's thread."""
        if self._taken:
            self._restore()
            signal.set_wakeup_fd(-1)

    def _restore(self) -> None:
        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)
        self._taken = []

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._when = signum, time.monotonic()
            if self._speaks:
                name = signal.Signals(signum).name
                # Not sys.stderr, which the interrupted code may be writing to.
                os.write(2, f"[burnish] {name}: stopping after this step; again to stop at once\n".encode())
        elif time.monotonic() - self._when > _echo_seconds():
            self._restore()
            os.kill(os.getpid(), signum)

    def _end_if_stuck(self, arrivals: list[tuple[float, int]]) -> None:
        """End the process if its main thread does not handle the second signal, as in a collective that hangs."""
        (first, _), (last, signum) = arrivals[0], arrivals[-1]
        if last - first > _echo_seconds():
            time.sleep(1.0)
            os._exit(128 + signum)


_active: set[_Received] = set()


def _after_fork() -> None:
    for received in _active:
        received.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _echo_seconds() -> float:
    return _LAUNCHER_ECHO_SECONDS if "RANK" in os.environ else _ECHO_SECONDS


@contextmanager
def _watching(numbers: Sequence[int], arrived: Callable[[list[tuple[float, int]]], None]) -> Generator[None]:
    """Call `arrived` in a thread for each signal as it arrives, whatever the main thread does."""
    before = signal.set_wakeup_fd(-1) if numbers else 0
    if before != -1:  # an event loop has set one
        if numbers:
            signal.set_wakeup_fd(before)
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        arrivals: list[tuple[float, int]] = []
        while byte := os.read(reader, 1):
            if byte[0] in numbers:
                arrivals.append((time.monotonic(), byte[0]))
                arrived(arrivals)

    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="burnish-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        thread.join()
        os.close(reader)
