"""A generator of bad input, and a judge of what burnish says to it.

Every :class:`Case` says by construction whether it must be refused. :func:`judge` runs the real entry and demands a
`BurnishError` that names the thing, within seconds and without a warning; or, where the input may be good, no other
error than that.
"""

from __future__ import annotations

from collections.abc import Iterator

from nonsense.cases import Case, judge

__all__ = ["Case", "all_cases", "judge"]


def all_cases() -> Iterator[Case]:
    """Every case, in an order that never changes."""
    from nonsense import checkpoints, data_files, fields, files, rows, tables, unsealed

    for family in (files, fields, tables, data_files, rows, checkpoints, unsealed):
        yield from family.cases()
