r"""Preference losses: from the log-probabilities of chosen and rejected completions to one loss per pair.

For a pair with prompt x, chosen y_w and rejected y_l:

.. math::
    \rho_w = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}, \quad \rho_l = \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}, \quad
    \Delta = g(\rho_w) - g(\rho_l)

sigma (s in the table) is the logistic function, eps the label smoothing and |y| a length in scored tokens; g follows
from the regularising divergence (the identity for the reverse KL; see `divergence_score`). Dimension letter: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

__all__ = [
    "PREFERENCE_LOSSES",
    "Divergence",
    "Pairs",
    "PreferenceLoss",
    "PreferenceOptions",
    "divergence_score",
    "kto_losses",
    "pair_metrics",
    "pairs_of",
]

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_LARGEST_EXPONENT = 80.0
"""exp overflows fp32 soon above this."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Inputs of the losses.

    Attributes:
        chosen: [P] sums of log-probabilities of the chosen completions' scored tokens.
        rejected: [P] the same for the rejected completions.
        ref_chosen: [P] `chosen` under the reference; zeros for a reference-free loss.
        ref_rejected: [P] the same for the rejected completions.
        chosen_tokens: [P] number of scored tokens of the chosen completions.
        rejected_tokens: [P] the same for the rejected completions.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """[P] rho_w."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """[P] rho_l."""
        return self.rejected - self.ref_rejected


@dataclass(frozen=True, slots=True)
class PreferenceOptions:
    """Hyperparameters of the losses, with TRL's names and defaults.

    Attributes:
        beta: strength of the pull towards the reference; IPO's tau; scale of the margin in reference-free losses.
        label_smoothing: eps, the assumed fraction of wrong labels, below 0.5.
        f_divergence_type: the regularising divergence, see `divergence_score`.
        f_alpha_divergence_coef: alpha of the alpha-divergence.
        simpo_gamma: target margin of SimPO, in units of beta times log-probability.
        alpha: exponent of AlphaPO's reward.
        discopop_tau: temperature of DiscoPOP's blend.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    simpo_gamma: float = 0.5
    alpha: float = 0.25
    discopop_tau: float = 0.05


def divergence_score(log_ratio: torch.Tensor, kind: Divergence, coef: float) -> torch.Tensor:
    r"""Score g(rho) = f'(e^rho) of f-DPO (2309.16240), up to a constant that cancels in Delta.

    .. math::
        \text{reverse KL: } \rho \qquad \text{forward KL: } 1 - e^{-\rho} \qquad
        \text{JS: } \log 2 + \log\sigma(\rho) \qquad \alpha\text{: } \frac{e^{(\alpha-1)\rho} - 1}{\alpha - 1}

    Args:
        log_ratio: rho, any shape.
        kind: the divergence between policy and reference.
        coef: alpha, for the alpha-divergence; 1 is the reverse KL.

    Returns:
        g(rho), of the same shape.
    """
    match kind:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return 1 - torch.exp((-log_ratio).clamp(max=_LARGEST_EXPONENT))
        case "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratio)
        case "alpha_divergence":
            if abs(coef - 1) < 1e-6:
                return log_ratio
            return torch.expm1(((coef - 1) * log_ratio).clamp(max=_LARGEST_EXPONENT)) / (coef - 1)


