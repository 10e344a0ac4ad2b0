"""What online stages measure on held-out prompts: samples, their rewards and their loss."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from burnish.errors import user_code
from burnish.rollout.prompts import share_of
from burnish.training.held_out_loss import held_out_loss
from burnish.training.metrics import means_by_name, means_over_ranks, with_logged
from burnish.types import Group

__all__ = ["evaluate_samples"]


def evaluate_samples(trainer: Any, prompts: Sequence[Group], split: str) -> dict[str, float]:
    """Sample on prompts, score and write the transcripts.

    Args:
        trainer: an `OnlineTrainer`.
        prompts: of all ranks.
        split: what the transcripts call them.

    Returns:
        The loss, the mean reward, each criterion, what the user's function adds and what rewards log.
    """
    samples = trainer.args.num_generations_eval or trainer.args.num_generations
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    shares = [
        share_of(prompt, place, first=0, number=samples) for place, prompt in list(enumerate(prompts))[rank::world]
    ]
    step = trainer.state.global_step
    trainer.engine.sync(step)
    trainer._generate(shares, trainer.params, seed=trainer.args.seed + 1, step=0)
    logged: list[tuple[str, float]] = []
    trainer.rubric.score(
        [share.group for share in shares],
        trainer_state=trainer.state,
        log_metric=lambda *metric: logged.append(metric),
    )
    trainer.eval_transcripts.write(shares, step=step, tokenizer=trainer.tokenizer, time=time.time(), split=split)
    completions = [completion for share in shares for completion in share.group.completions]
    metrics = means_over_ranks(completions, trainer.rubric.names, trainer.sum_over_ranks)
    if trainer.metrics_of_groups is not None:
        with user_code("compute_metrics"):
            own = trainer.metrics_of_groups(list(trainer._everywhere(shares).values()))
        metrics |= {name: float(value) for name, value in own.items()}
    own = {"loss": held_out_loss(trainer, shares), **metrics}
    return with_logged(own, means_by_name(trainer.gathered(logged)))
