"""Readers of files, folders and data sets on the hub.

`datasets` reads the hub, folders that it saved and folders of data files. Single files are read here, because its
readers guess types (the answer "007" becomes 7), require one type per column, keep the last of two equal keys and do
not name the line in an error.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from huggingface_hub.constants import is_offline_mode

from burnish.config.hub import hub_problem
from burnish.config.paths import is_file, is_folder, is_only_a_path, missing
from burnish.data.delimited import read_delimited
from burnish.data.parsing import object_of, parse_json, repeated
from burnish.errors import ConfigError, DataError

__all__ = ["read_rows"]

Row: TypeAlias = dict[str, Any]

_OF_DATA_SETS = ("name", "revision", "split")
"""Keys of a source that select a part of a data set."""


def read_rows(source: Mapping[str, Any], field: str) -> list[Row]:
    """Read a file, all files that a glob matches, a folder, or a data set on the hub.

    Args:
        source: `path`; for a folder or the hub also `split`, `name` and `revision` of `datasets.load_dataset`.
        field: name of the source in messages.

    Raises:
        ConfigError: a missing file, an unsupported suffix, an unknown split, or an unreachable hub.
        DataError: a file that cannot be read or parsed; names the line where there are lines.
    """
    path = str(source["path"])
    options = {key: source[key] for key in _OF_DATA_SETS if key in source}
    if is_folder(path):
        saved = any(is_file(Path(path, mark)) for mark in ("dataset_dict.json", "state.json"))
        return _saved_rows(path, options.get("split"), field) if saved else _loaded_rows(path, options, field)
    files = sorted(glob.glob(path, recursive=True)) if not is_file(path) else [path]
    if not files and "/" in path and Path(path).suffix not in _READERS and not is_only_a_path(path):
        if (problem := hub_problem(path, repo_type="dataset")) is not None and not is_offline_mode():
            raise ConfigError(
                f"{field}.path = {path!r}: no such file or folder ({missing(path)}). As a data set on the hub: "
                f"{problem}. Give the path of a file, or set HF_HUB_OFFLINE=1 to read what the cache has."
            )
        return _loaded_rows(path, options, field)
    if options:
        key, value = next(iter(options.items()))
        raise ConfigError(
            f"{field}.{key} = {value!r}: only folders and data sets on the hub have a {key}, not the file {path!r}; "
            f"drop {key}."
        )
    if not files:
        there = "" if glob.has_magic(path) else f" ({missing(path)})"
        raise ConfigError(f"{field}.path = {path!r}: no such file; check it, or give a glob that matches{there}.")
    rows: list[Row] = []
    for name in files:
        reader = _READERS.get(Path(name).suffix)
        if reader is None:
            raise ConfigError(f"{field}.path = {name!r}: use one of {', '.join(sorted(_READERS))}.")
        try:
            rows += reader(Path(name))
        except UnicodeDecodeError as error:
            raise DataError(_undecodable(Path(name), error)) from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror or error}): check its permissions.") from error
    return rows


_MARKS = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"\x1f\x8b", "gzip"))
"""Leading bytes of files that are often mistaken for UTF-8 text, with their formats."""


def _undecodable(path: Path, error: UnicodeDecodeError) -> str:
    """Locate the first byte that is not UTF-8; the decoder's own offset counts from the start of its buffer."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            kind = next((kind for mark, kind in _MARKS if number == 1 and line.startswith(mark)), None)
            if kind is not None:
                return f"{path} is not UTF-8 but {kind}: save it as UTF-8."
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                reason = f"{found.reason} at byte {offset + found.start}"
                return f"{path}:{number} is not UTF-8 ({reason}): save it as UTF-8."
            offset += len(line)
    return f"{path} is not UTF-8 ({error.reason}): save it as UTF-8."


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(_json(line, f"{path}:{number}"), f"{path}:{number}"))
    return rows


def _read_json(path: Path) -> list[Row]:
    value = _json(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: the file holds a {type(value).__name__}: use a list of objects, or .jsonl.")
    return [_row(item, f"{path}[{i}]") for i, item in enumerate(cast("list[Any]", value))]


def _json(text: str, where: str) -> Any:
    return parse_json(text, where, object_pairs_hook=partial(object_of, where))


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}: each row must be an object.")
    return cast("Row", value)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as parquet

    try:
        table: Any = cast("Any", parquet).read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not Parquet: {error}.") from error
    names: list[str] = table.column_names
    if (twice := repeated(names)) is not None:
        raise DataError(f"{path} has the column {twice!r} twice: rename or remove one.")
    return cast("list[Row]", table.to_pylist())


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".csv": partial(read_delimited, usual=","),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tsv": partial(read_delimited, usual="\t"),
}
"""Suffix -> reader."""


def _saved_rows(path: str, split: str | None, field: str) -> list[Row]:
    import datasets

    try:
        saved: Any = cast("Any", datasets).load_from_disk(path)
    except Exception as error:  # pyarrow and json raise many kinds for missing, truncated and foreign files
        raise _unread(path, error, field) from error
    if isinstance(saved, Mapping):
        splits = sorted(cast("Mapping[str, Any]", saved))
        if split not in splits:
            raise ConfigError(f"{field}.split = {split!r}: the data set has the splits {', '.join(splits)}.")
        saved = saved[split]
    elif split is not None:
        raise ConfigError(f"{field}.split = {split!r}: the saved data set has no splits; drop split.")
    return [dict(row) for row in saved]


def _loaded_rows(path: str, options: Mapping[str, Any], field: str) -> list[Row]:
    """Read a folder of data files or a data set on the hub with `datasets.load_dataset`."""
    import datasets

    library, name, revision = cast("Any", datasets), options.get("name"), options.get("revision")
    library.disable_progress_bars()  # they would garble the output of the run
    try:
        splits = (
            [options["split"]] if "split" in options else library.get_dataset_split_names(path, name, revision=revision)
        )
        loaded = library.load_dataset(path, name, split=splits[0], revision=revision) if len(splits) == 1 else ()
        rows = [dict(row) for row in loaded]
    except Exception as error:
        raise _unread(path, error, field) from error
    if len(splits) != 1:
        raise ConfigError(f"{field}.split = None: the data set has the splits {', '.join(splits)}; set one.")
    return rows


def _unread(path: str, error: Exception, field: str) -> ConfigError:
    reason = " ".join(str(error).split())[:300]
    if not is_folder(path):
        return ConfigError(
            f"{field}.path = {path!r}: no such file, and as a data set on the hub it cannot be read ({reason}): check "
            "path, name, revision and split."
        )
    return ConfigError(
        f"{field}.path = {path!r}: datasets can neither load this folder from disk nor read its files ({reason}): "
        "give a file or a glob, or save it again."
    )
