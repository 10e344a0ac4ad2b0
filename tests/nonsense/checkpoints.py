"""Checkpoints whose files are cut, emptied, replaced, moved or gone, for three kinds of trainer.

Named, such a checkpoint is refused; with `resume_from_checkpoint = True` the run goes on from the one before it, or is
refused where none is left.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from peft import LoraConfig

from nonsense.cases import Case
from test_ppo import ppo
from test_trainers import grpo, sft

SAVED: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def _sft(folder: Path) -> Any:
    return sft(folder, **SAVED)


def _grpo(folder: Path) -> Any:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return grpo(folder, steps_per_generation=2, per_device_train_batch_size=4, peft_config=lora, **SAVED)


def _ppo(folder: Path) -> Any:
    return ppo(folder, **SAVED)


TRAINERS: dict[str, Callable[[Path], Any]] = {"sft": _sft, "grpo": _grpo, "ppo": _ppo}


@cache
def finished_run(kind: str) -> Path:
    """A run of three checkpoints, made once."""
    folder = Path(tempfile.mkdtemp(prefix="nonsense-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    TRAINERS[kind](folder).train()
    return folder


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 64)


def _change_one_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x55
    file.write_bytes(data)


def _replace_by_garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 8)


def _replace_by_json(value: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(value)) and None


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _remove(file: Path) -> None:
    file.unlink()


BREAKS: dict[str, Callable[[Path], None]] = {
    "cut": _cut,
    "emptied": _empty,
    "longer": _lengthen,
    "one byte changed": _change_one_byte,
    "garbage": _replace_by_garbage,
    "null": _replace_by_json(None),
    "a list": _replace_by_json([[]]),
    "a number": _replace_by_json(10**400),
    "an empty table": _replace_by_json({}),
    "a table of another kind": _replace_by_json({"files": [1], "global_step": "x", "stage": 5, "version": 99}),
    "a folder": _replace_by_folder,
    "gone": _remove,
}


def cases() -> Iterator[Case]:
    """Every file of the latest checkpoint in every way; then in all checkpoints at once."""
    for kind in TRAINERS:
        names = sorted(path.name for path in (finished_run(kind) / "checkpoint-3").iterdir())
        for name in names:
            for how, break_file in BREAKS.items():
                resume = partial(_resume, kind, [(3, name, break_file)])
                label = f"{kind} {name} {how}"
                yield Case("checkpoint, named", label, partial(resume, "run/checkpoint-3"), names="checkpoint-3")
                yield Case("checkpoint, latest", label, partial(resume, True), refused=False)
            for how in ("cut", "gone"):
                broken = [(step, name, BREAKS[how]) for step in (1, 2, 3)]
                yield Case("checkpoint, all", f"{kind} {name} {how}", partial(_resume, kind, broken, True), names="run")
    for value in (
        "",
        "nowhere",
        "run/checkpoint-9",
        "run",
        "run/checkpoint-3/config.json",
        "\0",
        "x" * 5000,
        5,
        [],
        {},
    ):
        yield Case("checkpoint, name", f"{value!r:.40}", partial(_resume, "sft", [], value))


def _resume(kind: str, broken: list[tuple[int, str, Callable[[Path], None]]], resume: Any) -> None:
    folder = Path("run")
    shutil.copytree(finished_run(kind), folder)
    for step, name, break_file in broken:
        break_file(folder / f"checkpoint-{step}" / name)
    trainer = TRAINERS[kind](folder)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == SAVED["max_steps"]
