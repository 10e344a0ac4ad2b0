"""Truncation of sequences above a limit, and the report on encoded rows."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from burnish.errors import ConfigError, DataError
from burnish.progress import say
from burnish.types import Completion, Group

__all__ = ["TRUNCATIONS", "EncodeStats", "check_limit", "report_encoding", "truncate"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EncodeStats:
    """Counts of what encoding did to the rows.

    Attributes:
        num_rows: rows seen.
        num_kept: groups made.
        num_cut_rows: rows with a sequence cut at `max_length`.
        num_cut_tokens: tokens cut away.
        num_skipped_rows: rows left without a scored token, and prompts over `max_prompt_length`.
        num_rerendered_turns: assistant turns whose rendering differs from the served one (see `ChatSpans`).
        num_dropped_rows: rows dropped because they exceed `max_length` (`truncation_mode` drop).
        num_dropped_tokens: their tokens.
        num_empty_completions: completions without text.
        num_equal_pairs: pairs dropped because they differ only in tokens that `max_length` cuts off.
        formats: rows by format, such as "plain prompt_completion".
        readings: rows by how columns under other names were interpreted.
        num_split_rows: rows over `max_length` that became several groups (`truncation_mode` split).
        num_split_tokens: their tokens; all are kept, but the first of each part is not scored.
    """

    num_rows: int = 0
    num_kept: int = 0
    num_cut_rows: int = 0
    num_cut_tokens: int = 0
    num_skipped_rows: int = 0
    num_rerendered_turns: int = 0
    num_dropped_rows: int = 0
    num_dropped_tokens: int = 0
    num_empty_completions: int = 0
    num_equal_pairs: int = 0
    formats: Counter[str] = field(default_factory=Counter[str])
    readings: Counter[str] = field(default_factory=Counter[str])
    num_split_rows: int = 0
    num_split_tokens: int = 0


def report_encoding(stats: EncodeStats, options: Mapping[str, Any], *, name: str = "") -> None:
    """Log what encoding cut, dropped, split and skipped, and oddities of the rows.

    Raises:
        DataError: no row is left.
    """
    limits = {k: v for k, v in options.items() if k in ("max_length", "max_prompt_length") and v is not None}
    if not stats.num_rows:
        raise DataError("there are no rows: check the file, the filter or the split that they come from.")
    if not stats.num_kept:
        raise DataError(
            f"none of {stats.num_rows} rows has a token to learn from under {limits or 'no limits'}: raise the limits, "
            "or check that the rows have assistant turns or completions."
        )
    where = f"{name}: " if name else ""
    for reading, count in sorted(stats.readings.items()):
        say(f"{where}{count} of {stats.num_rows} rows: {reading}")
    for verb, rows, tokens in (
        ("cut", stats.num_cut_rows, stats.num_cut_tokens),
        ("dropped", stats.num_dropped_rows, stats.num_dropped_tokens),
        ("split", stats.num_split_rows, stats.num_split_tokens),
    ):
        if rows:
            logger.warning(
                "%s%d of %d rows are %s (%d tokens) under %s.", where, rows, stats.num_rows, verb, tokens, limits
            )
    if stats.num_cut_rows * 2 > stats.num_rows and options.get("truncation_mode") != "keep_end":
        logger.warning("%sMost completions lose their end, and with it the EOS token: raise max_length.", where)
    if stats.num_skipped_rows:
        logger.warning("%s%d of %d rows are skipped under %s.", where, stats.num_skipped_rows, stats.num_rows, limits)
    for text, count in (
        ("%s%d completions are empty: they teach the model to stop at once.", stats.num_empty_completions),
        ("%s%d pairs are dropped: they differ only in tokens that max_length cuts off.", stats.num_equal_pairs),
    ):
        if count:
            logger.warning(text, where, count)
    if len(stats.formats) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(stats.formats.items()))
        logger.warning("%srows of several formats, each encoded as its own: %s.", where, found)


def check_limit(name: str, value: int | None) -> None:
    """Refuse a limit below 1."""
    if value is not None and value < 1:
        raise ConfigError(f"{name} = {value}: use a positive number of tokens, or None for no limit.")


def truncate(group: Group, max_length: int | None, stats: EncodeStats | None) -> None:
    """Cut every sequence of a group at `max_length` tokens and count the cut tokens."""
    check_limit("max_length", max_length)
    if max_length is None:
        return
    total = group.num_tokens
    group.prompt_ids = group.prompt_ids[:max_length]
    room = max_length - len(group.prompt_ids)
    for completion in group.completions:
        completion.token_ids = completion.token_ids[:room]
        if completion.loss_mask is not None:
            completion.loss_mask = completion.loss_mask[:room]
    if stats is not None and group.num_tokens < total:
        stats.num_cut_rows += 1
        stats.num_cut_tokens += total - group.num_tokens


def _keep_start(group: Group, max_length: int, stats: EncodeStats) -> list[Group]:
    truncate(group, max_length, stats)
    return [group]


def _keep_end(group: Group, max_length: int, stats: EncodeStats) -> list[Group]:
    num_cut = group.num_tokens - max_length
    first = max(num_cut - len(group.prompt_ids), 0)
    group.prompt_ids = group.prompt_ids[num_cut:]
    group.completions = [_part(completion, first, None, bool(group.prompt_ids)) for completion in group.completions]
    stats.num_cut_rows += 1
    stats.num_cut_tokens += num_cut
    return [group]


def _drop(group: Group, max_length: int, stats: EncodeStats) -> list[Group]:
    stats.num_dropped_rows += 1
    stats.num_dropped_tokens += group.num_tokens
    return []


def _split(group: Group, max_length: int, stats: EncodeStats) -> list[Group]:
    assert not group.prompt_ids
    stats.num_split_rows += 1
    stats.num_split_tokens += group.num_tokens
    return [
        dataclasses.replace(group, completions=[_part(completion, start, start + max_length, has_prompt=False)])
        for completion in group.completions
        for start in range(0, len(completion.token_ids), max_length)
    ]


def _part(completion: Completion, start: int, stop: int | None, has_prompt: bool) -> Completion:
    """Slice the tokens and mask of a completion; without a prompt, nothing predicts the first token."""
    ids = completion.token_ids[start:stop]
    mask = None if completion.loss_mask is None else completion.loss_mask[start:stop]
    if not has_prompt:
        mask = [position > 0 and (mask is None or mask[position]) for position in range(len(ids))]
    return dataclasses.replace(completion, token_ids=ids, loss_mask=mask)


TRUNCATIONS: dict[str, Callable[[Group, int, EncodeStats], list[Group]]] = {
    "drop": _drop,
    "keep_end": _keep_end,
    "keep_start": _keep_start,
    "split": _split,
}
"""`truncation_mode` -> function from a group above the limit to the groups that replace it."""
