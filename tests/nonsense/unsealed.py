"""Checkpoints of earlier versions, whose seal is empty, with one file damaged: refused, or resumed to the bit."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import tiny
from nonsense.cases import Case
from test_nonsense import build, good

KINDS = ("sft", "grpo")
"""A plain trainer, and one with state of its own."""

_STEPS = {"num_train_epochs": 9, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1, "max_steps": 3}


def _cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


def _loop(path: Path, _: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _writing(content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, _: (path.write_bytes(content), None)[1]


def _torch(value: Any) -> Callable[[Path, Path], None]:
    return lambda path, _: torch.save(value, path)


_CHANGES: dict[str, Callable[[Path, Path], None]] = {
    "cut": _cut,
    "one bit": _flip,
    "removed": lambda path, _: path.unlink(),
    "a folder": _folder,
    "a link to itself": _loop,
    "empty": _writing(b""),
    "NULs": _writing(bytes(5000)),
    "random bytes": _writing(bytes(range(256)) * 20),
    "null": _writing(b"null"),
    "a list": _writing(b"[]"),
    "a table": _writing(b"{}"),
    "a number": _writing(b"5"),
    "100,000 deep": _writing(b"[" * 100_000),
    "UTF-16": _writing("{}".encode("utf-16")),
    "a list of torch's": _torch([1]),
    "a table of torch's": _torch({}),
    "of the step before": lambda path, before: (shutil.copy(before / path.name, path), None)[1],
}
_UNSEEN = ("one bit", "of the step before", "removed", "a table", "a table of torch's")
"""Nothing but the seal tells these from what a run wrote."""

_STATES: dict[str, Any] = {
    "global_step": (None, "x", -1, 10**30, 1.5, [], True, 99),
    "max_steps": (None, "x", -1, 10**30, []),
    "epoch": (None, "x", -1, []),
    "log_history": (None, "x", 5, [5]),
    "train_batch_size": (None, "x", -5),
    "stateful_callbacks": (None, "x", [], {"nope": {}}, {"TrainerControl": 5}),
    "best_model_checkpoint": (5, "nowhere", []),
    "nope": (1,),
}


@cache
def _whole(kind: str) -> Path:
    """A finished run with its checkpoints, made once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    trainer = build(kind, folder, good(kind), tiny.model(), config=_STEPS)
    trainer.train()
    torch.save(trainer.model.state_dict(), folder / "final.pt")
    return folder


def cases() -> Iterator[Case]:
    """Each file of the second of two checkpoints, then each field of its state."""
    for kind in KINDS:
        for name in sorted(_names(kind)):
            for change in _CHANGES:
                run = partial(_resume, kind, name, change)
                yield Case("checkpoint without a seal", f"{kind}: {name}: {change}", run, None)
        for field, values in _STATES.items():
            for value in values:
                run = partial(_resume_state, kind, field, value)
                yield Case("checkpoint's state", f"{kind}: {field} = {value!r}", run, None)
    for label, path in (("no folder", "nowhere"), ("a file", "file"), ("an empty folder", "empty"), ("NUL", "a\0b"),
                        ("a name too long", "x" * 5000), ("empty", "")):  # fmt: skip
        yield Case("checkpoint, its path", label, partial(_resume_path, path))


@cache
def _names(kind: str) -> list[str]:
    return [
        path.name for path in (_whole(kind) / "checkpoint-2").iterdir() if path.is_file() and path.name != "complete"
    ]


def _copy(kind: str) -> Path:
    out = Path("out").resolve()
    for number in (1, 2):
        shutil.copytree(_whole(kind) / f"checkpoint-{number}", out / f"checkpoint-{number}")
    return out


def _resume(kind: str, name: str, change: str) -> None:
    out = _copy(kind)
    _CHANGES[change](out / "checkpoint-2" / name, out / "checkpoint-1")
    (out / "checkpoint-2" / "complete").write_bytes(b"")
    _go_on(kind, out, exact=change not in _UNSEEN)


def _resume_state(kind: str, field: str, value: Any) -> None:
    out = _copy(kind)
    file = out / "checkpoint-2" / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    (out / "checkpoint-2" / "complete").write_bytes(b"")
    _go_on(kind, out, exact=False)


def _resume_path(path: str) -> None:
    Path("file").write_text("")
    Path("empty").mkdir()
    build("sft", Path("out").resolve(), good("sft"), tiny.model(), config=_STEPS).train(resume_from_checkpoint=path)


def _go_on(kind: str, out: Path, *, exact: bool) -> None:
    trainer = build(kind, out, good(kind), tiny.model(), config=_STEPS)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    finally:
        logging.disable(level)
    if exact:
        for name, weight in torch.load(_whole(kind) / "final.pt", weights_only=True).items():
            assert torch.equal(weight, trainer.model.state_dict()[name]), f"another {name} than without the damage"
