"""Rows to groups: prompt tokens, completion tokens and loss masks, for every stage.

Boundaries. `prompt_ids` are always the tokens of the prompt alone, as at inference. Where they are a prefix of the
tokens of prompt and completion together, the completion is the remaining tokens; where a merge would cross the
boundary, the completion is tokenized separately.

BOS. A plain text begins with BOS where the tokenizer adds one, a rendered conversation where the template writes one;
never twice. EOS ends every plain text and plain completion; in conversations the template ends turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

from burnish.data.conversations import ChatRow, first_unscored, naming_row
from burnish.data.formats import (
    Format,
    Kind,
    as_row,
    detect_format,
    messages_of,
    row_tools,
    with_system,
)
from burnish.data.instructions import instruction_columns, instruction_row
from burnish.data.limits import TRUNCATIONS, EncodeStats, check_limit, report_encoding, truncate
from burnish.data.tokenized import is_masked_completion, token_completion, token_ids, token_sequence
from burnish.data.tokens import plain_ids, split_ids, with_bos, with_eos
from burnish.errors import ConfigError, DataError
from burnish.progress import phase
from burnish.types import Completion, Group

__all__ = [
    "EncodeStats",
    "encode_lazily",
    "encode_rows",
    "errors_of",
    "preference_group",
    "prompt_group",
    "report_encoding",
    "sft_group",
    "sft_groups",
    "shared_prompt",
    "unpaired_group",
]


class _SkippedRowError(DataError):
    """Row of which a limit leaves nothing; `encode_rows` counts and skips it."""


def encode_rows(
    encoder: Callable[..., Group | list[Group]],
    rows: Iterable[Mapping[str, Any]],
    processing_class: Any,
    *,
    stats: EncodeStats | None = None,
    name: str = "",
    **options: Any,
) -> list[Group]:
    """Encode rows; rows without tokens to learn from are skipped and counted.

    Args:
        encoder: `sft_group`, `sft_groups`, `preference_group`, `unpaired_group` or `prompt_group`.
        rows: the rows; a row's index becomes the index of its group.
        processing_class: tokenizer or processor.
        stats: counters to add to.
        name: name of the data set, for messages.
        options: options of the encoder.

    Raises:
        DataError: a row that cannot be encoded, no rows, or all rows skipped.
    """
    stats = EncodeStats() if stats is None else stats
    count = f"{len(rows):,} rows" if isinstance(rows, Sized) else "rows"
    with errors_of(name), phase(f"encoding {count} of {name}" if name else f"encoding {count}"):
        groups = list(encode_lazily(encoder, rows, processing_class, stats=stats, **options))
        report_encoding(stats, options, name=name)
    return groups


@contextmanager
def errors_of(name: str) -> Generator[None]:
    """Name the data set in errors about its rows."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from error


def encode_lazily(
    encoder: Callable[..., Group | list[Group]],
    rows: Iterable[Mapping[str, Any]],
    processing_class: Any,
    *,
    stats: EncodeStats,
    rank: int = 0,
    world: int = 1,
    **options: Any,
) -> Generator[Group]:
    """Encode rows one at a time; `report_encoding` reports what was skipped.

    Row i is encoded if i mod `world` equals `rank`; other arguments are those of `encode_rows`.
    """
    for index, row in islice(enumerate(rows), rank, None, world):
        stats.num_rows += 1
        try:
            made = encoder(row, processing_class, index=index, stats=stats, **options)
        except _SkippedRowError:
            stats.num_skipped_rows += 1
            continue
        made = made if isinstance(made, list) else [made]
        kept = [group for group in made if all(c.num_scored_tokens > 0 for c in group.completions)]
        stats.num_kept += len(kept)
        stats.num_skipped_rows += bool(made) and not kept
        stats.num_empty_completions += sum(
            bool(group.prompt_ids) and not c.text.strip() for group in kept for c in group.completions
        )
        yield from kept


