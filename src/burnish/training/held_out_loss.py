"""The loss of online stages on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from burnish.model.scoring import eval_mode
from burnish.rollout.prompts import Share
from burnish.training.metrics import StepMetrics

__all__ = ["held_out_loss"]


def held_out_loss(trainer: Any, shares: Sequence[Share]) -> float:
    """Compute the loss of the training steps on scored held-out samples, at their own advantages.

    Neither weights nor metrics nor adaptive coefficients of training move.

    Args:
        trainer: an `OnlineTrainer`.
        shares: this rank's part of the samples.

    Returns:
        The loss over the samples of all ranks.
    """
    groups = [share.group for share in shares]
    metrics, fresh, state = trainer._metrics, trainer._fresh, trainer.own_state()
    trainer._metrics, trainer._fresh = StepMetrics(), False
    try:
        with torch.no_grad(), eval_mode(trainer.model):
            on_policy = [group for group in groups if trainer.needs_old_logprobs(group)]
            trainer._fill(on_policy, "old_logprobs", trainer.model)
            trainer._fill_reference(groups)
            trainer.judge(shares)
            trainer.prepare_terms(groups)
            denominator = max(trainer.sum_over_ranks(trainer.step_denominator(groups)), 1.0)
            trainable = trainer.trainable_groups(groups)
            batches = [trainer.pack_groups(part) for part in trainer.split(trainable)]
            device, model = trainer.args.device, trainer.model
            losses = [float(trainer.batch_loss(model, batch.to(device), denominator=denominator)) for batch in batches]
            return trainer.sum_over_ranks(sum(losses))
    finally:
        trainer._metrics, trainer._fresh = metrics, fresh
        trainer.load_state(state)
