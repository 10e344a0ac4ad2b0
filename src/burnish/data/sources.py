"""Row sources: files, saved data sets, procedural tasks, and mixes of them."""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from string import Formatter
from typing import Any, TypeAlias, cast

from burnish.config.paths import path_problem
from burnish.config.predicates import is_seed, is_text
from burnish.data.columns import meant_columns, rename_line, rename_tip
from burnish.data.files import read_rows
from burnish.data.formats import messages_of, with_system
from burnish.data.instructions import instruction_row
from burnish.data.verifiers_rows import verifiers_rows
from burnish.errors import ConfigError, DataError, show

__all__ = ["SOURCE_KEYS", "as_rows", "as_source", "check_source", "finite_rows", "load_rows"]

Row: TypeAlias = dict[str, Any]

_COMMON = frozenset({"columns", "completion_template", "environment", "limit", "prompt_template", "system_prompt"})
SOURCE_KEYS = {
    "path": frozenset({"name", "path", "revision", "split"}) | _COMMON,
    "source": frozenset({"env_id", "options", "seed", "size", "source", "split", "task"}) | _COMMON,
    "mix": frozenset({"mix"}) | _COMMON,
}
"""Keys of a source, by the key that determines its kind."""

_GENERATORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "environment": (("size",), ()),
    "reasoning_gym": (("task", "size"), ("seed", "options")),
    "verifiers": (("env_id",), ("options", "split")),
}
"""Generator of rows -> the keys that it needs, and others that it takes."""

_MOST_TASKS = 10_000_000
_PLACEHOLDER = re.compile(r"[^\W\d]\w*(\[\w+\])*")
_FORMAT = re.compile(r"[^{}]?[<>=^]?[-+ ]?#?\d{0,3},?(\.\d{1,2})?[a-zA-Z%]?")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "columns": Mapping,
    "completion_template": str,
    "env_id": str,
    "environment": str,
    "limit": int,
    "mix": Sequence,
    "name": str,
    "options": Mapping,
    "path": (str, Path),
    "prompt_template": str,
    "revision": str,
    "seed": int,
    "size": int,
    "source": str,
    "split": str,
    "system_prompt": str,
    "task": str,
}


def as_source(value: Any) -> Any:
    """Convert a path to a source table; return other values unchanged."""
    return {"path": value} if isinstance(value, str | Path) else value


def check_source(spec: Mapping[str, Any] | str | Path, field: str = "data") -> None:
    """Check a source's keys and values without loading anything.

    Args:
        spec: a path, `{path, split, name, revision}`, `{source = "reasoning_gym", task, size, seed, options}`,
            `{source = "environment", size}` (empty prompts, for an environment that writes its own),
            `{source = "verifiers", env_id, options, split}` (those of an environment of verifiers) or
            `{mix = [spec, ...]}`; each table may have `columns` (old name -> new name), `environment` (name of the
            `[[environment]]` of its rows), `limit`, `system_prompt`, `prompt_template` (with the placeholder
            `{prompt}`) and `completion_template`, which makes demonstrations: its placeholders are columns of the row,
            or of a task entry's metadata (`"<think>{expression}</think><answer>{answer}</answer>"`).
        field: name of the source in messages.

    Raises:
        ConfigError: an unknown, missing or ill-typed key.
    """
    spec = cast("Mapping[str, Any]", as_source(spec))
    kinds = [key for key in ("path", "source", "mix") if key in spec]
    if len(kinds) != 1:
        raise ConfigError(
            f"{field} has the keys {sorted(spec)}: give exactly one of path (a file), source (a generator) and mix."
        )
    kind = kinds[0]
    known = SOURCE_KEYS[kind]
    unknown = sorted(set(spec) - known)
    if unknown:
        raise ConfigError(f"{field}.{unknown[0]} is unknown: a source with {kind} takes {', '.join(sorted(known))}.")
    for key, value in spec.items():
        expected = _TYPES[key]
        if not isinstance(value, expected) or isinstance(value, bool) or (key == "mix" and isinstance(value, str)):
            names = expected if isinstance(expected, tuple) else (expected,)
            raise ConfigError(f"{field}.{key} = {show(value)}: use a {' or '.join(t.__name__ for t in names)}.")
    _check_values(spec, kind, field)
    for i, part in enumerate(spec.get("mix", ())):
        if not isinstance(part, Mapping | str):
            raise ConfigError(f"{field}.mix[{i}] = {show(part)}: use a source, such as {{path = 'train.jsonl'}}.")
        check_source(cast("Mapping[str, Any] | str", part), f"{field}.mix[{i}]")


