"""vLLM plug-in: load weights from a folder in two phases, so that a server has the old version, the new one, or none.

Every process of a server loads it by the entry point `vllm.general_plugins`. `burnish serve` gives the server a copy of
this file, since vLLM's environment need not have burnish: it imports nothing but vLLM, torch and safetensors.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BACKEND", "NOT_PREPARED", "FolderTransferEngine", "Manifest", "folder_checksum", "register"]

BACKEND = "burnish"
"""Name of the back end in `--weight-transfer-config`."""

NOT_PREPARED = "weights not prepared"
"""Begins the message of a first phase that failed."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_CHUNK_BYTES = 1 << 24
_FAILED_COMMIT = 70
"""Exit status of a worker whose weights are a mixture."""

logger = logging.getLogger("vllm.burnish")


def register() -> None:
    """Add the back end to vLLM's registry."""
    factory = importlib.import_module("vllm.distributed.weight_transfer").WeightTransferEngineFactory
    with contextlib.suppress(ValueError):  # vLLM may load a plug-in twice
        factory.register_engine(BACKEND, FolderTransferEngine)


def folder_checksum(folder: str) -> int:
    """Return the CRC-32 of the weights in a folder, headers included.

    Raises:
        OSError: the folder cannot be read.
    """
    checksum = 0
    for file in _weight_files(folder):
        with file.open("rb", buffering=0) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                checksum = zlib.crc32(chunk, checksum)
    return checksum


def _weight_files(folder: str) -> list[Path]:
    files = sorted(file for file in Path(folder).iterdir() if file.suffix == ".safetensors")
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors file")
    return files


@dataclass(frozen=True)
class Manifest:
    """Version to prepare.

    Attributes:
        folder: weights of a checkpoint in safetensors files, with their config.json.
        version: identifies the weights.
        run: identifies the trainer, whose versions have the same tensors.
        checksum: `folder_checksum` of the folder, as the trainer has written it.
    """

    folder: str
    version: str
    run: str
    checksum: int


class FolderTransferEngine:
    """Back end of a worker: `init_weight_transfer_engine` prepares a version, `update_weights` commits it.

    It has the methods of vLLM's `WeightTransferEngine`.

    Args:
        config: as vLLM gives them.
        vllm_config: as above.
        device: as above.
        model: the worker's shard of the model.
    """

    supports_draft_weight_update = False
    defers_processing = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self._model, self._model_config = model, vllm_config.model_config
        self._version: str | None = None
        self._tensors: dict[str, Any] = {}
        self._run = ""
        self._layout: dict[str, tuple[str, list[int]]] = {}
        """Dtype and shape of each tensor of the run's version before."""

    def parse_init_info(self, init_info: Mapping[str, Any]) -> Manifest:
        """Read the body of the first phase."""
        return Manifest(**init_info)

    def init_transfer_engine(self, manifest: Manifest) -> None:
        """Prepare a version: map its files and check them; the model does not change.

        Raises:
            ValueError: with what is wrong.
        """
        self._version, self._tensors = None, {}
        if manifest.run != self._run:
            self._run, self._layout = manifest.run, {}
        try:
            self._check_sizes(manifest.folder)
            if (found := folder_checksum(manifest.folder)) != manifest.checksum:
                raise ValueError(f"the checksum of {manifest.folder} is {found}, not {manifest.checksum}")
            tensors = _mapped(manifest.folder)
            self._check_layout(_layout(tensors))
        except (OSError, ValueError) as error:
            raise ValueError(f"{NOT_PREPARED}: {error}") from error
        self._version, self._tensors = manifest.version, tensors

    def start_weight_update(self) -> None:
        """Begin the second phase.

        Raises:
            RuntimeError: nothing is prepared.
        """
        if self._version is None:
            raise RuntimeError("no version is prepared: call init_weight_transfer_engine first")

    def update_weights(self, update_info: Mapping[str, Any]) -> None:
        """Load the prepared version; a worker that fails half-way ends, so that no request sees a mixture.

        Raises:
            ValueError: another version is prepared.
        """
        if update_info["version"] != self._version:
            raise ValueError(f"{self._version} is prepared, not {update_info['version']}")
        reload = importlib.import_module("vllm.model_executor.model_loader.reload")
        try:
            reload.initialize_layerwise_reload(self._model)
            self._model.load_weights(iter(self._tensors.items()))
            reload.finalize_layerwise_reload(self._model, self._model_config)
            self._pack_heads()
        except BaseException:
            logger.exception("loading %s failed half-way: this server ends", self._version)
            os._exit(_FAILED_COMMIT)
        self._layout, self._version, self._tensors = _layout(self._tensors), None, {}

    def finish_weight_update(self) -> None:
        """End the second phase."""

    def reset_weight_update_target(self) -> None:
        """Do nothing: draft models are not updated."""

    def drain_pending(self) -> None:
        """Do nothing: an update is complete when it returns."""

    def shutdown(self) -> None:
        """Forget what was prepared."""
        self._version, self._tensors = None, {}

    def _check_sizes(self, folder: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        config, served = config.get("text_config") or config, self._model_config.hf_text_config
        for name in _SIZES:
            ours, theirs = getattr(served, name, None), config.get(name)
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"{name} = {theirs}, and the served model has {ours}")

    def _check_layout(self, layout: dict[str, tuple[str, list[int]]]) -> None:
        """Compare with the version before: names vary between checkpoints of a model, not between versions of a run."""
        if not self._layout:
            return
        for name in sorted(self._layout.keys() | layout.keys()):
            before, now = self._layout.get(name), layout.get(name)
            if before != now:
                raise ValueError(f"{name} is {now or 'missing'}, and in the version before {before or 'missing'}")

    def _pack_heads(self) -> None:
        """Pack the head again on a CPU, where vLLM packs it once if it is tied to the embeddings."""
        if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
            return
        heads = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding").ParallelLMHead
        for module in self._model.modules():
            if isinstance(module, heads):
                module.quant_method.process_weights_after_loading(module)


def _mapped(folder: str) -> dict[str, Any]:
    """Return the tensors of a folder, which are read from its files when they are used."""
    safetensors = importlib.import_module("safetensors")
    tensors: dict[str, Any] = {}
    for file in _weight_files(folder):
        try:
            with safetensors.safe_open(file, framework="pt") as weights:
                tensors |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    return tensors


def _layout(tensors: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
