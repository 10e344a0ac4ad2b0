"""Position limits of a model: hard where positions are tabulated, else the length it was trained for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from burnish.errors import ModelError
from burnish.types import Group, PackedBatch

__all__ = ["check_lengths", "check_positions", "depends_on_row", "learned_positions", "refuse_beyond"]

logger = logging.getLogger(__name__)

_OFFSETS = range(9)
"""Numbers of extra rows that a position table may have (OPT has 2)."""

_BY_LENGTH = ("dynamic", "longrope")
"""Rotary scalings whose frequencies depend on the longest sequence of the row."""


def _configured(model: Any) -> int | None:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None


def learned_positions(model: Any) -> int | None:
    """Return the size of a model's position table, beyond which its forward fails; None without a table."""
    length = _configured(model)
    if length is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    tables += [size for buffer in model.buffers() if buffer.ndim > 1 for size in (buffer.shape[0], buffer.shape[-1])]
    return length if any(size - length in _OFFSETS for size in tables) else None


def refuse_beyond(positions: int | None, batch: PackedBatch, model: Any) -> None:
    """Refuse a batch that exceeds the position table, for rows that no earlier check has seen, such as a stream's.

    Raises:
        ModelError: a sequence of the batch is longer than `learned_positions`.
    """
    if positions is None:
        return
    longest = max((span.prompt[1] + length for span in batch.spans for _, length in span.completions), default=0)
    if longest > positions:
        raise ModelError(
            f"a sequence has {longest} tokens, and {type(model).__name__} has {positions} positions: shorten the rows "
            "(max_length), or sample shorter completions (max_completion_length)."
        )


def depends_on_row(model: Any) -> bool:
    """Return whether the longest sequence of a row changes the positions of all its tokens."""
    text = model.config.get_text_config()
    rope = cast("dict[str, Any]", getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]  # by kind of layer
    return any(cast("dict[str, Any]", table).get("rope_type") in _BY_LENGTH for table in tables)


def check_positions(model: Any, longest: int, what: str, fix: str) -> None:
    """Refuse sequences beyond a position table; warn once per model of those beyond its trained length.

    Args:
        model: a transformers model.
        longest: tokens of the longest sequence, prompt and completion.
        what: names the sequence in the message.
        fix: fix for the message.

    Raises:
        ModelError: the sequence exceeds the position table.
    """
    learned = learned_positions(model)
    name = type(model).__name__
    if learned is not None and longest > learned:
        raise ModelError(f"{what} has {longest} tokens, and {name} has {learned} positions: {fix}.")
    limit = _configured(model)
    reason = f"was made for max_position_embeddings = {limit}"
    text = model.config.get_text_config()
    rope = cast("dict[str, Any]", getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    original = rope.get("original_max_position_embeddings", getattr(text, "original_max_position_embeddings", None))
    kind = rope.get("rope_type")
    if kind in _BY_LENGTH and isinstance(original, int) and original < (limit or original + 1):
        limit = original
        reason = (
            f"changes its rotary frequencies ({kind}) beyond {original} tokens for all sequences of a row, so that "
            "packed rows and rollouts differ"
        )
    if limit is None or longest <= max(limit, getattr(model, "_burnish_longest", 0)):
        return
    model._burnish_longest = longest  # every engine and trainer of the model checks
    logger.warning("%s has %d tokens, and %s %s: %s.", what, longest, name, reason, fix)


def check_lengths(model: Any, groups: Any, name: str, fix: str, *, more: int = 0) -> None:
    """Check the longest sequence of a data set; a stream is checked batch by batch.

    Args:
        model: a transformers model.
        groups: encoded rows.
        name: name of the data set.
        fix: fix for the message.
        more: tokens to be sampled after each prompt.

    Raises:
        ModelError: see `check_positions`.
    """
    if not isinstance(groups, list) or not groups:
        return
    longest = max(cast("list[Group]", groups), key=_length)
    what = f"{name}: row {longest.index}" + (f" with {more} tokens to sample" if more else "")
    check_positions(model, _length(longest) + more, what, fix)


def _length(group: Group) -> int:
    completions: Sequence[Any] = group.completions
    return len(group.prompt_ids) + max((len(c.token_ids) for c in completions), default=0)
