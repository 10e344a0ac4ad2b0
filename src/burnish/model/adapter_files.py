"""Folders of saved adapters: the base that they name, and tensor sizes read from file headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from burnish.config.paths import expanded, is_file, is_folder, is_only_a_path, missing
from burnish.errors import ModelError
from burnish.model.adapter_checks import refuse_outside_weights

__all__ = ["SavedAdapters", "saved_adapters"]

_CONFIG = "adapter_config.json"
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_FLOATS = ("BF16", "F16", "F32", "F64")

_WHOLE = (
    ".token_adapter.base_layer.weight", ".original_module.weight", ".modules_to_save.weight", ".base_layer.weight",
    ".weight",
)  # fmt: skip
"""Suffixes under which peft saves whole weights with the adapters, after the module's name; longer ones first."""

Shapes = dict[str, tuple[int, ...]]


class SavedAdapters:
    """A folder of adapters without their base.

    Attributes:
        folder: folder of the files.
        task_type: peft's task type of the model, or None.
        note: warning about an ambiguous folder, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note: str | None = None
        config = self._read()
        refuse_outside_weights(config.get("peft_type"), self._name)
        self.task_type: str | None = config.get("task_type")
        self._base: Any = config.get("base_model_name_or_path")
        self._shapes: Shapes | None = None

    def _read(self) -> dict[str, Any]:
        try:
            config: Any = json.loads((self.folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{self._name}: its {_CONFIG} cannot be read ({error}). Save it again.") from error
        if not isinstance(config, dict):
            raise ModelError(f"{self._name}: its {_CONFIG} is not a JSON object. Save it again.")
        return cast("dict[str, Any]", config)

    @property
    def _name(self) -> str:
        return f"model = {str(self.folder)!r}"

    @property
    def base(self) -> str:
        """Name or path of the base model.

        A relative path is resolved in the working folder, as peft does, and else in the adapters' folder.

        Raises:
            ModelError: the folder names no base, or one that does not exist.
        """
        fix = (
            "set base_model_name_or_path in adapter_config.json, or load the base yourself, apply the adapters "
            "with peft.PeftModel.from_pretrained(base, folder, is_trainable=True), and pass the model"
        )
        if not self._base:
            raise ModelError(f"{self._name}: adapters that do not name their base model: {fix}.")
        name = str(self._base)
        if os.path.exists(expanded(name)):
            return name
        if os.path.exists(beside := self.folder / name):
            return str(beside.resolve())
        if is_only_a_path(name):
            raise ModelError(f"{self._name}: its base {name!r} does not exist ({missing(name)}): {fix}.")
        return name

    @property
    def is_own_base(self) -> bool:
        """True where the base is the model in the same folder."""
        base = expanded(self.base)
        return is_folder(base) and os.path.samefile(base, self.folder)

    @property
    def shapes(self) -> Shapes:
        """Shapes of the saved tensors by name, without peft's prefix.

        Raises:
            ModelError: the adapter file is missing or unreadable.
        """
        if self._shapes is None:
            file = next((self.folder / name for name in _ADAPTERS if is_file(self.folder / name)), None)
            if file is None:
                raise ModelError(f"{self._name}: {_CONFIG} without {_ADAPTERS[0]}. Save the adapters again.")
            try:
                found = dict(_shapes_in(file))
            except Exception as error:  # a damaged file fails in as many ways as there are parsers
                reason = " ".join(str(error).split())
                raise ModelError(f"{self._name}: {file.name} cannot be read ({reason}). Save it again.") from error
            self._shapes = {name.removeprefix("base_model.model."): shape for name, shape in found.items()}
        return self._shapes

    def whole(self, module: str) -> tuple[int, ...] | None:
        """Return the shape of a module's whole weight, if it is saved with the adapters."""
        return next((self.shapes[module + end] for end in _WHOLE if module + end in self.shapes), None)

    def rows(self, module: str) -> int | None:
        """Return the vocabulary size of an embedding, from its saved weight or else from LoRA on it."""
        if (shape := self.whole(module)) is not None:
            return shape[0]
        embedding = self.shapes.get(f"{module}.lora_embedding_A")
        head = self.shapes.get(f"{module}.lora_B.weight")
        return embedding[1] if embedding is not None else head[0] if head is not None else None

    def check_sizes(self, base: str) -> None:
        """Compare the adapters' sizes with the headers of the base's safetensors files, if any.

        A different number of rows in a whole weight is left to `put_adapters`: embeddings may have been resized.

        Args:
            base: folder of the base; a hub name is not checked.

        Raises:
            ModelError: sizes differ.
        """
        folder = expanded(base)
        known: Shapes = {}
        for file in sorted(folder.glob("*.safetensors")) if is_folder(folder) else ():
            if file.name not in _ADAPTERS:
                known.update(_shapes_in(file))
        for module, (rows, columns) in self._linears():
            theirs = self.whole(module) or known.get(f"{module}.weight")
            # GPT-2's Conv1D layers hold the transposed weight.
            if theirs is not None and len(theirs) == 2 and sorted(theirs) != sorted((rows, columns)):
                raise self._misfit(module, (rows, columns), theirs)
        for name in known:
            ours = self.whole(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if ours is not None and ours[1:] != known[name][1:]:
                raise self._misfit(name, ours, known[name])

    def _linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield modules with LoRA and the (rows, columns) of the weight that it adapts."""
        for names in (("lora_B.weight", "lora_A.weight"), ("lora_embedding_A", "lora_embedding_B")):
            for name, shape in self.shapes.items():
                if not name.endswith(f".{names[0]}"):
                    continue
                module = name.removesuffix(f".{names[0]}")
                other = self.shapes.get(f"{module}.{names[1]}")
                if other is not None and len(shape) == len(other) == 2:
                    yield module, (shape[0], other[1]) if names[0] == "lora_B.weight" else (shape[1], other[0])

    def _misfit(self, name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"{self._name}: {name} is {_by(ours)} in the adapters and {_by(theirs)} in their base {self.base!r}: that "
            "is another model, or its embeddings were resized and not saved with the adapters. Set "
            "base_model_name_or_path in adapter_config.json to the model that they were trained on."
        )


def saved_adapters(name: str | Path) -> SavedAdapters | None:
    """Return the adapters in a folder, or None where it holds a model or is not a folder.

    Adapter weights decide: a config.json beside them is a leftover, and so is an adapter_config.json without them where
    there is a config.json.
    """
    folder = expanded(name)
    if not is_file(folder / _CONFIG):
        return None
    is_model = is_file(folder / "config.json")
    if is_model and not any(is_file(folder / file) for file in _ADAPTERS):
        return None
    found = SavedAdapters(folder)
    whole = next((file for file in _MODELS if is_file(folder / file)), None)
    if is_model and whole is not None and not found.is_own_base:
        found.note = (
            f"model = {str(folder)!r} holds adapters and a whole model ({whole}): the adapters are loaded, on their "
            f"base {found.base!r}. Delete {_CONFIG} to load the model."
        )
    return found


def _shapes_in(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the floating-point tensors in a file without reading values."""
    import torch
    from safetensors import safe_open

    if file.suffix == ".bin":
        tensors: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True)
        yield from ((name, tuple(tensor.shape)) for name, tensor in tensors.items())
        return
    with cast("Any", safe_open)(file, framework="pt") as stream:
        for name in sorted(stream.keys()):
            entry = stream.get_slice(name)
            if entry.get_dtype() in _FLOATS:
                yield name, tuple(entry.get_shape())


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
