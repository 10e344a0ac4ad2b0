"""Write the files of a run atomically, and read them back even after a kill.

Everything that burnish itself writes goes through here, so that a full disk is one clear error, a reader never sees
half a file, and a line ends at a line feed only (U+2028 and U+0085 are ordinary characters of a completion).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from burnish.errors import FileError

__all__ = [
    "append_json_lines",
    "filter_json_lines",
    "read_json",
    "read_json_lines",
    "read_lines",
    "replacing",
    "write_json",
    "write_json_lines",
    "writing",
]


@contextmanager
def writing(path: str | Path) -> Generator[None]:
    """Turn an OSError raised while `path` is written into a `FileError` that names it.

    Raises:
        FileError: the disk is full, the folder is read-only, a file stands where a folder should be, ...
    """
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror or error}). Free space or permit writing there, then resume: "
            "what was saved before is whole."
        ) from error


@contextmanager
def replacing(path: Path, mode: str = "w") -> Generator[IO[Any]]:
    """Open a draft that takes the place of `path` when the block ends, and is deleted when it raises.

    Raises:
        FileError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file whole or not at all; what JSON does not know becomes text.

    Raises:
        FileError: it cannot be written.
    """
    with replacing(path) as stream:
        stream.write(_dumps(value, indent))


def read_json(path: Path, default: Any = None) -> Any:
    """Read a JSON file; `default` where there is none.

    Raises:
        FileError: it cannot be read, or is not JSON.
    """
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not a JSON file ({error}); delete it to start that part over.") from error


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records, one a line, whole or not at all.

    Raises:
        FileError: they cannot be written.
    """
    with replacing(path) as stream:
        stream.writelines(_dumps(record) + "\n" for record in records)


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records, one a line; a last line that a kill cut off is ended first, so that it spoils no other.

    Raises:
        FileError: it cannot be written.
    """
    text = "".join(_dumps(record) + "\n" for record in records).encode()
    if not text:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as stream:
            if stream.tell() and not _ends_a_line(stream):
                text = b"\n" + text
            stream.write(text)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file; lines that are not JSON objects are skipped, as a kill cuts the last one off.

    Raises:
        FileError: it cannot be read.
    """
    for _, record in read_lines(path):
        if record is not None:
            yield record


def filter_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the records that `keep` refuses, and lines that are not JSON objects; the file is replaced, never truncated.

    Raises:
        FileError: it cannot be read or written.
    """
    if not path.is_file() or all(record is not None and keep(record) for _, record in read_lines(path)):
        return
    with replacing(path, "wb") as stream:
        for line, record in read_lines(path):
            if record is not None and keep(record):
                stream.write(line.rstrip(b"\n") + b"\n")


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of a file with their records, None for a line that is not a JSON object.

    Raises:
        FileError: it cannot be read.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            for line in stream:
                try:
                    value: Any = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield line, cast("dict[str, Any]", value) if isinstance(value, dict) else None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error}); check its permissions.") from error


def _ends_a_line(stream: IO[bytes]) -> bool:
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) == b"\n"


def _dumps(value: Any, indent: int | None = None) -> str:
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    except TypeError:  # keys that are not text, such as tuples
        text = json.dumps(_with_text_keys(value), indent=indent, ensure_ascii=False, default=str)
    # A lone surrogate has no UTF-8 form; as an escape it survives.
    return text if _is_encodable(text) else json.dumps(json.loads(text), indent=indent)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_with_text_keys(item) for item in cast("list[Any]", value)]
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
