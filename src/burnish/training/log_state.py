"""Metrics since the last log, saved in checkpoints so that the next log of a resumed run covers all of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from burnish.runs.files import read_json, write_json
from burnish.training.checkpoint import reading

if TYPE_CHECKING:
    from burnish.training.learner import Learner

__all__ = ["LogState"]


class LogState(TrainerCallback):
    """Save the loss and metrics of a rank since the last log, and restore them when training begins.

    transformers resets the loss since the last log on a resume, so where `save_steps` is not a multiple of
    `logging_steps` the next log would cover fewer steps than that of an uninterrupted run.
    """

    def __init__(self, trainer: Learner[Any]) -> None:
        self.trainer = trainer
        self._loaded: tuple[Path, dict[str, Any] | None] | None = None

    def save(self, folder: Path) -> None:
        """Write this rank's file.

        Raises:
            FileError: it cannot be written.
        """
        own: Any = self.trainer
        state = {
            "loss": float(own._tr_loss),
            "last_logged": own._globalstep_last_logged,
            "metrics": own.metrics.state_dict(),
            "learning_monitor": own.learning_monitor.state_dict(),
            **own.stage.metrics_state(),
        }
        write_json(self._file(folder), state, indent=None)

    def load(self, folder: Path) -> None:
        """Read this rank's file; a checkpoint of fewer ranks or an older version has none.

        Raises:
            FileError: it cannot be read.
        """
        self._loaded = (folder, read_json(self._file(folder)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what `load` read.

        Raises:
            ConfigError: it does not match what `save` writes.
        """
        (folder, loaded), self._loaded = self._loaded or (Path(), None), None
        own: Any = self.trainer
        if loaded is not None:
            with reading(folder):
                own.metrics.load_state_dict(loaded["metrics"])
                if "learning_monitor" in loaded:
                    own.learning_monitor.load_state_dict(loaded["learning_monitor"])
                own.stage.load_metrics_state(loaded)
                own._tr_loss += torch.tensor(loaded["loss"], dtype=own._tr_loss.dtype)
                own._globalstep_last_logged = int(loaded["last_logged"])

    def _file(self, folder: Path) -> Path:
        return folder / f"log_{self.trainer.args.process_index}.json"
