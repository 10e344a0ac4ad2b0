"""Measures of the shape of src/burnish, as DESIGN asks for them: `python scripts/measures.py`.

The test suite runs `measures` and holds each number to a limit, which only ever goes down.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent.parent / "src" / "burnish"

PUBLIC = ("DPO", "GRPO", "KTO", "OnlineDPO", "PPO", "RLOO", "Reward", "SFT")
"""Public trainers, without the ending."""


def files() -> dict[Path, ast.Module]:
    """The sources, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCES.rglob("*.py"))}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and inner ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def classes_between() -> int:
    """Most classes of ours, other public trainers aside, between a public trainer and `transformers.Trainer`."""
    import burnish

    public = {getattr(burnish, f"{name}Trainer") for name in PUBLIC}
    return max(sum(c.__module__.startswith("burnish.") and c not in public for c in t.__mro__) for t in public)


def overridden_methods() -> list[str]:
    """Methods of `transformers.Trainer` that a class of ours overrides, each once."""
    import transformers

    import burnish

    theirs = {name for name, _ in inspect.getmembers(transformers.Trainer, inspect.isfunction)}
    ours = {c for name in PUBLIC for c in getattr(burnish, f"{name}Trainer").__mro__ if c.__module__[:8] == "burnish."}
    return sorted({name for c in ours for name in vars(c) if name in theirs} - {"__init__"})


def keyed_by_identity(trees: dict[Path, ast.Module]) -> list[str]:
    """Places where `id(...)` is a key of a dictionary: values that travel beside the object that they belong to."""
    found: list[str] = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            keys: list[ast.expr | None] = []
            match node:
                case ast.DictComp(key=key):
                    keys = [key]
                case ast.Dict(keys=own):
                    keys = own
                case ast.Subscript(slice=place):
                    keys = [place]
                case _:
                    pass
            found += [f"{path.relative_to(SOURCES)}:{key.lineno}" for key in keys if key is not None and _is_id(key)]
    return found


def _is_id(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "id"


def helpers_used_once(trees: dict[Path, ast.Module]) -> int:
    """Private functions of modules that one place calls."""
    count = 0
    for tree in trees.values():
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")}
        uses = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names)
        count += sum(uses[name] == 1 for name in names)
    return count


def fields_declared_twice(trees: dict[Path, ast.Module]) -> list[str]:
    """Fields of ours whose name and default stand in two places: declared by `own`, and again in another class."""
    rooms = [tree for path, tree in trees.items() if path.parts[-2] in ("config", "trainers", "cli")]
    fields = [
        (node.name, field.target.id, _is_declaration(field))
        for tree in rooms
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None
    ]
    declared = {name for _, name, is_declaration in fields if is_declaration}
    assert declared, "the fields have moved: say how they are declared now"
    return [f"{where}: {name}" for where, name, is_declaration in fields if name in declared and not is_declaration]


def _is_declaration(field: ast.AnnAssign) -> bool:
    return isinstance(field.value, ast.Call) and isinstance(field.value.func, ast.Name) and field.value.func.id == "own"


def measures() -> dict[str, Any]:
    """Every measure by name; a list where its members say where to look."""
    trees = files()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in trees}
    total = sum(lines.values())
    assert any(path.parent.name == "config" for path in lines), "the configuration has moved: say where it is now"
    configuration = sum(count for path, count in lines.items() if path.parent.name == "config")
    return {
        "lines": total,
        "lines of configuration": configuration,
        "files over 500 lines": [str(path.relative_to(SOURCES)) for path, count in lines.items() if count > 500],
        "functions over 60 lines": [
            f"{path.relative_to(SOURCES)}: {node.name}"
            for path, tree in trees.items()
            for node in functions(tree)
            if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > 60
        ],
        "private helpers used once, per 1,000 lines": round(1000 * helpers_used_once(trees) / total, 1),
        "classes between Trainer and a public trainer": classes_between(),
        "methods of Trainer overridden": overridden_methods(),
        "dictionaries keyed by id()": keyed_by_identity(trees),
        "setattr by name": [
            f"{path.relative_to(SOURCES)}:{number}"
            for path in trees
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if re.search(r"\bsetattr\(", line)
        ],
        "fields declared twice": fields_declared_twice(trees),
    }


def main() -> None:
    """Print every measure, and where it comes from."""
    for name, value in measures().items():
        if isinstance(value, list):
            places: list[str] = value
            print(f"{name}: {len(places)}{''.join(f'{chr(10)}    {place}' for place in places)}")
        else:
            print(f"{name}: {value:,}")


if __name__ == "__main__":
    main()
