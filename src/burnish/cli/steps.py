"""Record the inputs of each step of a pipeline, and reuse a step only if all of them are unchanged."""

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
    """Digests of the inputs of every step in a folder, keyed by the step's file or folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "inputs.json"
        self._made: dict[str, dict[str, str]] = read_json(self._file, {})

    def check(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Refuse to reuse or continue a step that was made from other inputs.

        Args:
            step: relative path of the step's file or folder.
            inputs: table of the configuration -> the input that it describes.

        Raises:
            ConfigError: inputs have changed; the message names their tables.
        """
        before = self._made.get(step)
        path = self.folder / step
        # A folder with nothing but the lock and the status has no results to protect.
        has_results = path.is_file() or any(
            file.is_file() and file.name not in (LOCK, STATUS) for file in path.rglob("*")
        )
        if before is None or not has_results:
            return
        changed = sorted(name for name, value in inputs.items() if before.get(name) != _digest(value))
        if changed:
            raise ConfigError(
                f"output_dir = {str(self.folder)!r} holds a run with another [{'], ['.join(changed)}], from which "
                f"{step} was made: set another output_dir, or delete {path} to make it again."
            )

    def begin(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Check a step and record its inputs.

        Raises:
            ConfigError: the step exists and was made from other inputs.
        """
        self.check(step, inputs)
        self._made[step] = {name: _digest(value) for name, value in inputs.items()}
        write_json(self._file, self._made)


def model_identity(model: str) -> Any:
    """Identify a local model by the content of its files, sampled in blocks, and any other model by its name."""
    path = Path(model).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [
        [file.name, _content(file)]
        for file in files
        if file.is_file() and (file.name in _DESCRIPTIONS or file.suffix in _WEIGHTS) and file.stem != "training_args"
    ]
    return found or model


def _content(file: Path) -> str:
    """Hash the size of a file and evenly spaced blocks of it, which suffices as training moves every weight."""
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


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
