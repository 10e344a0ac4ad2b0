"""Fields of dataclasses in packages too heavy to import, read from their source: importing them would load torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError

__all__ = ["FieldInfo", "lora_fields", "training_argument_fields", "words_of"]

# What peft writes down by itself, or what only a Python object can hold.
_LORA_INTERNAL = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "runtime_config"}
)


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One configuration field.

    Attributes:
        name: as written in a file.
        type: its annotation, as source text.
        default: its default value.
        own: whether burnish declares it (also where it only changes an inherited default).
        help: one or two sentences; empty for inherited fields.
    """

    name: str
    type: str
    default: Any
    own: bool
    help: str = ""


@cache
def training_argument_fields() -> dict[str, FieldInfo]:
    """The fields of transformers.TrainingArguments. Loads neither transformers nor torch."""
    return _source_fields("transformers", "training_args.py", "TrainingArguments")


@cache
def lora_fields() -> dict[str, FieldInfo]:
    """The fields of peft.LoraConfig that a file can set. Loads neither peft nor torch."""
    found = _source_fields("peft", "config.py", "PeftConfigMixin")
    found |= _source_fields("peft", "config.py", "PeftConfig")
    found |= _source_fields("peft", "tuners/lora/config.py", "LoraConfig")
    return {name: info for name, info in found.items() if name not in _LORA_INTERNAL}


@cache
def words_of(path: str, class_name: str) -> tuple[str, ...]:
    """The values of one of transformers' enumerations. Loads neither transformers nor torch."""
    node = _source_class("transformers", path, class_name)
    return tuple(
        str(item.value.value)
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    )


def _source_fields(package: str, path: str, class_name: str) -> dict[str, FieldInfo]:
    """Fields that the dataclass declares in the installed package's source, without those it inherits."""
    node = _source_class(package, path, class_name)
    return {info.name: info for info in _class_fields(node)}


def _source_class(package: str, path: str, class_name: str) -> ast.ClassDef:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package} is not installed: `pip install burnish` brings it.")
    source = Path(spec.submodule_search_locations[0], path)
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    raise ConfigError(f"{source} defines no {class_name}: this version of {package} is not supported.")


def _class_fields(node: ast.ClassDef) -> Iterator[FieldInfo]:
    # The last assignment wins: `optim` defaults to a name that newer versions of torch reassign.
    constants = {
        target.id: item.value
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                yield FieldInfo(item.target.id, annotation, _default(item.value, constants), own=False)


def _default(value: ast.expr | None, constants: dict[str, ast.expr]) -> Any:
    """The default in `= value`, `= field(default=value)` or `= field(default_factory=name)`; None where opaque."""
    if isinstance(value, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = keywords.get("default_factory")
        if isinstance(factory, ast.Name):
            return {"list": [], "dict": {}}.get(factory.id)
        value = keywords.get("default")
    if isinstance(value, ast.Name):
        value = constants.get(value.id)
    if value is None:
        return None
    try:
        return ast.literal_eval(value)
    except ValueError:
        return None
