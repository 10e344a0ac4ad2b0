"""Checkpoint folders: drafted beside the finished ones, sealed with the list of their files, then moved into place.

A checkpoint is written in `.saving/`, sealed by `complete` (the names, sizes and small files' hashes), renamed to
`checkpoint-N`, and only then are older ones rotated away. A process may die between any two file operations: what
stands in `checkpoint-N`, or sealed in `.saving/`, is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError
from burnish.runs.files import read_json, write_json, writing
from burnish.runs.status import STATUS

__all__ = [
    "COMPLETE",
    "DRAFTS",
    "RUN",
    "check_unused",
    "checkpoints_in",
    "delete_run",
    "discard_draft",
    "find_checkpoint",
    "noting_files",
    "problem_of",
    "publish",
    "rotate",
    "set_aside_after",
    "settle",
]

logger = logging.getLogger(__name__)

COMPLETE = "complete"
"""File that is written last into a checkpoint: the names and sizes of its files."""

DRAFTS = ".saving"
"""Subfolder of a run in which checkpoints are written and deleted."""

RUN = "run.json"
"""File that describes the run of a checkpoint."""

_RECORDS = (STATUS, "metrics.jsonl", "environment.json", "*transcripts.jsonl", "reference_log_probs_*.json")
"""Files of a run other than its checkpoints and model."""

_RESULT = ".result.json"
"""Names and sizes of the files of the trained model."""

_HASHED_BYTES = 1 << 20
"""Files up to this size are sealed by their hash too."""

_REQUIRED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")

_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the `checkpoint-N` folders of a run, latest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the latest checkpoint that can be resumed, or None if the run has no checkpoints.

    Raises:
        ConfigError: there are checkpoints, and none is usable.
    """
    drafts = [path for path in checkpoints_in(folder / DRAFTS) if (path / COMPLETE).is_file()]
    candidates = sorted([*drafts, *checkpoints_in(folder)], key=_step, reverse=True)
    problems: list[str] = []
    for path in candidates:
        problem = problem_of(path)
        if problem is None:
            for skipped in problems:
                logger.warning("%s; resuming from %s", skipped, path)
            return path
        problems.append(f"{path} cannot be resumed: {problem}")
    if problems:
        raise ConfigError(
            f"resume_from_checkpoint = True: output_dir = {str(folder)!r} has no usable checkpoint ("
            f"{'; '.join(problems)}). Restore one, or start anew: in another output_dir, or with "
            "overwrite_output_dir = true."
        )
    return None


def problem_of(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, or None, from sizes, small files' hashes and ends of large ones."""
    if not (checkpoint / COMPLETE).is_file():
        return f"it has no file {COMPLETE!r}, so it was cut off while it was written, or is not burnish's"
    try:
        if (problem := _broken_seal(checkpoint)) is not None:
            return problem
        for name in _REQUIRED:
            if not (checkpoint / name).is_file():
                only = "; with save_only_model = true, it holds a model to start from" if name != _REQUIRED[0] else ""
                return f"{name} is missing{only}"
        if not any(path.name in _WEIGHTS for path in checkpoint.rglob("*")):
            return "its weights are missing"
        state: Any = read_json(checkpoint / "trainer_state.json")
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):  # pyright: ignore[reportUnknownMemberType]
            return "trainer_state.json has no global_step"
        return next((f"{path.name} is truncated" for path in _files(checkpoint) if not _has_its_end(path)), None)
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    except (AttributeError, LookupError, TypeError):
        return f"{COMPLETE}, or the header of a file, is not what burnish writes"


def publish(draft: Path, folder: Path) -> Path:
    """Seal a written draft and move it to `folder`, in place of an older one of its step.

    Raises:
        FileError: the disk is full, ...
    """
    _seal(draft)
    return _move_in(draft, folder)


def settle(folder: Path) -> None:
    """Finish what a killed process began: move a sealed draft in, delete the rest of the drafts.

    Raises:
        FileError: the folder cannot be written.
    """
    for draft in checkpoints_in(folder / DRAFTS):
        if _is_sealed(draft):
            _move_in(draft, folder)
    discard_draft(folder)


def discard_draft(folder: Path) -> None:
    """Delete what an unfinished save left.

    Raises:
        FileError: it cannot be deleted.
    """
    if (folder / DRAFTS).exists():
        with writing(folder / DRAFTS):
            shutil.rmtree(folder / DRAFTS)