def sft_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    max_length: int | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    chat_template: str | None = None,
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a `text`, `messages`, `prompt` + `completion`, `instruction` + `output` or `input_ids` row.

    Text and messages have an empty prompt. In a conversational completion only assistant turns are scored, not the
    tool results and user turns between them.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        max_length: maximum number of tokens of prompt and completion together; the right end is cut.
        completion_only_loss: score the completion only; None means True for prompt-completion rows.
        assistant_only_loss: score assistant turns only (conversational rows).
        chat_template: see `resolve_chat_template`.
        stats: counters to add to.

    Returns:
        A group of one completion, which may be without scored tokens (`encode_rows` skips it then).

    Raises:
        DataError: a bad format or template, or a boundary that cannot be made exact.
        ConfigError: a limit below 1, or a loss option that the row's format cannot honour.
    """
    row = _read_instruction(row, processing_class, index, chat_template, stats)
    row, fmt = _detected(row, "sft", index, stats)
    prompt_ids: list[int] = []
    if fmt.tokenized:
        completion = token_sequence(
            row,
            processing_class,
            index,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
    else:
        _check_loss_options(fmt, index, completion_only_loss, assistant_only_loss)
        paired = fmt.kind is Kind.PROMPT_COMPLETION and completion_only_loss is not False
        if fmt.conversational:
            chat = ChatRow(processing_class, row, index, chat_template)
            if paired:
                prompt_ids, completion = chat.pair(row["prompt"], row["completion"], stats)
            else:
                messages = [message for name in fmt.columns for message in row[name]]
                completion = chat.conversation(messages, assistant_only_loss, stats)
        else:
            with naming_row(index):
                prompt_ids, completion = _plain_sft(processing_class, row, fmt, paired)
    group = Group(prompt_ids, [completion], dict(row), index)
    truncate(group, max_length, stats)
    return group


def _read_instruction(
    row: Mapping[str, Any],
    processing_class: Any,
    index: int,
    chat_template: str | None,
    stats: EncodeStats | None,
    *,
    with_completion: bool = True,
) -> Mapping[str, Any]:
    """Add a prompt and a completion to a row of an instruction and its answer, as messages if there is a template."""
    columns = instruction_columns(row)
    if not columns:
        return row
    as_messages = bool(chat_template or getattr(processing_class, "chat_template", None))
    found = instruction_row(as_row(row, index), index, as_messages=as_messages)
    if stats is not None:
        kind = "messages of user and assistant" if as_messages else "plain texts"
        answer = f", completions from {columns[-1]}" if with_completion else ""
        stats.readings[f"prompts are read from {' and '.join(columns[:-1])}{answer}, as {kind}"] += 1
    return found if with_completion else {**row, "prompt": found["prompt"]}


def _check_loss_options(fmt: Format, index: int, completion_only_loss: bool | None, assistant_only_loss: bool) -> None:
    if assistant_only_loss and not fmt.conversational:
        raise ConfigError(
            f"assistant_only_loss = True, but row {index} is plain ({' + '.join(fmt.columns)}): use messages, or "
            "completion_only_loss."
        )
    if completion_only_loss and fmt.kind is not Kind.PROMPT_COMPLETION:
        raise ConfigError(
            f"completion_only_loss = True, but row {index} has no completion column ({fmt.columns[0]}): use "
            "assistant_only_loss for messages."
        )


def sft_groups(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    stats: EncodeStats | None = None,
    **options: Any,
) -> list[Group]:
    """Encode a row like `sft_group`, with a choice of how sequences above `max_length` tokens are truncated.

    - keep_start: keep the first tokens.
    - keep_end: keep the last tokens; the start of the prompt is cut first, and with it the BOS token.
    - drop: drop the row.
    - split: split a text or conversation into consecutive sequences; the first token of each is not scored.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        max_length: maximum number of tokens of prompt and completion together.
        truncation_mode: one of the above.
        stats: counters to add to.
        options: `completion_only_loss`, `assistant_only_loss`, `chat_template` of `sft_group`.

    Returns:
        No group (drop), one, or several (split).

    Raises:
        DataError, ConfigError: see `sft_group`; also a row with a completion under split.
    """
    check_limit("max_length", max_length)
    stats = EncodeStats() if stats is None else stats
    if truncation_mode == "split":
        fmt = None if instruction_columns(row) else detect_format(row, stage="sft", index=index)
        masked = is_masked_completion(row, options.get("completion_only_loss"))
        if fmt is None or fmt.kind is Kind.PROMPT_COMPLETION or (fmt.tokenized and masked):
            raise ConfigError(
                f"truncation_mode = 'split', but row {index} has a prompt and a completion: a later part would lose "
                "its prompt; use keep_start, keep_end or drop, or give rows of text."
            )
    group = sft_group(row, processing_class, index=index, stats=stats, **options)
    if max_length is None or group.num_tokens <= max_length:
        return [group]
    return TRUNCATIONS[truncation_mode](group, max_length, stats)


def _plain_sft(tokenizer: Any, row: Mapping[str, Any], fmt: Format, paired: bool) -> tuple[list[int], Completion]:
    if fmt.kind is Kind.LANGUAGE_MODELING:
        ids, text = _plain_text(tokenizer, row["text"]), row["text"]
    else:
        prompt_ids, completion = _plain_pair(tokenizer, row["prompt"], row["completion"])
        if paired:
            return prompt_ids, completion
        ids, text = prompt_ids + completion.token_ids, completion.text
    return [], Completion(ids, first_unscored(len(ids)), text)


def unpaired_group(row: Mapping[str, Any], processing_class: Any, *, index: int = 0, **options: Any) -> Group:
    """Encode a `prompt` + `completion` + `label` row as a group of one completion; the label stays in `Group.row`.

    Token ids may be given instead, as `prompt_ids` and `completion_ids`.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        options: `max_length`, `chat_template`, `stats` of `sft_group`.

    Raises:
        DataError: see `sft_group`; also a missing or invalid label.
    """
    if not detect_format(row, stage="unpaired", index=index).tokenized:
        return sft_group(row, processing_class, index=index, **options)
    _detected(row, "unpaired", index, options.get("stats"))
    completion = token_completion(row, "completion_ids", processing_class, index)
    group = Group(token_ids(row, "prompt_ids", index), [completion], dict(row), index)
    truncate(group, options.get("max_length"), options.get("stats"))
    return group


def preference_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    max_length: int | None = None,
    chat_template: str | None = None,
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a `chosen` + `rejected` row, with or without `prompt`, as a group of two completions, chosen first.

    Token ids may be given instead: `prompt_ids`, and `chosen_ids` and `rejected_ids` that follow it.

    Both completions share one prompt. Without a prompt column it is their common prefix: whole messages of
    conversations, tokens of plain texts.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        max_length: maximum number of tokens of the prompt and one completion together; the right end is cut.
        chat_template: see `resolve_chat_template`.
        stats: counters to add to.

    Raises:
        DataError: chosen equals rejected, a bad format or template, or a boundary that cannot be made exact.
        ConfigError: a limit below 1.
    """
    row, fmt = _detected(row, "preference", index, stats)
    if fmt.columns[-2:] == ("chosen", "rejected") and row["chosen"] == row["rejected"]:
        raise DataError(f"row {index}: chosen equals rejected, so the pair has no learning signal: drop the row.")
    if fmt.tokenized:
        prompt_ids = token_ids(row, "prompt_ids", index)
        completions = [token_completion(row, name, processing_class, index) for name in ("chosen_ids", "rejected_ids")]
    elif fmt.conversational:
        prompt_ids, completions = _chat_preference(processing_class, row, index, chat_template, stats)
    else:
        with naming_row(index):
            if row.get("prompt") is not None:
                pairs = [_plain_pair(processing_class, row["prompt"], row[name]) for name in _PAIR]
                prompt_ids, completions = pairs[0][0], [completion for _, completion in pairs]
            else:
                texts = [row[name] for name in _PAIR]
                wholes = [Completion(_plain_text(processing_class, text), text=text) for text in texts]
                prompt_ids, completions = shared_prompt(wholes)
    if completions[0].token_ids == completions[1].token_ids:
        raise DataError(
            f"row {index}: chosen and rejected are the same tokens, so the pair has no learning signal: drop the row."
        )
    group = Group(prompt_ids, completions, dict(row), index)
    truncate(group, max_length, stats)
    if completions[0].token_ids == completions[1].token_ids and completions[0].token_ids:
        if stats is not None:
            stats.num_equal_pairs += 1
        raise _SkippedRowError(
            f"row {index}: max_length = {max_length} cuts off every token in which chosen and rejected differ."
        )
    return group


