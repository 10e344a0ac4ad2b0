"""Adaptive coefficient of the entropy bonus."""

from __future__ import annotations

__all__ = ["adapted_entropy_coef"]


def adapted_entropy_coef(
    coef: float, entropy: float, *, target: float, minimum: float, maximum: float, delta: float
) -> float:
    r"""Update the coefficient of the entropy bonus by Skywork-OR1's controller (2505.22312).

    .. math::
        \alpha_{k+1} = \begin{cases}
            \min(\alpha_k + \delta, \alpha_{max}) & H_k \le H^* \\
            \max(\alpha_k - \delta, \alpha_{min}) & H_k > H^*
        \end{cases}

    Args:
        coef: alpha_k, the current coefficient.
        entropy: H_k, mean entropy of the step's tokens, in nats.
        target: H^*, in nats.
        minimum: lower bound of the coefficient.
        maximum: upper bound of the coefficient.
        delta: step size.

    Returns:
        alpha_{k+1}.
    """
    return min(coef + delta, maximum) if entropy <= target else max(coef - delta, minimum)
