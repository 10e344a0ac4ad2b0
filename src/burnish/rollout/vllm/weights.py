"""Weights for vLLM: what it takes, tensors by their names in a checkpoint, and folders that are never changed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from burnish.errors import ConfigError, FileError
from burnish.model.adapters import saving_adapters
from burnish.model.quantization import is_quantized
from burnish.model.scoring import causal_lm

__all__ = [
    "MAX_RANK",
    "WeightFolders",
    "checkpoint_weights",
    "has_adapters",
    "lora_slot",
    "refuse_unsupported",
    "refuse_unsupported_config",
]

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves; an adapter may have any rank up to it."""
MAX_RANK = _RANKS[-1]
"""Largest LoRA rank that vLLM takes."""

_PREFIX = "burnish-weights-"
_MEMORY = Path("/dev/shm")
_FIX = "sample with the native engine (use_vllm = false)"


def lora_slot(rank: int) -> int:
    """Return the rank that vLLM must reserve for an adapter of a rank up to `MAX_RANK`."""
    return next(slot for slot in _RANKS if slot >= rank)


def has_adapters(model: Any) -> bool:
    """Return whether a model carries peft adapters, which are then what a sync delivers."""
    return hasattr(model, "peft_config")


def refuse_unsupported_config(peft_config: Any) -> None:
    """Refuse adapters that vLLM would ignore, or apply otherwise, without saying so.

    Args:
        peft_config: of peft, or None.

    Raises:
        ConfigError: with the field.
    """
    for name, problem in () if peft_config is None else _problems(peft_config):
        raise ConfigError(f"peft {name}: {problem}; change it, or {_FIX}.")


def _problems(config: Any) -> Iterator[tuple[str, str]]:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        yield f"type = {kind!r}", "vLLM takes LoRA adapters only"
        return
    ignored = {
        "use_dora": "vLLM would leave out DoRA's magnitudes",
        "lora_bias": "vLLM would leave out the biases of the adapters",
        "modules_to_save": "vLLM would keep the base's modules",
        "trainable_token_indices": "vLLM would keep the base's embeddings",
        "target_parameters": "vLLM would leave out the adapters of these parameters",
        "layer_replication": "vLLM has the base's layers",
        "use_qalora": "vLLM would apply plain LoRA",
    }
    for name, problem in ignored.items():
        if value := getattr(config, name, None):
            yield f"{name} = {value!r:.100}", problem
    if (bias := getattr(config, "bias", "none")) != "none":
        yield f"bias = {bias!r}", "vLLM would keep the base's biases"
    initial = getattr(config, "init_lora_weights", True)
    if isinstance(initial, str) and initial not in ("gaussian", "orthogonal", "eva"):
        yield f"init_lora_weights = {initial!r}", "it changes the base's weights, which vLLM would keep"
    if not 1 <= config.r <= MAX_RANK:
        yield f"r = {config.r}", f"vLLM takes ranks from 1 to {MAX_RANK}"
    targets = config.target_modules
    for end in ("lm_head", "embed_tokens", "wte", "embed_out"):
        if not isinstance(targets, str) and targets and any(str(t).split(".")[-1] == end for t in targets):
            yield f"target_modules = {sorted(targets)!r:.200}", f"vLLM would leave out the adapter of {end}"


def refuse_unsupported(model: Any) -> None:
    """Refuse a loaded model with trained weights that no sync would deliver.

    Raises:
        ConfigError: with the weight.
    """
    if is_quantized(causal_lm(model)):
        raise ConfigError(
            "use_vllm = True with quantised weights: vLLM would sample from unquantised ones. Load the model "
            f"without quantization_config, or {_FIX}."
        )
    if not has_adapters(model):
        return
    for config in model.peft_config.values():
        refuse_unsupported_config(config)
    for name, parameter in model.named_parameters():
        is_adapter = re.search(r"\.lora_[AB]\.[^.]+\.weight$", name) is not None
        if parameter.requires_grad and not is_adapter:
            raise ConfigError(f"{name} trains beside the adapters: vLLM would keep the base's; {_FIX}.")
        if is_adapter and re.search(r"(^|\.)(lm_head|embed_tokens|wte|embed_out)\.", name):
            raise ConfigError(f"{name}: vLLM would leave out an adapter of embeddings or head; {_FIX}.")


def checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a model under their names in a checkpoint, which vLLM's loaders read.

    They are the trainer's own tensors, without a copy where a checkpoint holds them in the same form. Of tied weights
    the embeddings are named, and of adapters nothing.
    """
    lm = causal_lm(model)
    head, left_out = lm.get_output_embeddings(), set[str]()
    if head.weight is lm.get_input_embeddings().weight:
        left_out = {f"{name}.weight" for name, module in lm.named_modules() if module is head}
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in lm.state_dict().items()
        if name not in left_out and not (has_adapters(model) and ".lora_" in name)
    }
    return revert_weight_conversion(lm, state)


class WeightFolders:
    """Folders with the weights of one version each, in shared memory where there is room.

    A folder is written under another name and renamed when it is whole; the newest stays until the next is there, so
    that a server which comes back can load it.

    Args:
        root: folder that trainer and servers see; None chooses shared memory, or the temporary folder.
    """

    def __init__(self, root: str | None = None) -> None:
        base = Path(root) if root is not None else _MEMORY if os.access(_MEMORY, os.W_OK) else None
        base = Path(tempfile.gettempdir()) if base is None else base
        try:
            base.mkdir(parents=True, exist_ok=True)
            remove_left_behind(base)
            self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-", dir=base))
        except OSError as error:
            raise FileError(f"vllm_weights_dir = {str(base)!r}: weights cannot be written there ({error}).") from error
        self._finalizer = weakref.finalize(self, shutil.rmtree, self.path, True)

    def write(self, model: Any, tag: str) -> Path:
        """Write a model's adapters, or without adapters its weights; remove the folders of earlier versions.

        Raises:
            FileError: no room.
        """
        part, folder = self.path / f"{tag}.part", self.path / tag
        try:
            if has_adapters(model):
                with saving_adapters(model, part):
                    model.save_pretrained(part)
            else:
                _save_weights(causal_lm(model), part)
            part.rename(folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise FileError(
                f"the weights of {tag} cannot be written to {self.path} ({error}): set vllm_weights_dir to a folder "
                "with room for a copy of the model."
            ) from error
        for other in self.path.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def close(self) -> None:
        """Remove all folders."""
        self._finalizer()


def _save_weights(lm: Any, folder: Path) -> None:
    """Save a model in one file, and a tied head in another, for servers whose head has a weight of its own."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        lm.save_pretrained(folder, max_shard_size="1000GB")
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    head = lm.get_output_embeddings()
    if head.weight is not lm.get_input_embeddings().weight:
        return
    name = next(name for name, module in lm.named_modules(remove_duplicate=False) if module is head)
    save_file({f"{name}.weight": head.weight.detach().cpu()}, folder / "head.safetensors", metadata={"format": "pt"})


def remove_left_behind(base: Path) -> None:
    """Remove the folders of processes of this machine that were killed."""
    for folder in base.glob(f"{_PREFIX}{socket.gethostname()}-*"):
        owner = folder.name.removeprefix(f"{_PREFIX}{socket.gethostname()}-").split("-")[0]
        if owner.isdecimal() and not is_alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(process: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
