r"""Reward-model losses: from scalar scores of completions or steps to one loss per comparison.

r is a score, sigma the logistic function; y_w is chosen, y_l rejected. Dimension letters: P comparisons (pairs or
ranked lists), G completions of one comparison, N scored steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = [
    "bradley_terry",
    "calibration_bins",
    "calibration_error",
    "centering",
    "plackett_luce",
    "step_cross_entropy",
]


def bradley_terry(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, margin_P: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Negative log-likelihood of a preference under the Bradley-Terry model (2203.02155).

    .. math:: -\log \sigma(r_w - r_l - m)

    Args:
        chosen_P: [P] scores of the chosen completions.
        rejected_P: [P] scores of the rejected completions.
        margin_P: [P] m, the target margin (2307.09288); None means 0.

    Returns:
        [P] losses in nats, not reduced.
    """
    assert chosen_P.shape == rejected_P.shape
    difference_P = chosen_P - rejected_P
    return -F.logsigmoid(difference_P if margin_P is None else difference_P - margin_P)


def plackett_luce(scores_PG: torch.Tensor) -> torch.Tensor:
    r"""Negative log-likelihood of a ranking under the Plackett-Luce model (Bradley-Terry for two completions).

    .. math:: -\sum_{i=1}^{G} \Big[ r_i - \log \sum_{j \ge i} e^{r_j} \Big]

    Args:
        scores_PG: [P, G] scores, the best completion first.

    Returns:
        [P] losses in nats, not reduced.
    """
    assert scores_PG.ndim == 2
    return (scores_PG.flip(-1).logcumsumexp(-1).flip(-1) - scores_PG).sum(-1)


def centering(scores_PG: torch.Tensor, *, coefficient: float) -> torch.Tensor:
    r"""Regularise scores towards mean 0: the ranking likelihood is invariant to a shift (2312.09244).

    .. math:: c\, \Big( \sum_i r_i \Big)^2, \quad \text{for a pair: } c\,(r_w + r_l)^2

    Args:
        scores_PG: [P, G] scores.
        coefficient: c, at least 0.

    Returns:
        [P] losses, not reduced.
    """
    assert scores_PG.ndim == 2
    return coefficient * scores_PG.sum(-1) ** 2


def step_cross_entropy(scores_N: torch.Tensor, correct_N: torch.Tensor) -> torch.Tensor:
    r"""Binary cross-entropy of process-reward scores at step ends (2305.20050).

    .. math:: -y \log \sigma(r) - (1 - y) \log \sigma(-r)

    Args:
        scores_N: [N] score at the last token of each step.
        correct_N: [N] y: 1 (or True) for a correct step, 0 for an incorrect one.

    Returns:
        [N] losses in nats, not reduced.
    """
    assert scores_N.shape == correct_N.shape
    return F.binary_cross_entropy_with_logits(scores_N, correct_N.to(scores_N.dtype), reduction="none")


def calibration_bins(probabilities_N: torch.Tensor, outcomes_N: torch.Tensor, *, num_bins: int = 10) -> torch.Tensor:
    """Count predictions in bins of equal width; bins add up over batches and ranks.

    Args:
        probabilities_N: [N] predicted probability that the outcome is 1, in [0, 1].
        outcomes_N: [N] 0 or 1.
        num_bins: B.

    Returns:
        [3, B] float64: number of predictions, sum of their probabilities, sum of their outcomes.
    """
    assert probabilities_N.shape == outcomes_N.shape
    wide_N = probabilities_N.double()
    bin_N = (wide_N * num_bins).long().clamp(max=num_bins - 1)
    values = torch.stack((torch.ones_like(wide_N), wide_N, outcomes_N.double()))
    return values.new_zeros(3, num_bins).index_add(1, bin_N, values)


def calibration_error(bins_3B: torch.Tensor) -> float:
    r"""Expected calibration error (1706.04599).

    .. math:: \sum_b \frac{|b|}{N} \big| \bar y_b - \bar p_b \big|

    Args:
        bins_3B: [3, B] of `calibration_bins`.

    Returns:
        A number in [0, 1]; 0 without predictions.
    """
    count_B, probability_B, outcome_B = bins_3B
    return float((outcome_B - probability_B).abs().sum() / count_B.sum().clamp(min=1))
