"""Where rows come from: files, saved data sets, procedural tasks, mixes of them; and keeping evaluation held out."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, TypeAlias, cast

from burnish.data.formats import messages_of
from burnish.errors import ConfigError, DataError, show
from burnish.schema.paths import is_file, is_folder, path_problem
from burnish.schema.predicates import is_seed, is_text

__all__ = ["DisjointCounts", "as_rows", "check_source", "disjoint", "finite_rows", "load_rows"]

Row: TypeAlias = dict[str, Any]

_COMMON = frozenset({"columns", "completion_template", "limit", "prompt_template", "system_prompt"})
_FILE_KEYS = frozenset({"path", "split"}) | _COMMON
_GYM_KEYS = frozenset({"options", "seed", "size", "source", "task"}) | _COMMON
_MIX_KEYS = frozenset({"mix"}) | _COMMON
_MOST_TASKS = 10_000_000
_PLACE = re.compile(r"[^\W\d]\w*(\[\w+\])*")
_FORMAT = re.compile(r"[^{}]?[<>=^]?[-+ ]?#?\d{0,3},?(\.\d{1,2})?[a-zA-Z%]?")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "columns": Mapping,
    "completion_template": str,
    "limit": int,
    "mix": Sequence,
    "options": Mapping,
    "path": (str, Path),
    "prompt_template": str,
    "seed": int,
    "size": int,
    "source": str,
    "split": str,
    "system_prompt": str,
    "task": str,
}


def check_source(spec: Mapping[str, Any], field: str = "data") -> None:
    """Check a source's keys and values without loading anything.

    Args:
        spec: `{path, split}`, `{source = "reasoning_gym", task, size, seed, options}` or `{mix = [spec, ...]}`; each
            may have `columns` (old name -> new name), `limit`, `system_prompt`, `prompt_template` (`{prompt}` is the
            place of the prompt) and `completion_template`, which makes demonstrations: its places are columns of the
            row, or of a task entry's metadata (`"<think>{expression}</think><answer>{answer}</answer>"`).
        field: what to call it in messages.

    Raises:
        ConfigError: an unknown, missing or ill-typed key.
    """
    kinds = [key for key in ("path", "source", "mix") if key in spec]
    if len(kinds) != 1:
        raise ConfigError(
            f"{field} has the keys {sorted(spec)}: give exactly one of path (a file), source (a generator) and mix."
        )
    kind = kinds[0]
    known = {"path": _FILE_KEYS, "source": _GYM_KEYS, "mix": _MIX_KEYS}[kind]
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
        if not isinstance(part, Mapping):
            raise ConfigError(f"{field}.mix[{i}] = {show(part)}: use a source, such as {{path = 'train.jsonl'}}.")
        check_source(cast("Mapping[str, Any]", part), f"{field}.mix[{i}]")


def _check_values(spec: Mapping[str, Any], kind: str, field: str) -> None:
    for key in ("size", "limit"):
        if key in spec and not 1 <= spec[key] < 2**63:
            raise ConfigError(f"{field}.{key} = {show(spec[key])}: use a positive number of rows.")
    if spec.get("size", 1) > _MOST_TASKS:
        raise ConfigError(f"{field}.size = {spec['size']}: tasks are made in memory; use at most {_MOST_TASKS:,}.")
    for key in ("path", "split", "task"):
        if key in spec and (problem := path_problem(str(spec[key]))) is not None:
            raise ConfigError(f"{field}.{key} = {show(spec[key])}: {problem}.")
    if kind == "source" and spec["source"] != "reasoning_gym":
        raise ConfigError(f"{field}.source = {spec['source']!r}: use 'reasoning_gym'; for files give path.")
    if kind == "source":
        for key in ("task", "size"):
            if key not in spec:
                raise ConfigError(f"{field}.{key} is missing: a reasoning_gym source needs task and size.")
        if not is_seed(spec.get("seed", 0)):
            raise ConfigError(f"{field}.seed = {show(spec['seed'])}: use an integer of at least 0, below 2^32.")
    if kind == "mix" and not spec["mix"]:
        raise ConfigError(f"{field}.mix is empty: list at least one source.")
    _check_columns(spec.get("columns", {}), f"{field}.columns")
    if (template := spec.get("prompt_template")) is not None:
        places = _check_template(template, f"{field}.prompt_template")
        if set(places) != {"prompt"}:
            raise ConfigError(
                f"{field}.prompt_template = {show(template)} has the places {sorted(set(places))}: it needs {{prompt}} "
                "and nothing else; write literal braces as {{ and }}."
            )
        try:
            template.format(prompt="text")
        except ValueError as error:
            raise ConfigError(f"{field}.prompt_template = {show(template)}: {error}; a prompt is text.") from error
    if (template := spec.get("completion_template")) is not None:
        _check_template(template, f"{field}.completion_template")


def _check_columns(columns: Mapping[Any, Any], field: str) -> None:
    for old, new in columns.items():
        if not is_text(old) or not is_text(new):
            raise ConfigError(f"{field} = {show(dict(columns))}: use names, such as {{question = 'prompt'}}.")
    if len(set(columns.values())) < len(columns):
        raise ConfigError(f"{field} = {show(dict(columns))}: two columns become one; give each a name of its own.")


def _check_template(template: str, field: str) -> list[str]:
    """The places of a template: names, with a conversion or a short format where a value needs one."""
    try:
        places = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"{field} = {show(template)}: {error}; write literal braces as {{{{ and }}}}.") from error
    for name, spec, conversion in places:
        # `{0}` and `{}` count arguments, of which there are none; `{x.y}` reaches into Python, a wide pad fills memory.
        known = _PLACE.fullmatch(str(name)) and _FORMAT.fullmatch(spec or "")
        if not known or conversion not in (None, "s", "r", "a"):
            raise ConfigError(
                f"{field} = {show(template)}: the place {{{name}}} is not the name of a column, with a short format at "
                "most, such as {value:.2f}; write literal braces as {{ and }}."
            )
    return [str(name) for name, _, _ in places]


def load_rows(spec: Mapping[str, Any], field: str = "data") -> list[Row]:
    """Rows of a source.

    Args:
        spec: see `check_source`. A path is a .jsonl, .json, .csv or .parquet file, a glob of them, or a directory
            written by `datasets`' `save_to_disk`. A task row has `prompt` (one user message), `answer`, `gym_task` and
            `gym_entry` (the whole entry as JSON, for the verifier).
        field: what to call it in messages.

    Raises:
        ConfigError: a bad spec, a missing file, an unknown task or task option.
        DataError: a file that cannot be parsed, or without rows.
    """
    check_source(spec, field)
    if "mix" in spec:
        rows = [row for i, part in enumerate(spec["mix"]) for row in load_rows(part, f"{field}.mix[{i}]")]
    elif "source" in spec:
        rows = _gym_rows(spec, field)
    else:
        rows = _path_rows(str(spec["path"]), spec.get("split"), field)
    rows = rows[: spec.get("limit")]
    if not rows:
        raise DataError(f"{field}: {show(dict(spec))} has no rows.")
    return [_shaped(row, spec, field, index) for index, row in enumerate(rows)]


def _shaped(row: Row, spec: Mapping[str, Any], field: str, index: int) -> Row:
    """A row with its columns renamed, its prompt put in the template and the system prompt in front."""
    for old, new in spec.get("columns", {}).items():
        if old not in row:
            raise DataError(f"{field}.columns: row {index} has no column {old!r}; it has {sorted(row)}.")
        if new in row and new != old:
            raise DataError(f"{field}.columns: row {index} already has a column {new!r}; rename that one too.")
        row = {(new if name == old else name): value for name, value in row.items()}
    if "completion_template" in spec:
        row = _with_completion(row, spec["completion_template"], field, index)
    template, system = spec.get("prompt_template"), spec.get("system_prompt")
    if template is None and system is None:
        return row
    if row.get("prompt") is None:
        raise DataError(
            f"{field}: row {index} has no prompt for prompt_template or system_prompt; it has {sorted(row)}."
        )
    prompt: Any = row["prompt"]
    if template is not None:
        prompt = _filled(prompt, template, field, index)
    if system is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else messages_of(prompt)
        if messages[0]["role"] == "system":
            raise DataError(f"{field}: row {index} has a system message and system_prompt is set too: unset one.")
        row = _as_chat(row)
        prompt = [{"role": "system", "content": system}, *messages]
    return {**row, "prompt": prompt}


def _with_completion(row: Row, template: str, field: str, index: int) -> Row:
    """A row with a demonstration made from its columns and its task entry's metadata."""
    if "completion" in row:
        raise DataError(f"{field}.completion_template: row {index} already has a completion; remove the template.")
    metadata = json.loads(row["gym_entry"])["metadata"] if "gym_entry" in row else {}
    values = {**metadata, **row}
    try:
        text = template.format_map(values)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{field}.completion_template = {template!r}: {error!r} for row {index}; its places are {sorted(values)}."
        ) from error
    plain = isinstance(row.get("prompt"), str)
    return {**row, "completion": text if plain else [{"role": "assistant", "content": text}]}