def _delta(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    kind, coef = options.f_divergence_type, options.f_alpha_divergence_coef
    return divergence_score(pairs.chosen_ratio, kind, coef) - divergence_score(pairs.rejected_ratio, kind, coef)


def _mean_delta(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    kind, coef = options.f_divergence_type, options.f_alpha_divergence_coef
    chosen = divergence_score(pairs.chosen_ratio, kind, coef) / pairs.chosen_tokens.clamp(min=1)
    rejected = divergence_score(pairs.rejected_ratio, kind, coef) / pairs.rejected_tokens.clamp(min=1)
    return chosen - rejected


def _smoothed(margin_P: torch.Tensor, eps: float) -> torch.Tensor:
    """-(1 - eps) log sigma(m) - eps log sigma(-m)."""
    return -(1 - eps) * F.logsigmoid(margin_P) - eps * F.logsigmoid(-margin_P)


def _robust(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    margin_P, eps = options.beta * _delta(pairs, options), options.label_smoothing
    return (-(1 - eps) * F.logsigmoid(margin_P) + eps * F.logsigmoid(-margin_P)) / (1 - 2 * eps)


def _exo_pair(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    margin_P, eps = options.beta * _delta(pairs, options), options.label_smoothing
    win_P, lose_P = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
    return win_P.exp() * (win_P - math.log1p(-eps)) + lose_P.exp() * (lose_P - math.log(eps))


def _nca_pair(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _bco_pair(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def _sppo_hard(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    half = 0.5 / options.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


def _aot(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _smoothed(options.beta * (policy - reference), options.label_smoothing)


def _aot_unpaired(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    delta = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(options.beta * delta, options.label_smoothing)


def _apo_down(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    delta = pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(-options.beta * delta)


def _discopop(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    margin_P = options.beta * _delta(pairs, options)
    blend = torch.sigmoid(margin_P / options.discopop_tau)
    exponential = torch.exp((-margin_P).clamp(max=_LARGEST_EXPONENT))
    return -F.logsigmoid(margin_P) * (1 - blend) + exponential * blend


def _means(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
    return chosen, pairs.rejected / pairs.rejected_tokens.clamp(min=1)


def _simpo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    chosen, rejected = _means(pairs)
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options.label_smoothing)


def _alphapo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    rewards = [-torch.expm1(-options.alpha * mean) / options.alpha for mean in _means(pairs)]
    return _smoothed(options.beta * (rewards[0] - rewards[1]) - options.simpo_gamma, options.label_smoothing)


def _orpo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    chosen, rejected = _means(pairs)
    log_odds = [mean - _log1mexp(mean) for mean in (chosen, rejected)]
    return -F.logsigmoid(log_odds[0] - log_odds[1])


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Compute log(1 - e^x) for x < 0, accurate at both ends; x = 0 is moved to minus one machine epsilon."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Each branch of `where` is differentiated, so the one not taken must be finite too.
    near = torch.log(-torch.expm1(x.clamp(min=-1.0)))
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    return torch.where(x > -math.log(2), near, far)


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """One preference loss: a row of `PREFERENCE_LOSSES`.

    Attributes:
        compute: (pairs, options) -> [P] losses.
        formula: loss of one pair.
        paper: arXiv id.
        needs_reference: uses the reference's log-probabilities.
        coupled: a pair's loss depends on the step's other pairs (by sorting), so a split step takes two passes.
        per_token: divide the summed losses by the step's chosen tokens instead of its pairs.
        length_normalised: the implicit reward is a mean over tokens instead of a sum.
    """

    compute: Callable[[Pairs, PreferenceOptions], torch.Tensor]
    formula: str
    paper: str
    needs_reference: bool = True
    coupled: bool = False
    per_token: bool = False
    length_normalised: bool = False


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(
        lambda p, o: _smoothed(o.beta * _delta(p, o), o.label_smoothing),
        "-(1-eps) log s(beta Delta) - eps log s(-beta Delta); DPO, cDPO",
        "2305.18290",
    ),
    "sigmoid_norm": PreferenceLoss(
        lambda p, o: _smoothed(o.beta * _mean_delta(p, o), o.label_smoothing),
        "sigmoid, with each score divided by its |y|",
        "2411.15124",
    ),
    "robust": PreferenceLoss(
        _robust, "(-(1-eps) log s(beta Delta) + eps log s(-beta Delta)) / (1 - 2 eps)", "2403.00409"
    ),
    "hinge": PreferenceLoss(
        lambda p, o: torch.relu(1 - o.beta * _delta(p, o)), "max(0, 1 - beta Delta); SLiC", "2305.10425"
    ),
    "ipo": PreferenceLoss(
        lambda p, o: (_mean_delta(p, o) - 1 / (2 * o.beta)) ** 2,
        "(g(rho_w)/|y_w| - g(rho_l)/|y_l| - 1/(2 beta))^2",
        "2310.12036",
    ),
    "exo_pair": PreferenceLoss(_exo_pair, "KL((s(beta Delta), s(-beta Delta)) || (1-eps, eps)); eps > 0", "2402.00856"),
    "nca_pair": PreferenceLoss(
        _nca_pair, "-log s(beta rho_w) - log s(-beta rho_w)/2 - log s(-beta rho_l)/2", "2402.05369"
    ),
    "bco_pair": PreferenceLoss(_bco_pair, "-log s(beta rho_w) - log s(-beta rho_l)", "2404.04656"),
    "sppo_hard": PreferenceLoss(_sppo_hard, "(rho_w - 1/(2 beta))^2 + (rho_l + 1/(2 beta))^2", "2405.00675"),
    "aot": PreferenceLoss(
        _aot, "sigmoid on the sorted log pi(y_w)/pi(y_l) minus the reference's sorted ones", "2406.05882", coupled=True
    ),
    "aot_unpaired": PreferenceLoss(
        _aot_unpaired, "sigmoid on the sorted rho_w minus the sorted rho_l", "2406.05882", coupled=True
    ),
    "apo_zero": PreferenceLoss(
        lambda p, o: torch.sigmoid(-o.beta * p.chosen_ratio) + torch.sigmoid(o.beta * p.rejected_ratio),
        "s(-beta rho_w) + s(beta rho_l)",
        "2408.06266",
    ),
    "apo_down": PreferenceLoss(_apo_down, "s(beta rho_w) + s(-beta (rho_w - rho_l))", "2408.06266"),
    "discopop": PreferenceLoss(_discopop, "(1-b) (-log s(m)) + b e^-m, m = beta Delta, b = s(m / tau)", "2406.08414"),
    "sft": PreferenceLoss(
        lambda p, _: -p.chosen,
        "-log pi(y_w), over the step's chosen tokens",
        "2404.19733",
        needs_reference=False,
        per_token=True,
    ),
    "cpo": PreferenceLoss(
        lambda p, o: _smoothed(o.beta * (p.chosen - p.rejected), o.label_smoothing),
        "sigmoid on log pi(y_w) - log pi(y_l)",
        "2401.08417",
        needs_reference=False,
    ),
    "simpo": PreferenceLoss(
        _simpo,
        "sigmoid on beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma",
        "2405.14734",
        needs_reference=False,
        length_normalised=True,
    ),
    "alphapo": PreferenceLoss(
        _alphapo,
        "simpo with r(y) = (1 - pi(y)^(-alpha/|y|)) / alpha for log pi(y)/|y|",
        "2501.03884",
        needs_reference=False,
        length_normalised=True,
    ),
    "orpo": PreferenceLoss(
        _orpo,
        "-log s(log odds(y_w) - log odds(y_l)), odds of e^(log pi(y)/|y|)",
        "2403.07691",
        needs_reference=False,
        length_normalised=True,
    ),
}
"""`loss_type` -> loss; the weighted losses of several types add up."""


def kto_losses(
    log_ratio_S: torch.Tensor,
    desirable_S: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    r"""KTO on labelled completions (2402.01306); with kl = 0, APO-zero unpaired (2408.06266).

    .. math::
        \lambda_D\,(1 - \sigma(\beta(\rho - z))) \text{ if desirable}, \qquad
        \lambda_U\,(1 - \sigma(\beta(z - \rho))) \text{ otherwise}

    Args:
        log_ratio_S: [S] rho, summed over tokens.
        desirable_S: [S] bool.
        kl: z, the KL divergence from the reference, at least 0; no gradient.
        beta: as in DPO.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    Returns:
        [S] losses, not reduced.
    """
    signed_S = torch.where(desirable_S, log_ratio_S - kl.detach(), kl.detach() - log_ratio_S)
    weights_S = torch.where(desirable_S, desirable_weight, undesirable_weight)
    return weights_S * torch.sigmoid(-beta * signed_S)


def pairs_of(policy_S: torch.Tensor, reference_S: torch.Tensor, tokens_S: torch.Tensor) -> Pairs:
    """Split values of sequences in the order chosen, rejected, chosen, ... into pairs."""
    return Pairs(policy_S[0::2], policy_S[1::2], reference_S[0::2], reference_S[1::2], tokens_S[0::2], tokens_S[1::2])


def pair_metrics(pairs: Pairs, beta: float, *, normalised: bool) -> dict[str, torch.Tensor]:
    """Compute implicit rewards beta rho (beta log pi without a reference) and derived metrics, under TRL's names.

    Args:
        pairs: P pairs.
        beta: the loss's beta.
        normalised: divide rewards by the number of tokens.

    Returns:
        [P] values by name; no gradient.
    """
    chosen, rejected = beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach()
    if normalised:
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
    }