def _detected(
    row: Mapping[str, Any], stage: str, index: int, stats: EncodeStats | None
) -> tuple[Mapping[str, Any], Format]:
    """Convert a row with `as_row`, detect its format and count it; tools are refused where no template renders them."""
    row = as_row(row, index)
    fmt = detect_format(row, stage=stage, index=index)
    if not fmt.conversational and row_tools(row, index):
        raise DataError(f"row {index} has tools, but its {fmt.columns[0]} is a string: use messages, or drop tools.")
    if stats is not None:
        values = "tokenized" if fmt.tokenized else "conversational" if fmt.conversational else "plain"
        stats.formats[f"{values} {fmt.kind.value}"] += 1
    return row, fmt


def _chat_preference(
    processing_class: Any,
    row: Mapping[str, Any],
    index: int,
    chat_template: str | None,
    stats: EncodeStats | None,
) -> tuple[list[int], list[Completion]]:
    chosen, rejected = messages_of(row["chosen"]), messages_of(row["rejected"])
    if row.get("prompt") is not None:
        prompt = messages_of(row["prompt"])
    else:
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        if shared is None:
            raise DataError(f"row {index}: one of chosen and rejected is a prefix of the other: give a prompt column.")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError(f"row {index}: chosen and rejected share no first message: give a prompt column.")
    chat = ChatRow(processing_class, row, index, chat_template)
    pairs = [chat.pair(prompt, completion, stats) for completion in (chosen, rejected)]
    if pairs[0][0] != pairs[1][0]:
        raise DataError(
            f"row {index}: the chat template renders the prompt of chosen and of rejected differently (it rewrites "
            "earlier turns or opens a reasoning block for one of them): give both the same kind of turns, or set "
            "chat_template_kwargs."
        )
    return pairs[0][0], [completion for _, completion in pairs]