def _check_values(spec: Mapping[str, Any], kind: str, field: str) -> None:
    for key in ("size", "limit"):
        if key in spec and not 1 <= spec[key] < 2**63:
            raise ConfigError(f"{field}.{key} = {show(spec[key])}: use a positive number of rows.")
    if spec.get("size", 1) > _MOST_TASKS:
        raise ConfigError(f"{field}.size = {spec['size']}: tasks are made in memory; use at most {_MOST_TASKS:,}.")
    for key in ("name", "path", "revision", "split", "task"):
        if key in spec and (problem := path_problem(str(spec[key]))) is not None:
            raise ConfigError(f"{field}.{key} = {show(spec[key])}: {problem}.")
    if kind == "source":
        source = spec["source"]
        if source not in _GENERATORS:
            raise ConfigError(
                f"{field}.source = {source!r}: use 'reasoning_gym', 'verifiers' for such an environment's rows, or "
                "'environment' for one that writes its own prompts; for files give path."
            )
        needed, optional = _GENERATORS[source]
        for key in needed:
            if key not in spec:
                raise ConfigError(f"{field}.{key} is missing: a source {source} needs {' and '.join(needed)}.")
        for key in sorted(SOURCE_KEYS["source"] - _COMMON - {"source", *needed, *optional}):
            if key in spec:
                raise ConfigError(f"{field}.{key} = {show(spec[key])}: a source {source} does not use it; remove it.")
        if source == "verifiers" and spec.get("split", "train") not in ("train", "eval"):
            raise ConfigError(f"{field}.split = {show(spec['split'])}: use 'train' or 'eval'.")
        if not is_seed(spec.get("seed", 0)):
            raise ConfigError(f"{field}.seed = {show(spec['seed'])}: use an integer of at least 0, below 2^32.")
    if kind == "mix" and not spec["mix"]:
        raise ConfigError(f"{field}.mix is empty: list at least one source.")
    if columns := cast("Mapping[Any, Any]", spec.get("columns", {})):
        shown = f"{field}.columns = {show(dict(columns))}"
        if not all(is_text(name) for pair in columns.items() for name in pair):
            raise ConfigError(f"{shown}: use names, such as {{question = 'prompt'}}.")
        if len(set(columns.values())) < len(columns):
            raise ConfigError(f"{shown}: two columns get one name; give each a different one.")
    if (template := spec.get("prompt_template")) is not None:
        names = _check_template(template, f"{field}.prompt_template")
        if set(names) != {"prompt"}:
            raise ConfigError(
                f"{field}.prompt_template = {show(template)} has the placeholders {sorted(set(names))}: use "
                "{prompt} and nothing else; write literal braces as {{ and }}."
            )
        try:
            template.format(prompt="text")
        except ValueError as error:
            raise ConfigError(f"{field}.prompt_template = {show(template)}: {error}; a prompt is text.") from error
    if (template := spec.get("completion_template")) is not None:
        _check_template(template, f"{field}.completion_template")


