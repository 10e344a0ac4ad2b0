"""Text to tokens, with exact span boundaries.

Masks are given as character spans and mapped to tokens by offsets. Where a token would straddle the edge of a span, the
two sides are tokenized separately, as at inference.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from burnish.data.parsing import half_character
from burnish.errors import DataError

__all__ = ["decode_text", "inner_tokenizer", "plain_ids", "split_ids", "tokenize_chat", "with_bos", "with_eos"]


def inner_tokenizer(processing_class: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def plain_ids(processing_class: Any, text: str) -> list[int]:
    """Tokenize a text without adding special tokens.

    Raises:
        DataError: the text holds half a character.
    """
    return list(_called(inner_tokenizer(processing_class), text)["input_ids"])


def _called(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, **options)
    except (TypeError, UnicodeEncodeError) as error:
        if (problem := half_character(text)) is None:
            raise
        raise DataError(problem) from error


def decode_text(tokenizer: Any, token_ids: Sequence[int], ends: Collection[int] = ()) -> str:
    """Decode tokens with their special tokens and without clean-up.

    Rewards, stop strings, evaluations, pairs and transcripts use this text. Markers such as `<think>` or `</answer>`
    are often special tokens, so only those that end a completion are removed.

    Args:
        tokenizer: tokenizer to decode with.
        token_ids: tokens of a prompt or a completion.
        ends: end-of-turn and padding tokens, removed at the end.
    """
    last = len(token_ids)
    while last and token_ids[last - 1] in ends:
        last -= 1
    return str(tokenizer.decode(list(token_ids[:last]), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def split_ids(processing_class: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokenize a plain prompt and the completion that follows it.

    Raises:
        DataError: a merge crosses the boundary and the completion cannot be tokenized separately.
    """
    tokenizer = inner_tokenizer(processing_class)
    head, joint = plain_ids(tokenizer, prompt), plain_ids(tokenizer, prompt + completion)
    if joint[: len(head)] == head:
        return head, joint[len(head) :]
    return head, _piece_ids(tokenizer, head, completion, decode_text(tokenizer, joint))[0]


def with_bos(processing_class: Any, ids: list[int]) -> list[int]:
    """Ensure exactly one BOS token at the start, if the tokenizer adds one or the text begins with it."""
    tokenizer = inner_tokenizer(processing_class)
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while ids[:2] == [bos, bos]:
        ids = ids[1:]
    adds_bos = list(tokenizer("")["input_ids"])[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def with_eos(processing_class: Any, ids: list[int]) -> list[int]:
    """Ensure an EOS token at the end.

    Raises:
        DataError: the tokenizer has no EOS token.
    """
    eos = inner_tokenizer(processing_class).eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos_token, so no completion could end: set one.")
    return ids if ids[-1:] == [eos] else [*ids, int(eos)]


def tokenize_chat(
    processing_class: Any, text: str, spans: Sequence[tuple[int, int]], *, boundary: int | None = None
) -> tuple[list[int], list[bool], int]:
    """Tokenize a rendered conversation and mark the tokens within spans.

    Args:
        processing_class: a fast tokenizer, or a processor that has one.
        text: the full rendering; the template writes BOS, the tokenizer adds nothing.
        spans: [start, end) characters, ascending.
        boundary: offset of the end of the prompt; the tokens before it are those of the prompt alone.

    Returns:
        [T] token ids, [T] mask, number of tokens before `boundary` (0 without one).

    Raises:
        DataError: the tokenizer gives no offsets, or a token across an edge cannot be cut.
    """
    tokenizer = inner_tokenizer(processing_class)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} gives no character offsets: exact masks need a fast tokenizer.")
    ids, starts, ends = _encode(tokenizer, text)
    edges = {edge for span in spans for edge in span if 0 < edge < len(text)}
    cuts = {edge for edge in edges if any(s < edge < e for s, e in zip(starts, ends, strict=True))}
    if boundary and _encode(tokenizer, text[:boundary])[0] != ids[: sum(start < boundary for start in starts)]:
        cuts.add(boundary)
    if cuts:
        ids, starts = _encode_pieces(tokenizer, text, sorted(cuts), ids)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the template writes BOS and so does the first message
        ids, starts = ids[1:], starts[1:]
    lows = [low for low, _ in spans]
    mask = [(k := bisect_right(lows, start)) > 0 and start < spans[k - 1][1] for start in starts]
    return ids, mask, sum(start < boundary for start in starts) if boundary else 0


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return token ids with their start and end offsets; a space that the offsets skip belongs to the next token."""
    encoded = _called(tokenizer, text, return_offsets_mapping=True)
    starts: list[int] = []
    ends: list[int] = []
    previous = 0
    for start, end in encoded["offset_mapping"]:
        starts.append(min(start, previous))
        ends.append(max(end, previous))
        previous = max(previous, end)
    return list(encoded["input_ids"]), starts, ends


def _encode_pieces(tokenizer: Any, text: str, cuts: list[int], joint: list[int]) -> tuple[list[int], list[int]]:
    """Tokenize the pieces between cuts separately; returns ids and start offsets that still decode to the text."""
    ids: list[int] = []
    starts: list[int] = []
    edges = [0, *cuts, len(text)]
    for low, high in pairwise(edges):
        want = (
            decode_text(tokenizer, _encode(tokenizer, text[:high])[0])
            if high < len(text)
            else decode_text(tokenizer, joint)
        )
        piece, offsets = _piece_ids(tokenizer, ids, text[low:high], want)
        ids += piece
        starts += [low + offset for offset in offsets]
    return ids, starts


def _piece_ids(tokenizer: Any, head: list[int], piece: str, want: str) -> tuple[list[int], list[int]]:
    """Tokenize a piece of text after `head`, such that both together decode to `want`; returns ids and offsets.

    SentencePiece tokenizers prepend a space to a text, but not after a line break.
    """
    for anchor in ("", "\n") if head else ("",):
        ids, starts, _ = _encode(tokenizer, anchor + piece)
        skip = sum(start < len(anchor) for start in starts)
        if decode_text(tokenizer, head + ids[skip:]) == want:
            return ids[skip:], [start - len(anchor) for start in starts[skip:]]
    raise DataError(
        f"one token spans the edge before {piece[:20]!r} and the tokenizer cannot cut it there: move the edge to a "
        "word's start (a space belongs to the completion, not to the prompt's end)."
    )