_PAIR = ("chosen", "rejected")


def shared_prompt(wholes: list[Completion]) -> tuple[list[int], list[Completion]]:
    """Split two sequences into their common prefix and the rest of each."""
    both = [whole.token_ids for whole in wholes]
    shared = next((i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    for completion, ids in zip(wholes, both, strict=True):
        completion.token_ids = ids[shared:]
        if shared == 0:
            completion.loss_mask = first_unscored(len(ids))
    return both[0][:shared], wholes


def prompt_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    max_prompt_length: int | None = None,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a `prompt` row, or a row of an instruction and its answer, as a group without completions.

    The generation prompt ends a conversation, except where its last message is the assistant's, which the model then
    continues.

    Args:
        row: the row; all its columns stay in `Group.row`.
        processing_class: tokenizer or processor.
        index: identity of the prompt.
        max_prompt_length: maximum number of tokens; longer prompts are skipped, since a truncated problem is another
            problem.
        system_prompt: prepended to the messages; makes a plain prompt conversational.
        chat_template: see `resolve_chat_template`.
        chat_template_kwargs: template variables; those of the row take precedence.
        stats: counters to add to.

    Raises:
        DataError: a bad format or template, a second system prompt, or a prompt over the limit.
    """
    check_limit("max_prompt_length", max_prompt_length)
    row = _read_instruction(row, processing_class, index, chat_template, stats, with_completion=False)
    row, fmt = _detected(row, "prompt", index, stats)
    prompt: Any = row["prompt"]
    if system_prompt is not None:
        prompt = with_system(prompt, system_prompt, f"row {index}")
    if fmt.conversational or system_prompt is not None:
        ids = ChatRow(processing_class, row, index, chat_template, chat_template_kwargs).prompt(prompt)
    else:
        with naming_row(index):
            ids = with_bos(processing_class, plain_ids(processing_class, prompt))
    if max_prompt_length is not None and len(ids) > max_prompt_length:
        raise _SkippedRowError(
            f"row {index}: the prompt has {len(ids)} tokens, max_prompt_length = {max_prompt_length}: raise it, or "
            "drop the row (encode_rows skips and counts it)."
        )
    return Group(ids, [], dict(row), index)


def _plain_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], Completion]:
    """Tokenize a plain prompt and its completion, with BOS and EOS."""
    head, rest = split_ids(tokenizer, prompt, completion)
    return with_bos(tokenizer, head), Completion(with_eos(tokenizer, rest), text=completion)


def _plain_text(tokenizer: Any, text: str) -> list[int]:
    return with_eos(tokenizer, with_bos(tokenizer, plain_ids(tokenizer, text)))
