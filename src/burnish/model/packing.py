"""Pack groups into micro-batches: each prompt once, exactly n batches of balanced cost.

A packed row holds each group's prompt once, followed by its completions. Position ids restart at the prompt's length
for every completion, and prefix attention (`burnish.model.prefix`) isolates completions from each other, so the model
computes what it would on one row per completion.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence

import torch

from burnish.model.kept_prompt import KeptPrompt
from burnish.planner.memory import keeps_prompt
from burnish.types import Completion, Group, GroupSpan, PackedBatch

__all__ = [
    "continued",
    "group_cost",
    "halve",
    "pack",
    "partition",
    "split_by_tokens",
    "to_row",
    "unpack",
    "zero_weight_group",
]


def group_cost(group: Group, *, attention_tokens: float = 4096.0) -> float:
    """Estimate the relative cost of a group's forward and backward: linear layers plus attention.

    cost = T_g + K / attention_tokens, with T_g tokens in the group and K query-key pairs: linear layers cost the same
    for every token, attention grows with the number of keys.

    Args:
        group: prompt and completions.
        attention_tokens: number of keys whose attention costs as much as one token's linear layers.
    """
    prompt = len(group.prompt_ids)
    keys = prompt * prompt / 2 + sum(len(c.token_ids) * (prompt + len(c.token_ids) / 2) for c in group.completions)
    return group.num_tokens + keys / attention_tokens


def partition(groups: Sequence[Group], num_batches: int, *, whole: bool = False) -> list[list[Group]]:
    """Split groups into exactly `num_batches` lists of balanced cost (longest processing time first).

    Only where there are fewer groups than lists, groups are cut, costliest first, and their prompt is repeated: n
    micro-batches should need the memory of n micro-batches. Lists stay empty where there are fewer completions.

    Args:
        groups: P groups.
        num_batches: n, at least 1.
        whole: do not cut groups, whose completions share a loss.

    Returns:
        n lists that hold every completion once, with groups in their given order.
    """
    assert num_batches >= 1
    pieces = list(groups)
    while not whole and 0 < len(pieces) < num_batches:
        largest = max(range(len(pieces)), key=lambda i: (len(pieces[i].completions), group_cost(pieces[i])))
        if len(pieces[largest].completions) < 2:
            break
        pieces[largest : largest + 1] = halve(pieces[largest])
    order = sorted(range(len(pieces)), key=lambda i: -group_cost(pieces[i]))
    heap = [(0.0, batch) for batch in range(num_batches)]
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    for i in order:
        load, batch = heapq.heappop(heap)
        batches[batch].append(i)
        heapq.heappush(heap, (load + group_cost(pieces[i]), batch))
    return [[pieces[i] for i in sorted(batch)] for batch in batches]


def halve(group: Group) -> list[Group]:
    """Cut a group of at least two completions between them."""
    middle = (len(group.completions) + 1) // 2
    return [
        Group(group.prompt_ids, part, group.row, group.index)
        for part in (group.completions[:middle], group.completions[middle:])
    ]


def split_by_tokens(
    groups: Sequence[Group], token_budget: int | None, *, whole: bool = False, keep_prompts: bool = False
) -> list[list[Group]]:
    """Split groups into the fewest balanced lists of at most `token_budget` packed tokens each.

    A group over the budget is cut between completions. A single completion with its prompt is never cut, so its list
    may exceed the budget.

    Args:
        groups: P groups.
        token_budget: most tokens of one list, or None for no limit.
        whole: do not cut groups; one over the budget gets its own list.
        keep_prompts: compute the prompt of a group that is cut once, where that is worth a pass of its own: the group's
            pieces come first, each in its own list, and share a `KeptPrompt`.

    Returns:
        Non-empty lists; none without groups.
    """
    if not groups:
        return []
    if token_budget is None:
        return [list(groups)]
    alone: list[Group] = []
    together: list[Group] = []
    for group in groups:
        pieces = [group] if whole else _cut(group, token_budget)
        if keep_prompts and keeps_prompt(len(group.prompt_ids), len(pieces)):
            alone += continued(pieces)
        else:
            together += pieces
    return [[piece] for piece in alone] + _balanced(together, token_budget, whole=whole)


def continued(pieces: Sequence[Group]) -> list[Group]:
    """Let the pieces of a group continue a kept prompt with its last token."""
    prompt_ids = pieces[0].prompt_ids
    prompt = KeptPrompt(prompt_ids[:-1], len(pieces))
    return [dataclasses.replace(piece, prompt_ids=prompt_ids[-1:], kept_prompt=prompt) for piece in pieces]


def _balanced(pieces: list[Group], token_budget: int, *, whole: bool) -> list[list[Group]]:
    if not pieces:
        return []
    count = max(1, -(-sum(p.num_tokens for p in pieces) // token_budget))
    while count < len(pieces):
        lists = partition(pieces, count, whole=whole)
        if all(sum(p.num_tokens for p in part) <= token_budget or len(part) <= 1 for part in lists):
            return lists
        count += 1
    return [[piece] for piece in pieces]


def _cut(group: Group, token_budget: int) -> list[Group]:
    if group.num_tokens <= token_budget or len(group.completions) < 2:
        return [group]
    return [piece for half in halve(group) for piece in _cut(half, token_budget)]


def zero_weight_group(token_id: int) -> Group:
    """Make a minimal group without scored tokens, for ranks without work to take part in collective calls."""
    return Group([token_id], [Completion([token_id], loss_mask=[False])])


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Pack groups into one row, with a tensor for every stream of any completion.

    Args:
        groups: at least one group with at least one token.

    Returns:
        A `PackedBatch`; streams are fp32, and NaN for completions that lack them.
    """
    ids: list[int] = []
    positions: list[int] = []
    spans: list[GroupSpan] = []
    score_index: list[int] = []
    targets: list[int] = []
    sequence_index: list[int] = []
    completions = [completion for group in groups for completion in group.completions]
    sampled = ("sampler_logprobs", "policy_logprobs")
    streams = [
        {name: values for name in sampled if (values := getattr(c, name)) is not None} | c.token for c in completions
    ]
    token_values: dict[str, list[float]] = {name: [] for stream in streams for name in stream}
    number = 0
    kept_prompt = groups[0].kept_prompt
    kept = 0 if kept_prompt is None else kept_prompt.num_tokens
    assert not kept or len(groups) == 1
    for group in groups:
        prompt_start, prompt_length = len(ids), len(group.prompt_ids)
        ids += group.prompt_ids
        positions += range(kept, kept + prompt_length)
        parts: list[tuple[int, int]] = []
        for completion in group.completions:
            start, length = len(ids), len(completion.token_ids)
            ids += completion.token_ids
            positions += range(kept + prompt_length, kept + prompt_length + length)
            parts.append((start, length))
            scored = _scored_tokens(completion, has_prompt=prompt_length > 0)
            score_index += [start + j - 1 if j else prompt_start + prompt_length - 1 for j in scored]
            targets += [completion.token_ids[j] for j in scored]
            sequence_index += [number] * len(scored)
            for name, values in token_values.items():
                stream = streams[number].get(name)
                values += [math.nan] * len(scored) if stream is None else [stream[j] for j in scored]
            number += 1
        spans.append(GroupSpan((prompt_start - kept, kept + prompt_length), tuple(parts)))
    names = {name for completion in completions for name in completion.sequence}
    return PackedBatch(
        input_ids=torch.tensor([ids], dtype=torch.long),
        position_ids=torch.tensor([positions], dtype=torch.long),
        spans=tuple(spans),
        score_index=torch.tensor(score_index, dtype=torch.long),
        target_ids=torch.tensor(targets, dtype=torch.long),
        sequence_index=torch.tensor(sequence_index, dtype=torch.long),
        num_sequences=number,
        token={name: torch.tensor(values, dtype=torch.float32) for name, values in token_values.items()},
        sequence={
            name: torch.tensor([c.sequence.get(name, math.nan) for c in completions], dtype=torch.float32)
            for name in names
        },
        kept_prompt=kept_prompt,
    )