def rotate(folder: Path, limit: int | None, keep: Collection[str | None] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the latest nor those named in `keep`.

    Raises:
        FileError: one cannot be deleted.
    """
    found = checkpoints_in(folder)
    if not limit or limit <= 0 or len(found) <= limit:
        return
    protected = [path for path in found if path == found[0] or path.name in {Path(p).name for p in keep if p}]
    excess = len(found) - max(limit, len(protected))
    for path in [path for path in reversed(found) if path not in protected][: max(excess, 0)]:
        _remove(path, folder)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, from which a resumed run diverges.

    Raises:
        FileError: one cannot be renamed.
    """
    for path in checkpoints_in(folder):
        if _step(path) > step:
            names = (f"superseded-{path.name}{end}" for end in ("", *(f"-{number}" for number in range(2, 10000))))
            target = next(folder / name for name in names if not (folder / name).exists())
            with writing(target):
                path.rename(target)
            logger.warning("%s is after the step that is resumed: kept as %s", path, target.name)


def check_unused(folder: Path) -> None:
    """Refuse to start a run from step 0 in a folder with checkpoints of another.

    Raises:
        ConfigError: with the choices.
    """
    found = [*checkpoints_in(folder), *(p for p in checkpoints_in(folder / DRAFTS) if (p / COMPLETE).is_file())]
    if found:
        raise ConfigError(
            f"output_dir = {str(folder)!r} has checkpoints of an earlier run ({found[0].name}). Continue that run with "
            "resume_from_checkpoint = true, give another output_dir, or set overwrite_output_dir = true to delete "
            "what that run wrote."
        )


def delete_run(folder: Path) -> None:
    """Delete what a run of burnish wrote into its folder: checkpoints, metrics, transcripts, caches and its model.

    Raises:
        ConfigError: a checkpoint is not burnish's.
        FileError: something cannot be deleted.
    """
    foreign = [path for path in checkpoints_in(folder) if not (path / COMPLETE).is_file() and not _is_own(path)]
    if foreign:
        raise ConfigError(
            f"overwrite_output_dir = True: {foreign[0]} was not written by burnish; move or delete it, or give another "
            "output_dir."
        )
    discard_draft(folder)
    for path in [*checkpoints_in(folder), *folder.glob("superseded-checkpoint-*")]:
        _remove(path, folder)
    found = [path for pattern in _RECORDS for path in folder.glob(pattern)]
    noted: dict[str, int] = read_json(folder / _RESULT, {})
    result = [path for name, size in noted.items() if (path := folder / name).is_file() and path.stat().st_size == size]
    for path in [*found, *result, folder / _RESULT]:
        with writing(path):
            path.unlink(missing_ok=True)


@contextmanager
def noting_files(folder: Path) -> Generator[None]:
    """Remember which files of a folder were written inside, for `delete_run`.

    Raises:
        FileError: the note cannot be written.
    """
    before = _times(folder)
    yield
    written = [name for name, time in _times(folder).items() if time != before.get(name)]
    sizes = {name: (folder / name).stat().st_size for name in written}
    write_json(folder / _RESULT, {**read_json(folder / _RESULT, {}), **sizes})


def _times(folder: Path) -> dict[str, int]:
    files = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.stat().st_mtime_ns for path in files if path.is_file()}


def _is_own(checkpoint: Path) -> bool:
    return (checkpoint / "trainer.json").is_file()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _is_sealed(draft: Path) -> bool:
    try:
        return (draft / COMPLETE).is_file() and _broken_seal(draft) is None
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _seal(draft: Path) -> None:
    entries: dict[str, dict[str, Any]] = {}
    with writing(draft):
        for path in _files(draft):
            # What the seal names must survive a power failure that the seal survives.
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            entries[path.relative_to(draft).as_posix()] = _entry(path)
    write_json(draft / COMPLETE, {"files": entries})


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _broken_seal(checkpoint: Path) -> str | None:
    """Return what differs from the list in `complete`, which is empty in checkpoints of early versions."""
    if not (text := (checkpoint / COMPLETE).read_text(encoding="utf-8")):
        return f"{COMPLETE!r} is empty" if (checkpoint / RUN).is_file() else None
    for name, entry in dict(json.loads(text)["files"]).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes and was written with {entry['bytes']}"
        if _entry(path) != entry:
            return f"{name} has changed since it was written"
    return None


def _has_its_end(path: Path) -> bool:
    """Return whether a file of safetensors or torch is complete by its own header."""
    if path.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(path)
    if path.suffix != ".safetensors":
        return True
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            return False
        header: dict[str, Any] = json.loads(stream.read(length))
    ends: Iterable[int] = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return 8 + length + max(ends, default=0) == path.stat().st_size


def _move_in(draft: Path, folder: Path) -> Path:
    target = folder / draft.name
    with writing(target):
        if target.exists():
            target.rename(draft.with_name(f"replaced-{draft.name}"))
        draft.rename(target)
    discard_draft(folder)
    return target


def _remove(path: Path, folder: Path) -> None:
    """Delete a folder; a rename first frees its name atomically."""
    with writing(path):
        (folder / DRAFTS).mkdir(exist_ok=True)
        path.rename(folder / DRAFTS / f"removed-{path.name}")
    discard_draft(folder)
