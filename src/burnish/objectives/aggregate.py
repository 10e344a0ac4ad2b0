"""Reduce per-token values to a scalar: the only place where a loss is divided by its denominator."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Reduction", "aggregate", "sequence_means", "sequence_sums"]

Reduction = Literal["token", "sequence", "sum", "constant"]


def sequence_sums(values_N: torch.Tensor, sequence_index_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Sum per-token values over each sequence.

    Args:
        values_N: [N] per-token values.
        sequence_index_N: [N] sequence of each token, 0 .. S-1.
        num_sequences: S.

    Returns:
        [S] sums; 0 for a sequence without tokens.
    """
    return values_N.new_zeros(num_sequences).index_add(0, sequence_index_N, values_N)


def sequence_means(values_N: torch.Tensor, sequence_index_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Average per-token values over each sequence.

    Args:
        values_N: [N] per-token values.
        sequence_index_N: [N] sequence of each token, 0 .. S-1.
        num_sequences: S.

    Returns:
        [S] means; 0 for a sequence without tokens.
    """
    lengths_S = sequence_sums(torch.ones_like(values_N), sequence_index_N, num_sequences)
    return sequence_sums(values_N, sequence_index_N, num_sequences) / lengths_S.clamp(min=1)


def aggregate(
    values_N: torch.Tensor,
    *,
    sequence_index_N: torch.Tensor,
    num_sequences: int,
    reduction: Reduction,
    denominator: float,
) -> torch.Tensor:
    r"""Reduce per-token values with a global denominator D.

    .. math::
        \text{token, sum, constant: } \frac1D \sum_t v_t \qquad
        \text{sequence: } \frac1D \sum_s \frac1{|s|} \sum_{t \in s} v_t

    D is counted over the whole optimizer step, all micro-batches and ranks: scored tokens (token; BNPO, DAPO
    2503.14476), sequences (sequence; GRPO 2402.03300; sum: LUSPO 2602.05261), or sequences times the length limit
    (constant; Dr. GRPO 2503.20783). The results of micro-batches therefore add up to the step's, however it is split.

    Args:
        values_N: [N] per-token values.
        sequence_index_N: [N] sequence of each token, 0 .. S-1; a sequence is never split between calls.
        num_sequences: S.
        reduction: as above.
        denominator: D, positive.

    Returns:
        Scalar: this batch's contribution to the step's mean.
    """
    assert values_N.shape == sequence_index_N.shape and denominator > 0
    if reduction != "sequence":
        return values_N.sum() / denominator
    return sequence_means(values_N, sequence_index_N, num_sequences).sum() / denominator
