"""Files of rows: JSON, JSON lines, delimited text, Parquet, and directories that `datasets` saved."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from burnish.config.paths import is_file, is_folder, missing
from burnish.data.delimited import read_delimited
from burnish.data.parsing import object_of, parse_json, repeated
from burnish.errors import ConfigError, DataError

__all__ = ["read_rows"]

Row: TypeAlias = dict[str, Any]


def read_rows(path: str, split: str | None, field: str) -> list[Row]:
    """Rows of a file, of all files that a glob matches, or of a saved data set.

    Args:
        path: the file, glob or directory.
        split: of a saved data set that has several.
        field: what to call the source in messages.

    Raises:
        ConfigError: no such file, a suffix without a reader, or a split that is not there.
        DataError: a file that cannot be read or parsed, with the line where there are lines.
    """
    if is_folder(path):
        return _saved_rows(path, split, field)
    if split is not None:
        raise ConfigError(f"{field}.split = {split!r}: only a directory saved by datasets has splits, not {path!r}.")
    files = sorted(glob.glob(path, recursive=True)) if not is_file(path) else [path]
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
"""First bytes of files that are taken for text -> what they are."""


def _undecodable(path: Path, error: UnicodeDecodeError) -> str:
    """Where a file stops being UTF-8; the decoder counts from the beginning of its own buffer."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            kind = next((kind for mark, kind in _MARKS if number == 1 and line.startswith(mark)), None)
            if kind is not None:
                return f"{path} is not UTF-8 but {kind}: save it as UTF-8."
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as found:
                place = f"{found.reason} at byte {offset + found.start}"
                return f"{path}:{number} is not UTF-8 ({place}): save it as UTF-8."
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


def _json(text: str, place: str) -> Any:
    return parse_json(text, place, object_pairs_hook=partial(object_of, place))


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place} is a {type(value).__name__}: each row must be an object.")
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