def _as_chat(row: Row) -> Row:
    """A system prompt makes a row conversational: its plain completions become assistant messages."""
    names = [name for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), str)]
    return {**row, **{name: [{"role": "assistant", "content": row[name]}] for name in names}}


def _filled(prompt: Any, template: str, field: str, index: int) -> Any:
    if isinstance(prompt, str):
        return template.format(prompt=prompt)
    messages = messages_of(prompt)
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and isinstance(m.get("content"), str)]
    if not users:
        raise DataError(f"{field}: row {index} has no user message with text for prompt_template.")
    last = messages[users[-1]]
    messages[users[-1]] = {**last, "content": template.format(prompt=last["content"])}
    return messages


def _path_rows(path: str, split: str | None, field: str) -> list[Row]:
    if is_folder(path):
        return _saved_rows(path, split, field)
    if split is not None:
        raise ConfigError(f"{field}.split = {split!r}: only a directory saved by datasets has splits, not {path!r}.")
    files = sorted(glob.glob(path, recursive=True)) if not is_file(path) else [path]
    if not files:
        raise ConfigError(f"{field}.path = {path!r}: no such file; check it, or give a glob that matches.")
    rows: list[Row] = []
    for name in files:
        reader = _READERS.get(Path(name).suffix)
        if reader is None:
            raise ConfigError(f"{field}.path = {name!r}: use one of {', '.join(sorted(_READERS))}.")
        try:
            rows += reader(Path(name))
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror or error}): check its permissions.") from error
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_object(_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    value = _json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: the file holds a {type(value).__name__}: use a list of objects, or .jsonl.")
    return [_object(item, f"{path}[{i}]") for i, item in enumerate(cast("list[Any]", value))]


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, place))
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be a row: flatten it.") from error
    except ValueError as error:  # also integers of 5,000 digits
        raise DataError(f"{place} is not JSON: {error}.") from error