def unpack(groups: Sequence[Group], values_N: Sequence[float], *, fill: float = 0.0) -> list[list[float]]:
    """Split values of scored tokens by completion: the inverse of `pack`.

    Args:
        groups: the packed groups.
        values_N: [N] values in the order of the packed row.
        fill: value of tokens that are not scored.

    Returns:
        [C] values for each completion, in the order of the groups.
    """
    rest = iter(values_N)
    result: list[list[float]] = []
    for group in groups:
        for completion in group.completions:
            values = [fill] * len(completion.token_ids)
            for j in _scored_tokens(completion, has_prompt=bool(group.prompt_ids)):
                values[j] = next(rest)
            result.append(values)
    assert next(rest, None) is None
    return result


def _scored_tokens(completion: Completion, *, has_prompt: bool) -> list[int]:
    """Return the indices of scored tokens; without a prompt, nothing predicts the first token."""
    first = 0 if has_prompt else 1
    if completion.loss_mask is None:
        return list(range(first, len(completion.token_ids)))
    return [j for j in range(first, len(completion.token_ids)) if completion.loss_mask[j]]


def to_row(batch: PackedBatch, *, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unpack a batch into one right-padded row per completion, for models without prefix attention.

    Returns:
        input_ids [S, L], attention_mask [S, L] and score_index [N] into the flattened [S * L] rows.
    """
    flat_ids = batch.input_ids[0]
    sources: list[torch.Tensor] = []
    for span in batch.spans:
        prompt = torch.arange(span.prompt[0], span.prompt[0] + span.prompt[1])
        sources += [torch.cat([prompt, torch.arange(start, start + length)]) for start, length in span.completions]
    longest = max(len(source) for source in sources)
    input_ids = flat_ids.new_full((len(sources), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    column_of = torch.full((len(sources), batch.num_tokens), -1, dtype=torch.long)
    for row, source in enumerate(sources):
        input_ids[row, : len(source)] = flat_ids[source.to(flat_ids.device)]
        attention_mask[row, : len(source)] = 1
        column_of[row, source] = torch.arange(len(source))
    sequence_index, score_index = batch.sequence_index.cpu(), batch.score_index.cpu()
    columns = column_of[sequence_index, score_index]
    assert bool((columns >= 0).all())
    return input_ids, attention_mask, (sequence_index * longest + columns).to(flat_ids.device)
