"""Read the fields of dataclasses from the source of packages whose import would load torch."""

from __future__ import annotations

import ast
import builtins
import typing
from collections.abc import Collection, Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.config.declare import FieldInfo
from burnish.errors import ConfigError

__all__ = ["Names", "lora_fields", "training_argument_fields", "words_of"]

# Set by peft itself, or only by Python objects.
_LORA_INTERNAL = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "runtime_config"}
)


class _Opaque:
    """Stand-in for a class of another package in annotations, which no value of a file is an instance of."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"not": {}}


class _Namespace(dict[str, Any]):
    """Names used in annotations of other packages."""

    def __missing__(self, name: str) -> Any:
        return getattr(typing, name, None) or getattr(builtins, name, _Opaque)


class Names(Collection[str]):
    """The keys of a table of functions, read from its source because importing it would load torch.

    Args:
        path: path of the module within burnish.
        table: name of the table in the module.
    """

    def __init__(self, path: str, table: str) -> None:
        self._table = (path, table)
        self._added: list[str] = []

    @cached_property
    def _keys(self) -> list[str]:
        path, table = self._table
        for node in _parsed("burnish", path).body:
            match node:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)) if name == table:
                    return [ast.literal_eval(key) for key in keys if key is not None]
                case _:
                    pass
        raise AssertionError(f"{path} defines no table {table}")

    def __contains__(self, name: object) -> bool:
        return name in self._keys or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter((*self._keys, *self._added))

    def __len__(self) -> int:
        return len(self._keys) + len(self._added)

    def add(self, name: str) -> None:
        """Add the name of a user's function that was registered in the table."""
        self._added.append(name)


@cache
def training_argument_fields() -> dict[str, FieldInfo]:
    """Return the fields of transformers.TrainingArguments. Loads neither transformers nor torch."""
    return _source_fields("transformers", "training_args.py", "TrainingArguments")


@cache
def lora_fields() -> dict[str, FieldInfo]:
    """Return the fields of peft.LoraConfig that a file can set. Loads neither peft nor torch."""
    found = _source_fields("peft", "config.py", "PeftConfigMixin")
    found |= _source_fields("peft", "config.py", "PeftConfig")
    found |= _source_fields("peft", "tuners/lora/config.py", "LoraConfig")
    return {name: info for name, info in found.items() if name not in _LORA_INTERNAL}


@cache
def words_of(path: str, class_name: str) -> tuple[str, ...]:
    """Return the values of an enumeration of transformers. Loads neither transformers nor torch."""
    node = _source_class("transformers", path, class_name)
    return tuple(
        str(item.value.value)
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    )


def _source_fields(package: str, path: str, class_name: str) -> dict[str, FieldInfo]:
    """Read the fields that a dataclass of an installed package declares, without inherited ones."""
    node = _source_class(package, path, class_name)
    # The last assignment wins: `optim` defaults to a name that newer versions of torch reassign.
    constants = {
        target.id: item.value
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    found: dict[str, FieldInfo] = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                hint = eval(annotation, {"__builtins__": {}}, _Namespace())
                found[item.target.id] = FieldInfo(item.target.id, hint, _default(item.value, constants))
    return found


def _parsed(package: str, path: str) -> ast.Module:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package} is not installed: run `pip install burnish`, which installs it.")
    return ast.parse(Path(spec.submodule_search_locations[0], path).read_text(encoding="utf-8"))


def _source_class(package: str, path: str, class_name: str) -> ast.ClassDef:
    for node in _parsed(package, path).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    raise ConfigError(
        f"{package}/{path} does not define {class_name}: this version of {package} is not supported; install the "
        "version in burnish's constraints."
    )


def _default(value: ast.expr | None, constants: dict[str, ast.expr]) -> Any:
    """Evaluate the default in `= value`, `= field(default=value)` or `= field(default_factory=name)`, else None."""
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
