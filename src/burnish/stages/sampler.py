"""Sample and score completions of prompts, in rounds, with refills and replay."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.model.scoring import causal_lm
from burnish.rollout import Engine, Request, SamplingParams
from burnish.rollout.collect import generate
from burnish.rollout.dynamic_sampling import Replay, fill_batch
from burnish.rollout.prompts import PromptSource, Shard, gather_by_prompt, shards_of, whole_groups
from burnish.types import Group, StopReason

if TYPE_CHECKING:
    from burnish.stages.online import OnlineStage

__all__ = ["Sampler", "prompts_per_rollout"]

logger = logging.getLogger(__name__)


def prompts_per_rollout(args: Any) -> int:
    """Return P, the prompts of `steps_per_generation` micro-batches of every rank with G completions a prompt."""
    micro_batches = micro_batches_per_rollout(args.steps_per_generation, args.gradient_accumulation_steps)
    return args.per_device_train_batch_size * args.world_size * micro_batches // args.num_generations


class Sampler:
    """Sample completions of the next prompts of a source, and score them.

    Args:
        stage: provides the rubric, the algorithm that checks the samples, and the run that collects metrics.
        source: order of the prompts.
        engine: generates completions.
        params: sampling parameters.
    """

    def __init__(self, stage: OnlineStage, *, source: PromptSource, engine: Engine, params: SamplingParams) -> None:
        self._stage, self._args, self._run = stage, stage.args, stage.run
        self.source = source
        self.engine = engine
        self.params = params
        self.replay = Replay(stage.args.replay_size)
        self.rounds = 0
        """Rounds of sampling so far, of which a rollout may have several; part of the key of every random number."""
        self.lengths: dict[int, int] = {}
        """Mean completion length of each prompt when it was last sampled, by its index."""

    def sample(self) -> tuple[list[Shard], list[Shard]]:
        """Sample and score the groups of one rollout, with refills for groups without reward variance.

        Returns:
            This rank's shards of the P groups, and of everything that was sampled for them.
        """
        args, ranks, wanted = self._args, self._run.ranks, prompts_per_rollout(self._args)
        if not (args.dynamic_sampling or args.replay_size):
            shards = self._round(wanted)
            return shards, shards
        sampled: list[Shard] = []

        def sample_everywhere(num_prompts: int) -> dict[int, Group]:
            shards = self._round(num_prompts)
            sampled.extend(shards)
            return whole_groups(ranks.gathered(shards))

        batch = fill_batch(
            sample_everywhere,
            wanted,
            max_rounds=args.max_sampling_rounds if args.dynamic_sampling else 1,
            replay=self.replay,
            multiple=ranks.count // math.gcd(ranks.count, args.num_generations),
        )
        self._run.metrics.add_all(batch.metrics(args.num_generations))
        if args.dynamic_sampling:
            batch.warn_if_flat()
        return shards_of(batch.groups, rank=ranks.index, world=ranks.count), sampled

    def _round(self, num_prompts: int) -> list[Shard]:
        """Sample the next prompts and score their completions."""
        args, run = self._args, self._run
        shards = self.source.take(
            num_prompts=num_prompts,
            num_samples=args.num_generations,
            rank=run.ranks.index,
            world=run.ranks.count,
        )
        groups = [shard.group for shard in shards]
        self.generate(shards, seed=args.seed, step=self.rounds, is_training=True)
        self._check(groups)
        self.rounds += 1
        # Tokens count when they are sampled, whether they are trained on once, twice or not at all.
        run.num_tokens += sum(group.num_tokens for group in groups)
        run.metrics.add_logged(self.score(groups))
        self._report(groups)
        rows = gather_by_prompt(shards, lambda c: (c.reward, len(c.token_ids)), run.ranks.gathered)
        self.lengths |= {self.source.at(p).index: round(fmean(n for _, n in row)) for p, row in rows.items()}
        run.metrics.add_rewards([[reward for reward, _ in row] for row in rows.values()])
        known = [reward for row in rows.values() for reward, _ in row if reward is not None]
        if known and args.prompt_sampling == "curriculum":
            self.source.learn(fmean(known))
            run.metrics.add("curriculum/level", self.source.level)
        return shards

    def generate(self, shards: Sequence[Shard], *, seed: int, step: int, is_training: bool = False) -> None:
        """Sample the completions of shards; random numbers are keyed by (seed, step, position, sample).

        Evaluations sample whole completions, and of prompts of their own: `stop_settled` and `lengths` are not theirs.
        """
        rule = self._stage.settled if is_training else None
        lengths = self.lengths if is_training else {}
        # Keyed by position: a prompt may come twice in a round, at the end of one epoch and the start of the next.
        requests = [
            Request(
                shard.group.prompt_ids,
                len(shard.group.completions),
                self.params,
                index=shard.position,
                first_sample=shard.first,
                is_settled=rule and partial(rule, row=shard.group.row),
                expected_tokens=lengths.get(shard.group.index),
            )
            for shard in shards
        ]
        vocab_size = causal_lm(self._run.model).config.get_text_config().vocab_size
        with self._run.phases.phase("sampling"):
            found = generate(self.engine, requests, seed=seed, step=step, vocab_size=vocab_size)
        self._run.phases.add_tokens("sampling", sum(len(c.token_ids) for completions in found for c in completions))
        for shard, completions in zip(shards, found, strict=True):
            shard.group.completions = completions

    def score(self, groups: Sequence[Group]) -> list[tuple[str, float]]:
        """Score the completions of groups; return the metrics logged by reward functions on all ranks."""
        logged: list[tuple[str, float]] = []
        with self._run.phases.phase("rewards"):
            self._stage.rubric.score(
                groups, trainer_state=self._run.state, log_metric=lambda *metric: logged.append(metric)
            )
        return self._run.ranks.gathered(logged)

    def _check(self, groups: Sequence[Group]) -> None:
        completions = [completion for group in groups for completion in group.completions]
        engine = type(self.engine).__name__
        if self.rounds == 0 and any(c.policy_logprobs is None for c in completions):
            logger.warning(
                "%s returns no policy_logprobs, so nothing checks that it samples with the trained weights at the "
                "temperature that the loss assumes. Let the engine fill Completion.policy_logprobs.",
                engine,
            )
        self._stage.algorithm.check_samples(completions, engine)

    def _report(self, groups: Sequence[Group]) -> None:
        clipped = self._run.metrics.add_completions(groups, self._stage.rubric.names)
        if self._stage.settled is not None:
            reasons = [completion.stop_reason for group in groups for completion in group.completions]
            self._run.metrics.add("completions/settled_ratio", reasons.count(StopReason.SETTLED) / len(reasons))
        failed = [c.score for g in groups for c in g.completions if c.score is not None and c.score.total is None]
        if failed:
            logger.warning(
                "%d completions are excluded from the loss: %s", len(failed), "; ".join(failed[0].errors.values())
            )
        if clipped > 0.5 and self.rounds == 1:
            logger.warning(
                "%.0f%% of the completions hit max_completion_length = %d: rewards that read the end will miss it. "
                "Raise it, or ask for shorter answers.",
                100 * clipped,
                self._args.max_completion_length,
            )
