"""Reader of delimited text (CSV, TSV); the delimiter is inferred from the header."""

from __future__ import annotations

import csv
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
"""Rows and lines that the delimiter is inferred from; a quoted cell may span several lines."""


def read_delimited(path: Path, *, usual: str) -> list[dict[str, Any]]:
    """Read a file with a header, all cells as text; the file is read once.

    Args:
        path: the file.
        usual: the delimiter that the suffix implies; a line is printed where the file uses another one.

    Raises:
        DataError: two delimiters fit equally well, a row whose length differs from the header's, a duplicate column, or
            quotes that do not close; names the line.
    """
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = list(islice(file, _LOOKED_AT_LINES))
        delimiter = _delimiter(head, usual, path)
        reader = csv.DictReader(chain(head, file), strict=True, delimiter=delimiter)
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
            # The last line of the previous row: an unclosed quote swallows the lines after it.
            raise DataError(f"{path}:{reader.line_num + 1} is not CSV: {error}.") from error
    return rows


def find_delimiter(path: Path, *, usual: str) -> str:
    """Infer the delimiter of a file for another reader; see `read_delimited`.

    Raises:
        DataError: two delimiters fit equally well.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        return _delimiter(list(islice(file, _LOOKED_AT_LINES)), usual, path)


def _delimiter(head: list[str], usual: str, path: Path) -> str:
    """Find the delimiter that splits the header; of several, the one that gives the first rows equally many cells."""
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
    """Count the cells of the header and of the first rows, up to the first row that is malformed or cut off."""
    counts: list[int] = []
    try:
        # The last row may be cut off in the middle of a quoted cell.
        for row in islice(csv.reader(head, strict=True, delimiter=delimiter), _LOOKED_AT_ROWS):
            counts += [len(row)] if row else []
    except csv.Error:
        pass
    return counts
