"""Find the dimensions of a model by folder, GGUF file, package, well-known name or hub name, without its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from burnish.config.models import find_model
from burnish.config.paths import is_file, is_folder
from burnish.errors import ModelError
from burnish.planner.gguf_header import config_of_gguf
from burnish.planner.shapes import ModelShape, shape_from_config

__all__ = ["FoundModel", "find_shape", "known_models"]

_VARIANT = re.compile(r"-(instruct|it|pt|base|chat|hf|bnb|4bit|unsloth|v1\.0|2507)(?=-|$)")
"""Parts of names that say nothing of dimensions."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model's dimensions.

    Attributes:
        shape: its dimensions.
        origin: where they were read.
        adapters: adapter_config.json, if the model is a folder of adapters on a base.
        config: config.json, or what stands for it.
    """

    shape: ModelShape
    origin: str
    adapters: dict[str, Any] | None = None
    config: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: dict[str, Any], where: str, origin: str, adapters: dict[str, Any] | None = None) -> FoundModel:
        """Read the dimensions of a configuration, named `where` in errors."""
        return cls(shape_from_config(config, where), origin, adapters, config)


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the configurations of well-known models by name."""
    return json.loads(files("burnish.planner").joinpath("known_models.json").read_text(encoding="utf-8"))


def find_shape(name: str, field: str = "model") -> FoundModel:
    """Find a model's dimensions; the hub is asked last.

    Args:
        name: folder, .gguf file, package that carries one, well-known name, or hub name.
        field: name of the field, for messages.

    Raises:
        ModelError: nothing tells the dimensions, or the architecture is not known.
    """
    source = find_model(name, field)
    folder = Path(source.name).expanduser()
    if source.gguf_file is not None:
        path = folder / source.gguf_file
        return FoundModel.of(config_of_gguf(path), str(path), source.gguf_file)
    if is_folder(folder):
        adapters = _json(folder / "adapter_config.json") if is_file(folder / "adapter_config.json") else None
        if is_file(folder / "config.json"):
            path = folder / "config.json"
            return FoundModel.of(_json(path), str(path), str(path), adapters)
        base = str((adapters or {}).get("base_model_name_or_path") or "")
        found = find_shape(base, f"{folder / 'adapter_config.json'}: base_model_name_or_path")
        return FoundModel(found.shape, found.origin, adapters, found.config)
    key = _VARIANT.sub("", name.rpartition("/")[2].lower().removeprefix("meta-"))
    for known, config in known_models().items():
        if key in (known.lower(), _VARIANT.sub("", known.lower())):
            return FoundModel.of(config, known, f"the table of well-known models ({known})")
    path = _from_hub(name, field)
    return FoundModel.of(_json(path), str(path), f"the hub ({name})")


def _json(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}); save the model again.") from error
    if not isinstance(found, Mapping):
        raise ModelError(f"{path}: not the configuration of a model; save the model again.")
    return dict(cast("Mapping[str, Any]", found))


def _from_hub(name: str, field: str) -> Path:
    """Return the model's config.json from the hub or its cache."""
    shown = f"{field} = {name!r}"
    fix = (
        "Name a folder with config.json, a .gguf file, a hub name where there is a network, or a model of that size "
        f"({', '.join(known_models())})"
    )
    if "/" not in name:
        raise ModelError(f"{shown}: no such folder, package or well-known model. {fix}.")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    from burnish.config.hub import hub_problem

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    if (problem := hub_problem(name)) is not None:
        raise ModelError(f"{shown}: no such folder or well-known model, and {problem}. {fix}.")
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the library's errors differ between versions
        raise ModelError(
            f"{shown}: the hub has no config.json for it ({' '.join(str(error).split()):.200}). {fix}."
        ) from error
