"""Identity of a rubric, so that stored rewards are used only with the rubric that gave them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from burnish.rewards.rubric import Rubric

__all__ = ["rubric_identity"]

_DEPTH = 6


def rubric_identity(rubric: Rubric) -> str:
    """Hash what determines the rewards: names, weights, options, and the source files of user functions.

    Modules that a function imports and services that it calls are not covered.
    """
    criteria = [
        [
            _described(getattr(criterion, field.name))
            for field in dataclasses.fields(criterion)
            if field.name not in ("memoize", "overlap")
        ]
        for criterion in rubric.criteria
    ]
    return hashlib.sha256(json.dumps(criteria, sort_keys=True).encode()).hexdigest()


def _described(value: Any, depth: int = _DEPTH) -> Any:
    """Describe a value as JSON that is the same in every process: objects by their plain attributes, no addresses."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not depth:
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        call = cast("functools.partial[Any]", value)
        return ["partial", *(_described(part, depth - 1) for part in (call.func, call.args, call.keywords))]
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {str(key): _described(item, depth - 1) for key, item in items}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_described(item, depth - 1) for item in cast("Sequence[Any]", value)]
    if inspect.ismethod(value):
        return [value.__func__.__qualname__, _described(value.__self__, depth - 1)]
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [
            _origin(value),
            *(_described(part, depth - 1) for part in (value.__defaults__, value.__kwdefaults__, cells)),
        ]
    if callable(getattr(value, "state_dict", None)):
        # A reward model: the sum and the last element of each tensor.
        tensors = cast("Mapping[str, Any]", cast("Any", value).state_dict()).items()
        return [
            [name, list(tensor.shape), float(tensor.double().sum()), float(tensor.flatten()[-1])]
            for name, tensor in tensors
            if hasattr(tensor, "double") and tensor.numel()
        ]
    held = {name: item for name, item in getattr(value, "__dict__", {}).items() if _is_relevant(item)}
    return [_origin(type(value)), _described(held, depth - 1)]


def _origin(thing: Any) -> list[str]:
    """Return the module and name of a function or class, with a hash of its source file unless it is burnish's."""
    module = str(getattr(thing, "__module__", ""))
    found = [module, str(getattr(thing, "__qualname__", ""))]
    if module.partition(".")[0] in ("burnish", "builtins"):
        return found
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None and Path(file).suffix == ".py" and Path(file).is_file():
        return [*found, hashlib.sha256(Path(file).read_bytes()).hexdigest()]
    code = getattr(thing, "__code__", None)
    return found if code is None else [*found, code.co_code.hex(), repr(code.co_names)]


def _is_relevant(item: Any) -> bool:
    """Return True for attributes that determine behaviour, unlike caches and connections."""
    plain = item is None or isinstance(item, bool | int | float | str | list | tuple | dict)
    return plain or inspect.isfunction(item) or callable(getattr(item, "state_dict", None))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