def _unique(pairs: list[tuple[str, Any]], place: str) -> Row:
    """An object; json would keep the last of two equal keys in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise DataError(f"{place} has the key {_repeated([key for key, _ in pairs])!r} twice: rename or remove one.")
    return made


def _repeated(names: Sequence[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])


def _object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place} is a {type(value).__name__}: each row must be an object.")
    return cast("Row", value)


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, rows = csv.DictReader(file, strict=True), list[Row]()
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names):
                raise DataError(f"{path} has the column {_repeated(names)!r} twice: rename or remove one.")
            for number, row in enumerate(reader, start=2):
                if None in row or None in row.values():
                    raise DataError(f"{path}: row {number} has more or fewer cells than the header.")
                rows.append(dict(row))
        except csv.Error as error:
            raise DataError(f"{path} is not CSV: {error} (line {reader.line_num}).") from error
        return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as parquet

    try:
        table: Any = cast("Any", parquet).read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not Parquet: {error}.") from error
    names: list[str] = table.column_names
    if len(set(names)) < len(names):
        raise DataError(f"{path} has the column {_repeated(names)!r} twice: rename or remove one.")
    return cast("list[Row]", table.to_pylist())


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _saved_rows(path: str, split: str | None, field: str) -> list[Row]:
    import datasets

    try:
        saved: Any = cast("Any", datasets).load_from_disk(path)
    except Exception as error:  # whatever pyarrow and json say of files that are missing, cut or of another format
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{field}.path = {path!r} is a directory, but not one saved whole by datasets ({reason}): give a file or a "
            "glob, or save it again."
        ) from error
    if isinstance(saved, Mapping):
        splits = sorted(cast("Mapping[str, Any]", saved))
        if split not in splits:
            raise ConfigError(f"{field}.split = {split!r}: the data set has the splits {', '.join(splits)}.")
        saved = saved[split]
    elif split is not None:
        raise ConfigError(f"{field}.split = {split!r}: the saved data set has no splits; drop split.")
    return [dict(row) for row in saved]


def _gym_rows(spec: Mapping[str, Any], field: str) -> list[Row]:
    try:
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
    """Rows of whatever a trainer was given: a list, a `datasets` data set (map or iterable), or a source spec.

    Args:
        data: data sets and lists are returned unchanged; a mapping is loaded as a spec.
        field: what to call it in messages.

    Raises:
        ConfigError: none of these, or a set of splits.
    """
    if isinstance(data, Mapping):
        values = list(cast("Mapping[Any, Any]", data).values())
        if values and all(hasattr(value, "column_names") for value in values):
            raise ConfigError(f"{field} is a set of splits {sorted(map(str, data))}: pass one, such as data['train'].")
        if not {"mix", "path", "source"} & set(map(str, data)) and any(isinstance(value, list) for value in values):
            raise ConfigError(
                f"{field} holds columns {sorted(map(str, data))}: use rows, or datasets.Dataset.from_dict(...) of them."
            )
        return load_rows(cast("Mapping[str, Any]", data), field)
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError(
            f"{field} = {show(data)}: use a list of rows, a data set, or a source such as {{path = ...}}."
        )
    return cast("Iterable[Mapping[str, Any]]", data)


def finite_rows(data: Any, field: str) -> Iterable[Mapping[str, Any]]:
    """As `as_rows`, for rows that are read whole before anything starts.

    Raises:
        ConfigError: also rows without a length, which may never end.
    """
    rows = as_rows(data, field)
    if not isinstance(rows, Sized):
        raise ConfigError(
            f"{field} = {type(rows).__name__} has no length and is read whole here, which may never end: pass a list, "
            "such as list(itertools.islice(rows, 1000)). SFTTrainer alone reads train_dataset as it comes."
        )
    return rows


@dataclass(frozen=True, slots=True)
class DisjointCounts:
    """What `disjoint` did: rows kept, rows dropped because evaluation has them, and repeats dropped."""

    num_kept: int
    num_in_evaluation: int
    num_repeated: int


def disjoint(
    train: Iterable[Mapping[str, Any]], evaluation: Iterable[Mapping[str, Any]], *, keep_repeats: bool = False
) -> tuple[list[Row], DisjointCounts]:
    """Training rows whose prompt is not among the evaluation rows, each prompt once.

    Prompts are compared without system messages and with runs of white space made one space, so that the same problem
    under another system prompt counts as the same.

    Args:
        train: rows to choose from; their order is kept.
        evaluation: rows to hold out.
        keep_repeats: keep training rows that repeat an earlier one. Procedural tasks repeat their easy problems most,
            so dropping repeats makes the training set harder than the evaluation set.

    Raises:
        DataError: a row without a prompt, or nothing left to train on.
    """
    held = {_prompt_key(row, i) for i, row in enumerate(evaluation)}
    seen: set[tuple[tuple[str, str], ...]] = set()
    kept: list[Row] = []
    num_held = num_repeated = 0
    for index, row in enumerate(train):
        key = _prompt_key(row, index)
        if key in held:
            num_held += 1
        elif key in seen and not keep_repeats:
            num_repeated += 1
        else:
            seen.add(key)
            kept.append(dict(row))
    if not kept:
        raise DataError("every training prompt is also an evaluation prompt: use another seed, or more training rows.")
    return kept, DisjointCounts(len(kept), num_held, num_repeated)


_ASKING = ("prompt", "messages", "conversations", "text")


def _prompt_key(row: Mapping[str, Any], index: int) -> tuple[tuple[str, str], ...]:
    """What a row asks: its prompt, else the messages before the first answer, else the text."""
    value: Any = next((row[name] for name in _ASKING if row.get(name) is not None), None)
    if value is None:
        raise DataError(f"row {index} has the columns {sorted(row)}: comparing prompts needs {' or '.join(_ASKING)}.")
    if isinstance(value, str):
        return (("user", _squeezed(value)),)
    key: list[tuple[str, str]] = []
    for message in messages_of(value):
        if message["role"] == "assistant" and row.get("prompt") is None:
            break
        if message["role"] != "system":
            key.append((message["role"], _squeezed(message.get("content"))))
    return tuple(key)


def _squeezed(content: Any) -> str:
    return " ".join((content if isinstance(content, str) else json.dumps(content, sort_keys=True)).split())
