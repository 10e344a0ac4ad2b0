"""What each step of a pipeline was made from: a step is reused only where all of that is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError
from burnish.runs.files import read_json, write_json
from burnish.runs.lock import LOCK
from burnish.runs.status import STATUS

__all__ = ["StepInputs", "model_identity"]

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_DESCRIPTIONS = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
_BLOCK_BYTES = 4096
_BLOCKS = 64


class StepInputs:
    """Digests of the inputs of every step that a folder holds, by the step's file or folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "inputs.json"
        self._made: dict[str, dict[str, str]] = read_json(self._file, {})

    def check(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Refuse to reuse, or to go on with, a step that was made from something else.

        Args:
            step: its file or folder, relative.
            inputs: what it is made from, by the table of the configuration that says so.

        Raises:
            ConfigError: naming what has changed.
        """
        before = self._made.get(step)
        if before is None or not _exists(self.folder / step):
            return
        changed = sorted(name for name, value in inputs.items() if before.get(name) != _digest(value))
        if changed:
            raise ConfigError(
                f"output_dir = {str(self.folder)!r} holds a run with another [{'], ['.join(changed)}], from which "
                f"{step} was made: give another output_dir, or delete {self.folder / step} to make it anew."
            )

    def begin(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Check a step, and write down what it is made from.

        Raises:
            ConfigError: it is there, and was made from something else.
        """
        self.check(step, inputs)
        self._made[step] = {name: _digest(value) for name, value in inputs.items()}
        write_json(self._file, self._made)


def model_identity(model: str) -> Any:
    """A model by the content of its files (blocks of those with weights), or by name where it is no local folder."""
    path = Path(model).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [
        [file.name, _content(file)]
        for file in files
        if file.is_file() and (file.name in _DESCRIPTIONS or file.suffix in _WEIGHTS) and file.stem != "training_args"
    ]
    return found or model


def _content(file: Path) -> str:
    """A hash of the size and of blocks from the first to the last byte: training moves every weight."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for number in range(_BLOCKS):
                stream.seek(number * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _exists(path: Path) -> bool:
    """Whether a step has left anything: a folder without files has nothing to protect."""
    return path.is_file() or any(file.is_file() and file.name not in (LOCK, STATUS) for file in path.rglob("*"))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
