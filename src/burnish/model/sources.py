"""Reading models from where `burnish.config.models` finds them: files beside the weights, and the hub."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from burnish.config.hub import hub_problem
from burnish.config.models import ModelSource, find_model
from burnish.config.paths import expanded, is_folder, missing
from burnish.errors import ModelError

__all__ = ["ModelSource", "find_model", "hub_arguments", "reach", "reading_model"]

logger = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")

_DESCRIPTIONS = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")


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
