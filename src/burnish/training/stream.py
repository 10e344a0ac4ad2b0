"""Training rows without a length: encoded one at a time, when training asks for them."""

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
    """Groups made from rows as they come; row i belongs to process i mod `world`.

    A data set that can be read again starts over at its end (with `set_epoch`, where it has one, so that it may shuffle
    anew); an iterator ends. Reading it again gives the same groups if the rows come in the same order, so a resumed run
    finds its place by reading what it has consumed.

    Args:
        rows: an iterable without a length.
        encoder: row to groups, as for `encode_rows`.
        processing_class: the tokenizer.
        options: the encoder's.
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
        """Log what encoding cut, dropped, split and skipped of this process's rows so far."""
        report_encoding(self.stats, self.options)

    @staticmethod
    def check(args: Any) -> None:
        """Refuse settings that need a length.

        Raises:
            ConfigError: no `max_steps`, or worker processes.
        """
        if args.max_steps <= 0:
            raise ConfigError(
                f"max_steps = {args.max_steps}: train_dataset has no length, so the end of training is unknown; set "
                "max_steps to the number of optimizer steps."
            )
        if args.dataloader_num_workers > 0:
            raise ConfigError(
                f"dataloader_num_workers = {args.dataloader_num_workers}: every worker would read the whole of a "
                "train_dataset without a length; use 0."
            )
