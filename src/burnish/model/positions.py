"""How many positions a model has: a hard limit where they are learned or tabulated, else what it was trained for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from burnish.errors import ModelError
from burnish.types import Group, PackedBatch

__all__ = ["check_lengths", "check_positions", "learned_positions", "refuse_beyond"]

logger = logging.getLogger(__name__)

_OFFSETS = range(9)
"""Rows that a table of positions may have beside them (OPT has 2)."""

_BY_LENGTH = ("dynamic", "longrope")
"""Rotary scalings whose frequencies depend on the longest sequence of a row."""


def _configured(model: Any) -> int | None:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None


def learned_positions(model: Any) -> int | None:
    """Positions of a model that holds them in a table, beyond which its forward fails; None for any other model."""
    length = _configured(model)
    if length is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    tables += [size for buffer in model.buffers() if buffer.ndim > 1 for size in (buffer.shape[0], buffer.shape[-1])]
    return length if any(size - length in _OFFSETS for size in tables) else None


def refuse_beyond(positions: int | None, batch: PackedBatch, model: Any) -> None:
    """The last line before the forward: rows of streams, of a reward model, of a later evaluation.

    Raises:
        ModelError: a sequence of the batch is longer than `learned_positions`.
    """
    if positions is None:
        return
    longest = max((span.prompt[1] + length for span in batch.spans for _, length in span.completions), default=0)
    if longest > positions:
        raise ModelError(
            f"a sequence has {longest} tokens, and {type(model).__name__} has {positions} positions: shorten the rows "
            "(max_length), or what is sampled (max_completion_length)."
        )


def check_positions(model: Any, longest: int, what: str, fix: str) -> None:
    """Refuse sequences beyond a table of positions; warn, once a model, of those beyond what it was made for.

    Args:
        model: of transformers.
        longest: tokens of the longest sequence, prompt and completion.
        what: names the sequence in the message.
        fix: what to do.

    Raises:
        ModelError: the model has no such positions.
    """
    learned = learned_positions(model)
    name = type(model).__name__
    if learned is not None and longest > learned:
        raise ModelError(f"{what} has {longest} tokens, and {name} has {learned} positions: {fix}.")
    limit, reason = _trained(model)
    if limit is None or longest <= max(limit, getattr(model, "_burnish_longest", 0)):
        return
    model._burnish_longest = longest  # every engine and trainer of the model asks
    logger.warning("%s has %d tokens, and %s %s: %s.", what, longest, name, reason, fix)


def _trained(model: Any) -> tuple[int | None, str]:
    """The length that a model was made for, and why a longer sequence is in question."""
    length = _configured(model)
    reason = f"was made for max_position_embeddings = {length}"
    text = model.config.get_text_config()
    rope = cast("dict[str, Any]", getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    original = rope.get("original_max_position_embeddings", getattr(text, "original_max_position_embeddings", None))
    kind = rope.get("rope_type")
    if kind in _BY_LENGTH and isinstance(original, int) and original < (length or original + 1):
        return original, (
            f"changes its rotary frequencies ({kind}) beyond {original} tokens for all sequences of a row, so that "
            "packed rows and rollouts differ"
        )
    return length, reason


def check_lengths(model: Any, groups: Any, name: str, fix: str, *, more: int = 0) -> None:
    """Check the longest sequence of a data set; a stream's are not known before they come.

    Args:
        model: of transformers.
        groups: encoded rows.
        name: of the data set.
        fix: what to do.
        more: tokens that are still to be sampled after each prompt.

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
