"""Training rows without a length, encoded as they are read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset

from burnish.data import EncodeStats, encode_lazily, report_encoding
from burnish.errors import ConfigError, DataError
from burnish.types import Group

__all__ = ["GroupStream"]


class GroupStream(IterableDataset[Group]):
    """Groups encoded as rows are read; row i belongs to process i mod `world`.

    An iterable starts over at its end (with `set_epoch`, if it has one, so that it may reshuffle); an iterator ends.
    Rows in the same order give the same groups, so a resumed run skips what it has consumed by reading it again.

    Args:
        rows: an iterable without a length.
        encoder: function from a row to groups, as for `encode_rows`.
        processing_class: the tokenizer.
        options: options of the encoder.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        encoder: Callable[..., list[Group]],
        processing_class: Any,
        options: Mapping[str, Any],
    ) -> None:
        self.rows = rows
        self.encoder = encoder
        self.processing_class = processing_class
        self.options = dict(options)
        self.stats = EncodeStats()
        self.rank, self.world = 0, 1

    def __iter__(self) -> Generator[Group]:
        once = isinstance(self.rows, Iterator)
        for number in count():
            if callable(set_epoch := getattr(self.rows, "set_epoch", None)):
                set_epoch(number)
            before = self.stats.num_kept
            yield from encode_lazily(
                self.encoder,
                self.rows,
                self.processing_class,
                stats=self.stats,
                rank=self.rank,
                world=self.world,
                **self.options,
            )
            if once:
                return
            if self.stats.num_kept == before:
                raise DataError(
                    f"train_dataset: a whole pass gave process {self.rank} of {self.world} no row with a token to "
                    f"learn from ({self.stats.num_rows} rows read): check the rows, or raise max_length."
                )

    def report(self) -> None:
        """Log how many of this process's rows were truncated, dropped, split and skipped."""
        report_encoding(self.stats, self.options)

    @staticmethod
    def check(args: Any) -> None:
        """Refuse settings that need a length.

        Raises:
            ConfigError: `max_steps` is not set, or there are worker processes.
        """
        if args.max_steps <= 0:
            raise ConfigError(
                f"max_steps = {args.max_steps}: train_dataset has no length, so the end of training is unknown; set "
                "max_steps to the number of optimizer steps."
            )
        if args.dataloader_num_workers > 0:
            raise ConfigError(
                f"dataloader_num_workers = {args.dataloader_num_workers}: every worker would read all of a "
                "train_dataset without a length; use 0."
            )