def _check_template(template: str, field: str) -> list[str]:
    """Check a template and return the names of its placeholders; each may have a conversion and a short format."""
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"{field} = {show(template)}: {error}; write literal braces as {{{{ and }}}}.") from error
    for name, spec, conversion in fields:
        # `{0}` and `{}` are positional, `{x.y}` reads attributes of Python objects, and a wide pad would fill memory.
        known = _PLACEHOLDER.fullmatch(str(name)) and _FORMAT.fullmatch(spec or "")
        if not known or conversion not in (None, "s", "r", "a"):
            raise ConfigError(
                f"{field} = {show(template)}: the placeholder {{{name}}} is not the name of a column, with at most a "
                "short format such as {value:.2f}; write literal braces as {{ and }}."
            )
    return [str(name) for name, _, _ in fields]


def load_rows(spec: Mapping[str, Any] | str | Path, field: str = "data") -> list[Row]:
    """Load the rows of a source.

    Args:
        spec: see `check_source`. A path is a .jsonl, .json, .csv, .tsv or .parquet file, a glob of them, a folder that
            `datasets` saved or can load, or the name of a data set on the hub. A task row has `prompt` (one user
            message), `answer`, `gym_task` and `gym_entry` (the whole entry as JSON, for the verifier).
        field: name of the source in messages.

    Raises:
        ConfigError: a bad spec, a missing file, an unknown task or task option.
        DataError: a file that cannot be parsed, or without rows.
    """
    check_source(spec, field)
    spec = cast("Mapping[str, Any]", as_source(spec))
    if "mix" in spec:
        rows = [row for i, part in enumerate(spec["mix"]) for row in load_rows(part, f"{field}.mix[{i}]")]
    elif spec.get("source") == "environment":
        rows = [{"prompt": [{"role": "user", "content": ""}]} for _ in range(spec["size"])]
    elif spec.get("source") == "verifiers":
        rows = verifiers_rows(spec, field)
    elif "source" in spec:
        rows = _gym_rows(spec, field)
    else:
        rows = read_rows(spec, field)
    rows = rows[: spec.get("limit")]
    if not rows:
        raise DataError(f"{field}: {show(dict(spec))} has no rows: check the file, its header, and split.")
    return [_shaped(row, spec, field, index) for index, row in enumerate(rows)]


def _shaped(row: Row, spec: Mapping[str, Any], field: str, index: int) -> Row:
    """Rename the columns of a row and apply its completion template, prompt template and system prompt."""
    for old, new in spec.get("columns", {}).items():
        if old not in row:
            close = difflib.get_close_matches(old, map(str, row), n=1)
            fix = f"; write {rename_line({close[0]: new})}" if close else ""
            raise DataError(f"{field}.columns: row {index} has no column {old!r}; it has {sorted(row)}{fix}.")
        if row.get(new) is not None and new != old:
            raise DataError(f"{field}.columns: row {index} already has a column {new!r}; rename that one too.")
        row = {(new if name == old else name): value for name, value in row.items() if name == old or name != new}
    if "environment" in spec:
        if row.get("environment", spec["environment"]) != spec["environment"]:
            raise DataError(f"{field}.environment: row {index} already has a column environment; remove one of them.")
        row = {**row, "environment": spec["environment"]}
    if "completion_template" in spec:
        row = _with_completion(row, spec["completion_template"], field, index)
    template, system = spec.get("prompt_template"), spec.get("system_prompt")
    if template is None and system is None:
        return row
    row = dict(instruction_row(row, index, as_messages=False))
    if row.get("prompt") is None:
        names = meant_columns(row, [("prompt",)])
        fix = f": {rename_tip(names)}" if names else ""
        raise DataError(
            f"{field}: row {index} has no prompt for prompt_template or system_prompt; it has {sorted(row)}{fix}."
        )
    prompt: Any = row["prompt"]
    if template is not None and isinstance(prompt, str):
        prompt = template.format(prompt=prompt)
    elif template is not None:
        prompt = messages_of(prompt)
        users = [i for i, m in enumerate(prompt) if m["role"] == "user" and isinstance(m.get("content"), str)]
        if not users:
            raise DataError(f"{field}: row {index} has no user message with text for prompt_template.")
        last = prompt[users[-1]]
        prompt[users[-1]] = {**last, "content": template.format(prompt=last["content"])}
    if system is not None:
        prompt = with_system(prompt, system, f"{field}: row {index}")
        # The prompt is a conversation now, so plain completions become assistant messages.
        plain = [name for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), str)]
        row = {**row, **{name: [{"role": "assistant", "content": row[name]}] for name in plain}}
    return {**row, "prompt": prompt}


