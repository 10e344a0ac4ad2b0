"""Encoding of reward model rows: pairs, ranked lists and labelled steps.

Scores are read at single tokens: `loss_mask` is True there and False elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from burnish.config.predicates import is_number
from burnish.data.encode import EncodeStats, preference_group, prompt_group, sft_group, shared_prompt
from burnish.data.formats import as_row, hint, refuse_mixed
from burnish.data.parsing import short
from burnish.data.tokenized import token_completion
from burnish.data.tokens import plain_ids
from burnish.errors import DataError
from burnish.types import Completion, Group

__all__ = ["RewardKind", "answer_group", "ranked_group", "read_last", "reward_group", "reward_kind", "stepwise_group"]

RewardKind: TypeAlias = Literal["preference", "ranked", "stepwise"]
"""Annotation in a row: the better of two completions, the order of several, or which steps are right."""

_FORMATS: tuple[tuple[RewardKind, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("preference", ("chosen_ids", "rejected_ids")),
    ("stepwise", ("prompt", "completions", "labels")),
    ("ranked", ("prompt", "completions")),
)


_TEXTS = ("chosen", "rejected", "completions")
_TOKENS = ("chosen_ids", "rejected_ids")


def reward_kind(row: Mapping[str, Any], index: int = 0) -> RewardKind:
    """Detect the kind of a row by its columns; a column that is None counts as missing.

    Raises:
        DataError: missing columns, or columns of two kinds.
    """
    row = as_row(row, index)
    present = {name for name, value in row.items() if value is not None}
    kinds: list[RewardKind] = [kind for kind, columns in _FORMATS if present.issuperset(columns)]
    if not kinds:
        needed = " | ".join(" + ".join(columns) for _, columns in _FORMATS)
        fix = hint(row, [columns for _, columns in _FORMATS], also=("prompt", "margin"))
        raise DataError(
            f"row {index} has the columns {sorted(map(str, present))}; reward modelling needs {needed}: {fix}."
        )
    tokenized = present.issuperset(_TOKENS)
    refuse_mixed(present, ("prompt", "prompt_ids", *_TEXTS, *_TOKENS), tokenized=tokenized, index=index)
    if tokenized and "prompt_ids" in present:
        raise DataError(
            f"row {index} has prompt_ids: here chosen_ids and rejected_ids are whole sequences; put the prompt's "
            "tokens in front of both, and drop the column."
        )
    if "preference" in kinds and len(kinds) > 1:
        raise DataError(f"row {index} has chosen, rejected and completions: drop the columns that you do not mean.")
    return kinds[0]


def reward_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    pad_token_id: int | None = None,
    chat_template: str | None = None,
    step_separator: str = "\n",
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a row of any kind as a group whose `loss_mask` marks where scores are read.

    Pairs may be given as token ids: `chosen_ids` and `rejected_ids` are whole sequences with a common prefix.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        pad_token_id: the padding token, where no score is read (see `read_last`).
        chat_template: see `resolve_chat_template`.
        step_separator: text at the end of every step of a stepwise row.
        stats: counters to add to.

    Raises:
        DataError: bad columns, an empty or duplicate completion, a bad margin, or labels that do not match the steps.
    """
    kind = reward_kind(row, index)
    if kind == "stepwise":
        _check_margin(row, index, kind)
        return stepwise_group(
            row, processing_class, index=index, separator=step_separator, chat_template=chat_template, stats=stats
        )
    if kind == "ranked":
        group = ranked_group(row, processing_class, index=index, chat_template=chat_template, stats=stats)
    elif row.get("chosen_ids") is not None:
        if stats is not None:
            stats.formats["tokenized preference"] += 1
        wholes = [token_completion(row, name, processing_class, index) for name in _TOKENS]
        group = Group(*shared_prompt(wholes), dict(row), index)
    else:
        group = preference_group(row, processing_class, index=index, chat_template=chat_template, stats=stats)
    _check_margin(row, index, kind)
    for number, completion in enumerate(group.completions):
        if not completion.text.strip():
            raise DataError(f"row {index}: completion {number} is empty: drop the row.")
    if len({tuple(completion.token_ids) for completion in group.completions}) < len(group.completions):
        raise DataError(f"row {index}: two completions are the same tokens, which has no learning signal: drop it.")
    return read_last(group, pad_token_id)


