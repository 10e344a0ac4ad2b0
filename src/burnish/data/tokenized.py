"""Rows of token ids, which are checked but never changed.

Columns are those of TRL: `input_ids`, with `labels`, `completion_mask` and `assistant_masks`, for SFT; `prompt_ids`,
`chosen_ids` and `rejected_ids` for pairs; `chosen_ids` and `rejected_ids` as whole sequences for reward models;
`prompt_ids`, `completion_ids` and `label` for single completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from burnish.data.parsing import short
from burnish.data.tokens import decode_text, inner_tokenizer
from burnish.errors import ConfigError, DataError
from burnish.types import Completion

__all__ = ["is_masked_completion", "token_completion", "token_ids", "token_sequence"]

_IGNORED = -100
"""Label of tokens that are not scored, as in torch's cross-entropy."""


def token_ids(row: Mapping[str, Any], name: str, index: int) -> list[int]:
    """Return the token ids of a column.

    Raises:
        DataError: not a list of token ids, or empty.
    """
    value: Any = row[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"row {index}: {name} = {short(value)}: use a non-empty list of token ids, or drop the row.")
    ids = cast("list[Any]", value)
    wrong = next((position for position, token in enumerate(ids) if type(token) is not int), None)
    if wrong is None:
        wrong = next((position for position, token in enumerate(ids) if not 0 <= token < 2**31), None)
    if wrong is not None:
        raise DataError(
            f"row {index}: {name}[{wrong}] = {short(ids[wrong])}: use token ids, integers from 0 to the size of the "
            "vocabulary."
        )
    return list(ids)


def token_completion(row: Mapping[str, Any], name: str, processing_class: Any, index: int) -> Completion:
    """Return a column as a completion with every token scored.

    Raises:
        DataError: see `token_ids`.
    """
    ids = token_ids(row, name, index)
    return Completion(ids, text=decode_text(inner_tokenizer(processing_class), ids))


def token_sequence(
    row: Mapping[str, Any],
    processing_class: Any,
    index: int,
    *,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
) -> Completion:
    """Return the `input_ids` of a row as a completion; tokens in all masks are scored, except the first token.

    Raises:
        DataError: malformed token ids or masks.
        ConfigError: a loss option without its mask in the row.
    """
    for option, asked, name in (
        ("completion_only_loss", completion_only_loss, "completion_mask"),
        ("assistant_only_loss", assistant_only_loss, "assistant_masks"),
    ):
        if asked and row.get(name) is None:
            raise ConfigError(
                f"{option} = True, but row {index} has input_ids without {name}: add the column, or mask by labels and "
                f"unset {option}."
            )
    for name in ("position_ids", "seq_lengths"):
        if row.get(name) is not None:
            raise DataError(
                f"row {index} has {name}, so its input_ids may hold several sequences: use one row per sequence "
                "(batches are packed anyway), and drop the column."
            )
    completion = token_completion(row, "input_ids", processing_class, index)
    ids = completion.token_ids
    if row.get("attention_mask") is not None and not all(_mask(row, "attention_mask", len(ids), index)):
        raise DataError(f"row {index}: attention_mask hides tokens: give rows without padding, and drop the column.")
    masks = [_labelled(row["labels"], ids, index)] if row.get("labels") is not None else []
    if is_masked_completion(row, completion_only_loss):
        masks.append(_mask(row, "completion_mask", len(ids), index))
    if row.get("assistant_masks") is not None:
        masks.append(_mask(row, "assistant_masks", len(ids), index))
    completion.loss_mask = [position > 0 and all(m[position] for m in masks) for position in range(len(ids))]
    return completion


def is_masked_completion(row: Mapping[str, Any], completion_only_loss: bool | None) -> bool:
    """Return True if the row's `completion_mask` restricts which tokens are scored."""
    return completion_only_loss is not False and row.get("completion_mask") is not None


def _mask(row: Mapping[str, Any], name: str, length: int, index: int) -> list[bool]:
    values = _as_long(row[name], name, length, index)
    wrong = next((position for position, value in enumerate(values) if value not in (0, 1)), None)
    if wrong is not None:
        raise DataError(f"row {index}: {name}[{wrong}] = {short(values[wrong])}: use 1 (scored) or 0 (not).")
    return [bool(value) for value in values]


def _labelled(value: Any, ids: list[int], index: int) -> list[bool]:
    labels = _as_long(value, "labels", len(ids), index)
    for position, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if type(label) is not int or label not in (_IGNORED, token):
            raise DataError(
                f"row {index}: labels[{position}] = {short(label)} and input_ids[{position}] = {token}: each label is "
                "the token at its own position, or -100 for a token that is not scored (the loss shifts by one)."
            )
    return [label != _IGNORED for label in labels]


def _as_long(value: Any, name: str, length: int, index: int) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"row {index}: {name} = {short(value)}: use a list as long as input_ids.")
    values = cast("list[Any]", value)
    if len(values) != length:
        raise DataError(f"row {index}: {name} has {len(values)} entries, input_ids has {length}: give each token one.")
    return values
