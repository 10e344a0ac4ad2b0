"""Groups to packed micro-batches: each prompt once, exactly n batches balanced by cost.

A packed row lays each group's prompt down once and its completions after it. Position ids restart at the prompt's
length for every completion, so the model sees what it would have seen on one row per completion; prefix attention
(`burnish.model.prefix`) keeps the completions apart.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from burnish.types import Completion, Group, GroupSpan, PackedBatch

__all__ = ["group_cost", "pack", "partition", "split_by_tokens", "to_row", "unpack", "zero_weight_group"]


def group_cost(group: Group, *, attention_tokens: float = 4096.0) -> float:
    """Relative cost of a group's forward and backward: linear layers plus attention.

    With T_g tokens in the group and K keys seen by all of them together, cost = T_g + K / attention_tokens: linear
    layers cost the same for every token, attention grows with the keys that a token sees.

    Args:
        group: prompt and completions.
        attention_tokens: number of keys whose attention costs as much as the linear layers of one token.
    """
    prompt = len(group.prompt_ids)
    keys = prompt * prompt / 2 + sum(len(c.token_ids) * (prompt + len(c.token_ids) / 2) for c in group.completions)
    return group.num_tokens + keys / attention_tokens


def partition(groups: Sequence[Group], num_batches: int, *, whole: bool = False) -> list[list[Group]]:
    """Split groups into exactly `num_batches` lists of balanced cost (longest first, to the lightest list).

    A group is cut (its prompt then stands in both parts) only while there are fewer groups than lists, costliest group
    first: a caller who asks for n micro-batches wants the memory of n micro-batches. Lists may stay empty when there
    are fewer completions than lists.

    Args:
        groups: P groups.
        num_batches: n, at least 1.
        whole: cut no group: its completions meet in one loss.

    Returns:
        n lists that together hold every completion once, groups in their given order.
    """
    assert num_batches >= 1
    pieces = list(groups)
    while not whole and 0 < len(pieces) < num_batches:
        largest = max(range(len(pieces)), key=lambda i: (len(pieces[i].completions), group_cost(pieces[i])))
        if len(pieces[largest].completions) < 2:
            break
        pieces[largest : largest + 1] = _halve(pieces[largest])
    order = sorted(range(len(pieces)), key=lambda i: -group_cost(pieces[i]))
    heap = [(0.0, batch) for batch in range(num_batches)]
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    for i in order:
        load, batch = heapq.heappop(heap)
        batches[batch].append(i)
        heapq.heappush(heap, (load + group_cost(pieces[i]), batch))
    return [[pieces[i] for i in sorted(batch)] for batch in batches]


def _halve(group: Group) -> list[Group]:
    middle = (len(group.completions) + 1) // 2
    return [
        Group(group.prompt_ids, part, group.row, group.index)
        for part in (group.completions[:middle], group.completions[middle:])
    ]


def split_by_tokens(groups: Sequence[Group], token_budget: int | None, *, whole: bool = False) -> list[list[Group]]:
    """Split groups into as few balanced lists as keep each within `token_budget` packed tokens.

    A group over the budget is cut between completions; one completion with its prompt is never cut, so a list that
    holds a single too long completion may exceed the budget.

    Args:
        groups: P groups.
        token_budget: most tokens of one list, or None for no limit.
        whole: cut no group; one over the budget has a list of its own.

    Returns:
        Lists that each hold at least one group; none where there are no groups.
    """
    if not groups:
        return []
    if token_budget is None:
        return [list(groups)]
    pieces = list(groups) if whole else [piece for group in groups for piece in _cut(group, token_budget)]
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
    return [piece for half in _halve(group) for piece in _cut(half, token_budget)]


def zero_weight_group(token_id: int) -> Group:
    """A smallest group with one token and nothing scored: keeps ranks and counts in step when there is no work."""
    return Group([token_id], [Completion([token_id], loss_mask=[False])])


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay groups into one row, with a tensor for every stream that any of the completions carries.

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
    streams = [_token_streams(completion) for completion in completions]
    token_values: dict[str, list[float]] = {name: [] for stream in streams for name in stream}
    number = 0
    for group in groups:
        prompt_start, prompt_length = len(ids), len(group.prompt_ids)
        ids += group.prompt_ids
        positions += range(prompt_length)
        places: list[tuple[int, int]] = []
        for completion in group.completions:
            start, length = len(ids), len(completion.token_ids)
            ids += completion.token_ids
            positions += range(prompt_length, prompt_length + length)
            places.append((start, length))
            scored = _scored_tokens(completion, has_prompt=prompt_length > 0)
            score_index += [start + j - 1 if j else prompt_start + prompt_length - 1 for j in scored]
            targets += [completion.token_ids[j] for j in scored]
            sequence_index += [number] * len(scored)
            for name, values in token_values.items():
                own = streams[number].get(name)
                values += [math.nan] * len(scored) if own is None else [own[j] for j in scored]
            number += 1
        spans.append(GroupSpan((prompt_start, prompt_length), tuple(places)))
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
    )


def _token_streams(completion: Completion) -> dict[str, list[float]]:
    """Return the streams of a completion with those that its engine gave."""
    sampled = {"sampler_logprobs": completion.sampler_logprobs, "policy_logprobs": completion.policy_logprobs}
    return {name: values for name, values in sampled.items() if values is not None} | completion.token


def unpack(groups: Sequence[Group], values_N: Sequence[float], *, fill: float = 0.0) -> list[list[float]]:
    """Give numbers of scored tokens back to their completions: the way back from `pack`.

    Args:
        groups: what was packed.
        values_N: [N] numbers in the order of the packed row.
        fill: number of the tokens that are not scored.

    Returns:
        [C] numbers for each completion, in the order of the groups.
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
    """Places of the scored tokens; without a prompt nothing predicts the first token, so it is never scored."""
    first = 0 if has_prompt else 1
    if completion.loss_mask is None:
        return list(range(first, len(completion.token_ids)))
    return [j for j in range(first, len(completion.token_ids)) if completion.loss_mask[j]]


def to_row(batch: PackedBatch, *, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same batch as one right-padded row per completion, for models that cannot serve prefix attention.

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
    row_of = torch.full((len(sources), batch.num_tokens), -1, dtype=torch.long)
    for row, source in enumerate(sources):
        input_ids[row, : len(source)] = flat_ids[source.to(flat_ids.device)]
        attention_mask[row, : len(source)] = 1
        row_of[row, source] = torch.arange(len(source))
    sequence_index, score_index = batch.sequence_index.cpu(), batch.score_index.cpu()
    places = row_of[sequence_index, score_index]
    assert bool((places >= 0).all())
    return input_ids, attention_mask, (sequence_index * longest + places).to(flat_ids.device)
