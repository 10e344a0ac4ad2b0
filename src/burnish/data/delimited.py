"""Rows of delimited text (CSV, TSV): the delimiter is the one that the header shows."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from burnish.data.parsing import repeated
from burnish.errors import DataError
from burnish.progress import say

__all__ = ["find_delimiter", "read_delimited"]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

_LOOKED_AT_ROWS = 20
_LOOKED_AT_LINES = 200
"""What the delimiter is read from; a quoted cell may run over several lines."""


def read_delimited(path: Path, *, usual: str) -> list[dict[str, Any]]:
    """Rows of a file with a header, all cells text; the file is read once.

    Args:
        path: the file.
        usual: the delimiter that its suffix promises; another one is said.

    Raises:
        DataError: two delimiters fit equally well, a row of another length than the header, a column given twice, or
            quotes that do not close; with the line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = list(islice(file, _LOOKED_AT_LINES))
        delimiter = _delimiter(head, usual, path)
        return _rows(chain(head, file), delimiter, path)


def find_delimiter(path: Path, *, usual: str) -> str:
    """The delimiter of a file that another reader reads; see `read_delimited`.

    Raises:
        DataError: two delimiters fit equally well.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _delimiter(list(islice(file, _LOOKED_AT_LINES)), usual, path)


def _rows(lines: Iterable[str], delimiter: str, path: Path) -> list[dict[str, Any]]:
    reader, rows = csv.DictReader(lines, strict=True, delimiter=delimiter), list[dict[str, Any]]()
    try:
        if (twice := repeated(list(reader.fieldnames or ()))) is not None:
            raise DataError(f"{path} has the column {twice!r} twice: rename or remove one.")
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num}: row {number} has more or fewer cells than the header, read as "
                    f"separated by {_DELIMITERS[delimiter]}: put quotes around cells that hold one, and around the "
                    "header of a single column."
                )
            rows.append(row)
    except csv.Error as error:
        # The last line of the row before: a quote that never closes swallows the lines after it.
        raise DataError(f"{path}:{reader.line_num + 1} is not CSV: {error}.") from error
    return rows


def _delimiter(head: list[str], usual: str, path: Path) -> str:
    """The delimiter that splits the header; of several the one that gives each of the first rows as many cells.

    One that the file's suffix does not promise is said.
    """
    splitting = {one: counts for one in _DELIMITERS if (counts := _cells(head, one))[:1] > [1]}
    if len(splitting) > 1:
        splitting = {one: counts for one, counts in splitting.items() if len(set(counts)) == 1} or splitting
    if len(splitting) > 1:
        raise DataError(
            f"{path}: its header and first rows can be read as separated by "
            f"{' or by '.join(_DELIMITERS[one] for one in splitting)}: put quotes around the cells of the header."
        )
    delimiter = next(iter(splitting), usual)
    if delimiter != usual:
        say(f"{path}: cells are read as separated by {_DELIMITERS[delimiter]}, as in its header")
    return delimiter


def _cells(head: list[str], delimiter: str) -> list[int]:
    """Cells of the header and of the first rows under a delimiter, up to the first row that is malformed or cut off."""
    counts: list[int] = []
    try:
        for row in islice(csv.reader(head, strict=True, delimiter=delimiter), _LOOKED_AT_ROWS):
            counts += [len(row)] if row else []
    except csv.Error:
        pass
    return counts
