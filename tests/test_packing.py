"""Packing: every token once, prompts shared, exactly n balanced batches."""

from __future__ import annotations

import math
import random

import pytest
import torch

from burnish.model.packing import group_cost, pack, partition, split_by_tokens, to_row, unpack, zero_weight_group
from burnish.training.step import scored_tokens
from burnish.types import Completion, Group


def group(prompt: int, *lengths: int, start: int = 0) -> Group:
    ids = iter(range(start, start + 10_000))
    return Group([next(ids) for _ in range(prompt)], [Completion([next(ids) for _ in range(n)]) for n in lengths])


def test_pack_lays_each_prompt_once_and_scores_from_the_token_before() -> None:
    batch = pack([group(3, 2, 1), group(2, 3, start=100)])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3, 4]]
    assert batch.target_ids.tolist() == [3, 4, 5, 102, 103, 104]
    # The last prompt token (place 2) predicts the first token of both completions of the first group.
    assert batch.score_index.tolist() == [2, 3, 2, 7, 8, 9]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.num_sequences == 3
    assert [(s.prompt, s.completions) for s in batch.spans] == [((0, 3), ((3, 2), (5, 1))), ((6, 2), ((8, 3),))]


def test_pack_honours_loss_masks_and_never_scores_what_nothing_predicts() -> None:
    text = Group([], [Completion([7, 8, 9], token={"x": [70.0, 80.0, 90.0]})])
    masked = Group([1], [Completion([2, 3, 4], loss_mask=[False, True, False], token={"x": [20.0, 30.0, 40.0]})])
    batch = pack([text, masked])
    assert batch.target_ids.tolist() == [8, 9, 3]
    assert batch.token["x"].tolist() == [80.0, 90.0, 30.0]


def test_streams_are_unknown_where_a_completion_lacks_them() -> None:
    known = Completion([1, 2], policy_logprobs=[-0.5, -1.0], token={"kl": [0.25, 0.5]}, sequence={"advantages": 2.0})
    batch = pack([Group([9], [Completion([3]), known, Completion([4], token={"kl": [1.0]})])])
    assert batch.token.keys() == {"policy_logprobs", "kl"}
    torch.testing.assert_close(batch.token["kl"], torch.tensor([math.nan, 0.25, 0.5, 1.0]), equal_nan=True)
    expected = torch.tensor([math.nan, -0.5, -1.0, math.nan])
    torch.testing.assert_close(batch.token["policy_logprobs"], expected, equal_nan=True)
    torch.testing.assert_close(batch.sequence["advantages"], torch.tensor([math.nan, 2.0, math.nan]), equal_nan=True)


def test_a_denominator_counts_what_is_scored() -> None:
    """The count comes before packing, and must say how many tokens packing scores."""
    rows = [
        Group([], [Completion([7, 8, 9])]),
        Group([], [Completion([7, 8, 9], loss_mask=[False, True, True]), Completion([7], loss_mask=[True])]),
        Group([1], [Completion([2, 3, 4], loss_mask=[False, True, False]), Completion([5, 6])]),
    ]
    assert [scored_tokens(row) for row in rows] == [2, 2, 3]
    assert [pack([row]).num_scored_tokens for row in rows] == [2, 2, 3]


def test_unpack_is_the_way_back() -> None:
    rows = [
        Group([], [Completion([7, 8, 9])]),
        Group([1], [Completion([2, 3, 4], loss_mask=[False, True, False]), Completion([5, 6])]),
    ]
    for completion in (completion for row in rows for completion in row.completions):
        completion.token["x"] = [float(token) for token in completion.token_ids]
    batch = pack(rows)
    assert unpack(rows, batch.token["x"].tolist(), fill=-1.0) == [[-1, 8, 9], [-1, 3, -1], [5, 6]]
    assert unpack([], []) == []


def test_rows_hold_the_same_scored_tokens() -> None:
    batch = pack([group(3, 2, 4), group(0, 3, start=50), group(5, 1, start=100)])
    ids, mask, index = to_row(batch, pad_token_id=0)
    assert ids.shape == (4, 7)
    assert mask.sum(1).tolist() == [5, 7, 3, 6]
    assert torch.equal(ids.reshape(-1)[index + 1], batch.target_ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("number", [1, 2, 3, 7, 20])
def test_partition_gives_exactly_n_batches_that_hold_everything_once(seed: int, number: int) -> None:
    rng = random.Random(seed)
    groups = [group(rng.randint(1, 9), *[rng.randint(1, 9) for _ in range(4)], start=1000 * i) for i in range(4)]
    parts = partition(groups, number)
    assert len(parts) == number
    got = sorted(tuple(c.token_ids) for part in parts for g in part for c in g.completions)
    assert got == sorted(tuple(c.token_ids) for g in groups for c in g.completions)
    if number <= len(groups):
        assert all(len(g.completions) == 4 for part in parts for g in part), "no group is cut without need"


def test_partition_balances() -> None:
    groups = [group(10, *[n] * 4) for n in (40, 30, 20, 20, 10, 10)]
    loads = [sum(map(group_cost, part)) for part in partition(groups, 2)]
    assert max(loads) / min(loads) < 1.15


def test_more_batches_than_completions_leaves_some_empty() -> None:
    parts = partition([group(2, 1, 1)], 5)
    assert sorted(len(part) for part in parts) == [0, 0, 0, 1, 1]
    assert partition([], 2) == [[], []]


def test_split_by_tokens_keeps_the_budget_and_cuts_only_between_completions() -> None:
    groups = [group(10, 30, 30, 30), group(5, 5), group(5, 200)]
    parts = split_by_tokens(groups, 80)
    sizes = [sum(g.num_tokens for g in part) for part in parts]
    assert sorted(s for s in sizes if s > 80) == [205], "one completion is never cut"
    assert sum(len(g.completions) for part in parts for g in part) == 5
    assert len(split_by_tokens(groups, None)) == 1


def test_zero_weight_group_scores_nothing() -> None:
    assert pack([zero_weight_group(3)]).num_scored_tokens == 0


def test_batch_is_a_mapping_and_keeps_dtypes() -> None:
    row = group(2, 2)
    row.completions[0].sequence["advantages"] = 0.5
    batch = pack([row]).to("cpu")
    assert "input_ids" in batch
    assert batch["input_ids"] is batch.input_ids
    assert batch.sequence["advantages"].dtype == torch.float32
    with pytest.raises(KeyError):
        batch["nope"]