def _with_completion(row: Row, template: str, field: str, index: int) -> Row:
    """Add a completion made from the columns of a row and the metadata of its task entry."""
    if "completion" in row:
        raise DataError(f"{field}.completion_template: row {index} already has a completion; remove the template.")
    metadata = json.loads(row["gym_entry"])["metadata"] if "gym_entry" in row else {}
    values = {**metadata, **row}
    try:
        text = template.format_map(values)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{field}.completion_template = {template!r}: {error!r} for row {index}; use placeholders out of "
            f"{sorted(values)}."
        ) from error
    plain = isinstance(row.get("prompt"), str)
    return {**row, "completion": text if plain else [{"role": "assistant", "content": text}]}


def _gym_rows(spec: Mapping[str, Any], field: str) -> list[Row]:
    try:
        # The first import compiles its dependencies, with syntax warnings that users can do nothing about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym
    except ImportError as error:
        raise ConfigError(f"{field}.source = 'reasoning_gym' needs the package: pip install reasoning-gym.") from error
    task, options = spec["task"], dict(spec.get("options", {}))
    try:
        entries: Any = cast("Any", reasoning_gym).create_dataset(
            task, size=spec["size"], seed=spec.get("seed", 0), **options
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{field}: reasoning_gym refuses task = {task!r}, options = {options!r}: {error}.") from error
    return [
        {
            "prompt": [{"role": "user", "content": entry["question"]}],
            "answer": str(entry["answer"]),
            "gym_task": task,
            "gym_entry": json.dumps(entry, default=str),
        }
        for entry in entries
    ]


def as_rows(data: Any, field: str = "data") -> Iterable[Mapping[str, Any]]:
    """Return the rows of a trainer argument: a list, a `datasets` data set (map or iterable), or a source.

    Args:
        data: data sets and lists are returned unchanged; a path or a mapping is loaded as a source.
        field: name of the argument in messages.

    Raises:
        ConfigError: none of these, or a dict of splits.
    """
    data = as_source(data)
    if isinstance(data, Mapping):
        values = list(cast("Mapping[Any, Any]", data).values())
        if values and all(hasattr(value, "column_names") for value in values):
            raise ConfigError(f"{field} is a dict of splits {sorted(map(str, data))}: pass one, such as data['train'].")
        if not {"mix", "path", "source"} & set(map(str, data)) and any(isinstance(value, list) for value in values):
            raise ConfigError(
                f"{field} holds columns {sorted(map(str, data))}: use rows, or datasets.Dataset.from_dict(...) of them."
            )
        return load_rows(cast("Mapping[str, Any]", data), field)
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise ConfigError(f"{field} = {show(data)}: use a list of rows, a data set, or a path such as 'train.jsonl'.")
    return cast("Iterable[Mapping[str, Any]]", data)


def finite_rows(data: Any, field: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows of a trainer argument that must have a length; see `as_rows`.

    Raises:
        ConfigError: also rows without a length, which may never end.
    """
    rows = as_rows(data, field)
    if not isinstance(rows, Sized):
        raise ConfigError(
            f"{field} = {type(rows).__name__} has no length, and reading it whole may never end: pass a list, "
            "such as list(itertools.islice(rows, 1000)). Only SFTTrainer streams its train_dataset."
        )
    return rows
