"""Records of a stage, step by step, as JSON lines: metrics and transcripts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.runs.files import append_json_lines, filter_json_lines

__all__ = ["StepRecords"]


class StepRecords:
    """An append-only file of JSON objects with a `step`; whoever starts or resumes a run cuts it back first.

    A record of step s is written before the checkpoint of step s is, so a resumed run that keeps the steps up to its
    checkpoint has every record once.

    Args:
        file: where they go, which several stages may share; None to write nothing.
        labels: fields of every record, which tell this run's records from others in the file.
    """

    def __init__(self, file: Path | None, **labels: str) -> None:
        self.file = file
        self.labels = labels
        self._since = time.time()

    @classmethod
    def of_run(cls, args: Any, where: bool | str, name: str, *, writes: bool = True) -> StepRecords:
        """Create the records of a run from its configuration.

        Args:
            args: the trainer's config.
            where: a folder; True for `output_dir`, False to write nothing.
            name: of the file.
            writes: whether this process is the one that writes.
        """
        folder = Path(args.output_dir if isinstance(where, bool) else where)
        # Runs that share a folder must not cut each other's records back.
        run = os.path.relpath(args.output_dir, folder)
        labels = {"stage": args.kind, **({} if run == "." else {"run": run})}
        return cls(folder / name if where and writes else None, **labels)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, one a line.

        Raises:
            FileError: they cannot be written.
        """
        if self.file is not None:
            append_json_lines(self.file, ({**self.labels, **record} for record in records))

    def start_at(self, step: int) -> None:
        """Drop this run's records of later steps; at step 0, all of them but those that this object wrote before.

        Raises:
            FileError: the file cannot be read or written.
        """

        def is_kept(record: Mapping[str, Any]) -> bool:
            if any(record.get(name) != value for name, value in self.labels.items()):
                return True
            own, written = record.get("step", 0), record.get("time", 0.0)
            return own <= step if step else own == 0 and written >= self._since

        if self.file is not None:
            filter_json_lines(self.file, is_kept)