def ranked_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    chat_template: str | None = None,
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a `prompt` + `completions` row, plain or conversational, as one group, the best completion first.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        index: index of the row.
        chat_template: see `resolve_chat_template`.
        stats: counters to add to.

    Raises:
        DataError: fewer than two completions; see also `sft_group`.
    """
    ranked = row["completions"]
    if not isinstance(ranked, list) or len(cast("list[Any]", ranked)) < 2:
        raise DataError(f"row {index}: completions = {ranked!r:.80}: use a list of at least two, the best first.")
    if any(not isinstance(one, str | list) for one in cast("list[Any]", ranked)):
        raise DataError(f"row {index}: completions = {ranked!r:.80}: each must be a string, or a list of messages.")
    rest = {name: value for name, value in row.items() if name != "completions"}
    groups = [
        answer_group(
            {**rest, "completion": one}, processing_class, index=index, chat_template=chat_template, stats=stats
        )
        for one in cast("list[Any]", ranked)
    ]
    if any(group.prompt_ids != groups[0].prompt_ids for group in groups):
        raise DataError(
            f"row {index}: the chat template renders the prompt differently for different completions (it rewrites "
            "earlier turns): give all of them the same kind of turns, or set chat_template_kwargs."
        )
    return Group(groups[0].prompt_ids, [c for group in groups for c in group.completions], dict(row), index)


def answer_group(row: Mapping[str, Any], processing_class: Any, **options: Any) -> Group:
    """Encode a `prompt` + `completion` row as a group of one completion, tokenized like those of pairs and lists.

    Args:
        row: the row.
        processing_class: tokenizer or processor.
        options: `index`, `chat_template`, `stats` of `sft_group`.

    Raises:
        DataError: see `sft_group`.
    """
    group = sft_group(row, processing_class, **options)
    group.completions[0].loss_mask = None
    return group


def stepwise_group(
    row: Mapping[str, Any],
    processing_class: Any,
    *,
    index: int = 0,
    separator: str = "\n",
    chat_template: str | None = None,
    stats: EncodeStats | None = None,
) -> Group:
    """Encode a `prompt` + `completions` + `labels` row: the steps as one completion, scores read at the end of each.

    Each step and its separator are tokenized separately, so that its score does not depend on the text of later steps.

    Args:
        row: `completions` holds the steps (strings), `labels` a bool per step.
        processing_class: tokenizer or processor.
        index: index of the row.
        separator: text at the end of every step.
        chat_template: see `resolve_chat_template`.
        stats: counters to add to.

    Raises:
        DataError: no steps, an empty step, or labels that are not one bool per step.
    """
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s for s in cast("list[Any]", steps)):
        raise DataError(f"row {index}: completions = {steps!r:.80}: use a non-empty list of steps, none an empty text.")
    if not isinstance(labels, list) or not all(label in (True, False) for label in cast("list[Any]", labels)):
        raise DataError(f"row {index}: labels = {labels!r:.80}: use a list of true and false, one a step.")
    if len(cast("list[Any]", labels)) != len(cast("list[Any]", steps)):
        raise DataError(f"row {index}: {len(labels)} labels for {len(steps)} steps in completions: give each step one.")
    group = prompt_group(row, processing_class, index=index, chat_template=chat_template, stats=stats)
    ids: list[int] = []
    ends: list[int] = []
    for step in cast("list[str]", steps):
        piece = plain_ids(processing_class, step) + plain_ids(processing_class, separator)
        if not piece:
            raise DataError(f"row {index}: the step {step!r:.80} has no token: drop it.")
        ids += piece
        ends.append(len(ids) - 1)
    group.completions = [Completion(ids, _marks(len(ids), ends), separator.join(cast("list[str]", steps)))]
    return group


def read_last(group: Group, pad_token_id: int | None) -> Group:
    """Mark where transformers' sequence classifiers read a score: the last token that is not the padding token.

    If that token is part of the prompt (a completion of EOS alone, with EOS as padding), the end of the prompt moves
    into the completions; the sequences stay the same.

    Args:
        group: modified in position.
        pad_token_id: the padding token; None if there is none, so that the last token is read.

    Returns:
        The group.
    """

    def is_read(token: int) -> bool:
        return token != pad_token_id

    while group.prompt_ids and any(not any(map(is_read, c.token_ids)) for c in group.completions):
        token = group.prompt_ids.pop()
        for completion in group.completions:
            completion.token_ids.insert(0, token)
    for completion in group.completions:
        positions = [position for position, token in enumerate(completion.token_ids) if is_read(token)]
        # Where every token is padding, transformers reads the first one.
        completion.loss_mask = _marks(len(completion.token_ids), positions[-1:] or [0])
    return group


def _marks(length: int, positions: Sequence[int]) -> list[bool]:
    return [position in positions for position in range(length)]


_LARGEST_MARGIN = 1e30


def _check_margin(row: Mapping[str, Any], index: int, kind: RewardKind) -> None:
    margin = row.get("margin")
    if margin is None:
        return
    if kind != "preference":
        raise DataError(f"row {index}: margin belongs to chosen and rejected; drop the column from {kind} rows.")
    if not is_number(margin) or abs(margin) > _LARGEST_MARGIN:
        raise DataError(f"row {index}: margin = {short(margin)}: use a finite number.")
