"""Cache of the reference log-probabilities of a data set's completions, in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from burnish.config.fields import PRECOMPUTED_GROUPS
from burnish.errors import FileError
from burnish.progress import Progress, say
from burnish.runs.files import read_json, write_json
from burnish.training.ranks import Ranks
from burnish.types import Group

__all__ = ["ReferenceSums"]

logger = logging.getLogger(__name__)

Compute = Callable[[Sequence[Group]], list[list[float]]]


class ReferenceSums:
    """Log-probabilities of each group's completions under the reference, by the group's index."""

    def __init__(self) -> None:
        self._values: dict[int, list[float]] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._values

    def __getitem__(self, index: int) -> list[float]:
        return self._values[index]

    def add(self, groups: Sequence[Group], values: Sequence[list[float]]) -> None:
        """Store the log-probabilities of groups."""
        self._values.update({group.index: own for group, own in zip(groups, values, strict=True)})

    def clear(self) -> None:
        """Drop all values, as the reference has changed."""
        self._values.clear()

    def save(self, file: Path) -> None:
        """Save the values: a resumed run that recomputed them would pack, and so round, differently.

        Raises:
            FileError: it cannot be written.
        """
        write_json(file, self._values, indent=None)

    def load(self, file: Path) -> None:
        """Load what `save` wrote; a checkpoint of fewer ranks or an older version has no file.

        Raises:
            FileError: it cannot be read.
        """
        self._values = {int(index): values for index, values in read_json(file, {}).items()}

    def load_or_compute(
        self,
        file: Path,
        groups: Sequence[Group],
        own: Sequence[Group],
        *,
        fingerprint: str,
        options: Mapping[str, Any],
        compute: Compute,
        ranks: Ranks,
    ) -> None:
        """Load the values of all groups from the cache if it fits reference and tokens, or compute and write them.

        Args:
            file: the cache.
            groups: all groups of the data set.
            own: this rank's shard.
            fingerprint: hash of the reference's weights.
            options: whatever else the values depend on.
            compute: function from groups to values.
            ranks: each computes its shard.
        """
        key = _key(groups, fingerprint, options)
        found = _read(file, key)
        if found is not None:
            say(f"reference: {len(groups)} groups read from {file}")
            self._values = found
            return
        with Progress("reference", len(own)) as progress:
            for begin in range(0, len(own), PRECOMPUTED_GROUPS):
                part = own[begin : begin + PRECOMPUTED_GROUPS]
                self.add(part, compute(part))
                progress.update(begin + len(part))
        self._values = dict(ranks.gathered(list(self._values.items())))
        if ranks.is_first:
            write_json(file, {"key": key, "values": self._values}, indent=None)


def _read(file: Path, key: str) -> dict[int, list[float]] | None:
    if not file.is_file():
        return None
    try:
        stored = read_json(file)
    except FileError:
        stored = None
    if not isinstance(stored, dict) or cast("dict[str, Any]", stored).get("key") != key:
        logger.warning("%s is of another reference or other data and is recomputed", file)
        return None
    values = cast("dict[str, list[float]]", stored["values"])
    return {int(index): own for index, own in values.items()}


def _key(groups: Sequence[Group], fingerprint: str, options: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([fingerprint, dict(options)], sort_keys=True).encode())
    for group in groups:
        completions = [(c.token_ids, c.loss_mask) for c in group.completions]
        digest.update(json.dumps([group.index, group.prompt_ids, completions]).encode())
    return digest.hexdigest()
