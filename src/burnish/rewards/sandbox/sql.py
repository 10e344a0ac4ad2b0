"""The program that compares two queries on SQLite inside the sandbox."""

from __future__ import annotations

import re

__all__ = ["SQL_PROGRAM", "is_ordered"]

_SKIPPED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)


def is_ordered(query: str) -> bool:
    """Return True if a query orders its result: ORDER BY outside of parentheses, strings and comments."""
    depth, outside = 0, ""
    for character in _SKIPPED.sub(" ", query):
        depth += (character == "(") - (character == ")")
        outside += character if depth == 0 else " "
    return re.search(r"\border\s+by\b", outside, re.IGNORECASE) is not None


# Statements cannot write to the output, so what stands there is this program's word.
SQL_PROGRAM = """
import collections, json, sqlite3, sys

MOST_ROWS = 100_000
job = json.load(sys.stdin)


def same(value):
    return float(f"{value:.10g}") if isinstance(value, (int, float)) else value


def rows(query):
    connection = sqlite3.connect(":memory:")
    connection.executescript(job["setup"])
    cursor = connection.execute(query)
    if cursor.description is None:
        raise ValueError("not a query")
    found = [tuple(map(same, row)) for row in cursor.fetchmany(MOST_ROWS + 1)]
    if len(found) > MOST_ROWS:
        raise ValueError("too many rows")
    return found


wanted = rows(job["gold"])
print("gold", flush=True)
try:
    found = rows(job["answer"])
except Exception:
    found = None
equal = found is not None and (
    found == wanted if job["ordered"] else collections.Counter(found) == collections.Counter(wanted)
)
print("equal" if equal else "different", flush=True)
"""
