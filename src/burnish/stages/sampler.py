"""Sample and score completions of prompts, in rounds, with refills and replay."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.environments.episodes import EpisodeEngine, share_openings
from burnish.environments.rollout_function import RolloutFunctionEngine
from burnish.errors import CheckFailed, EngineError
from burnish.model.scoring import causal_lm
from burnish.rewards.failure_bound import FailureBound
from burnish.rewards.rubric import Scoring
from burnish.rollout import Engine, Request, SamplingParams
from burnish.rollout.dynamic_sampling import Replay, fill_batch
from burnish.rollout.engine import OverlappingEngine
from burnish.rollout.prompts import PromptSource, Shard, gather_by_prompt, shards_of, whole_groups
from burnish.rollout.validation import check_completions
from burnish.stages.lookahead import Lookahead
from burnish.types import Completion, Group, StopReason

if TYPE_CHECKING:
    from burnish.stages.online import OnlineStage

__all__ = ["Sampler", "prompts_per_rollout"]

logger = logging.getLogger(__name__)


def prompts_per_rollout(args: Any) -> int:
    """Return P, the prompts of `steps_per_generation` micro-batches of every rank with G completions a prompt."""
    micro_batches = micro_batches_per_rollout(args.steps_per_generation, args.gradient_accumulation_steps)
    return args.per_device_train_batch_size * args.world_size * micro_batches // args.num_generations


def _completions(shards: Sequence[Shard]) -> list[Completion]:
    return [completion for shard in shards for completion in shard.group.completions]


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
        self.ahead: Lookahead | None = None
        """Groups whose samples are begun; None without max_staleness."""
        if stage.args.staleness_bound and isinstance(engine, OverlappingEngine):
            self.ahead = Lookahead(engine, self._requests, seed=stage.args.seed)
        self._failures = FailureBound(stage.args.max_failed_rewards)
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
        if self.ahead is None:
            shards = self._next_prompts(num_prompts)
            scoring = self._stage.rubric.begin([shard.group for shard in shards], trainer_state=run.state)
            self.generate(shards, seed=args.seed, step=self.rounds, is_training=True, scoring=scoring)
        else:
            # Others are sampled while these are scored.
            shards, scoring = self._overlapping(self.ahead, num_prompts), None
        groups = [shard.group for shard in shards]
        self._check(groups)
        self.rounds += 1
        # Tokens count when they are sampled, whether they are trained on once, twice or not at all.
        run.num_tokens += sum(group.num_tokens for group in groups)
        run.metrics.add_logged(self.score(groups, scoring))
        self._report(groups)
        self._note_lengths(groups)
        rewards = gather_by_prompt(shards, lambda completion: completion.reward, run.ranks.gathered)
        scores = [c.score for group in groups for c in group.completions if c.score is not None]
        failed = gather_by_prompt(shards, _has_failed, run.ranks.gathered)
        self._failures.add((one for row in failed.values() for one in row), [score.errors for score in scores])
        run.metrics.add_rewards(list(rewards.values()))
        known = [reward for row in rewards.values() for reward in row if reward is not None]
        if known and args.prompt_sampling == "curriculum":
            self.source.learn(fmean(known))
            run.metrics.add("curriculum/level", self.source.level)
        return shards

    def _next_prompts(self, number: int) -> list[Shard]:
        ranks = self._run.ranks
        return self.source.take(
            num_prompts=number, num_samples=self._args.num_generations, rank=ranks.index, world=ranks.count
        )

    def _overlapping(self, ahead: Lookahead, num_prompts: int) -> list[Shard]:
        """Take prompts whose samples were begun earlier, and begin those of the rollouts after this one."""
        args, state, stage = self._args, self._run.state, self._stage
        steps = stage.steps_per_pass * stage.algorithm.passes
        bound = args.staleness_bound * steps
        if (begun := ahead.oldest()) is not None and state.global_step - begun > bound:
            self.source.position -= ahead.give_up()  # a run that was interrupted, and trains again
        later = max(math.ceil((state.max_steps - state.global_step) / steps) - 1, 0)
        wanted = num_prompts + min(args.staleness_bound, later) * prompts_per_rollout(args)
        while (missing := wanted - len(ahead)) > 0:
            # The completions of one rollout are shared out over the ranks, not those of all that are begun.
            number, start = min(missing, prompts_per_rollout(args)), self.source.position
            shards = self._next_prompts(number)
            ahead.begin(shards, range(start, start + number), step=self.rounds, version=state.global_step)
        with self._run.phases.phase("sampling"):
            shards, requests, found = ahead.take(num_prompts)
        self._fill(shards, requests, found)
        if any("policy_version" not in completion.token for completion in _completions(shards)):
            raise EngineError(
                f"max_staleness = {args.staleness_bound}: {type(self.engine).__name__} returns completions without the "
                "stream policy_version, the version of the weights that sampled each token."
            )
        lags = [state.global_step - version for c in _completions(shards) for version in c.token["policy_version"]]
        stalest = self._run.ranks.max(max(lags, default=0.0))
        if stalest > bound:
            raise CheckFailed(
                f"step {state.global_step}: a token was sampled {stalest:.0f} optimizer steps ago, and max_staleness "
                f"= {args.staleness_bound} allows {bound}: {type(self.engine).__name__} does not keep to its syncs."
            )
        self._run.metrics.add_all({"sampling/staleness/mean": fmean(lags or [0]), "sampling/staleness/max": stalest})
        return shards

    @property
    def position(self) -> int:
        """Number of prompts that are done: not those whose samples are begun."""
        return self.source.position - (0 if self.ahead is None else len(self.ahead))

    @position.setter
    def position(self, value: int) -> None:
        if self.ahead is not None:
            self.ahead.give_up()
        self.source.position = value

    def _requests(self, shards: Sequence[Shard], *, is_training: bool = True) -> list[Request]:
        """Ask for the completions of shards: of an evaluation's prompts whole ones, whose lengths are not known."""
        rule = self._stage.settled if is_training else None
        lengths = self.lengths if is_training else {}
        # Keyed by position: a prompt may come twice in a round, at the end of one epoch and the start of the next.
        return [
            Request(
                shard.group.prompt_ids,
                len(shard.group.completions),
                self.params,
                index=shard.position,
                first_sample=shard.first,
                is_settled=rule and partial(rule, row=shard.group.row),
                expected_tokens=lengths.get(shard.group.index),
                row=shard.group.row,
            )
            for shard in shards
        ]

    def _note_lengths(self, groups: Sequence[Group]) -> None:
        """Remember the mean completion lengths of groups, of which other ranks may have other completions."""
        found: dict[int, list[int]] = defaultdict(list)
        own = [(group.index, [len(completion.token_ids) for completion in group.completions]) for group in groups]
        for index, tokens in self._run.ranks.gathered(own):
            found[index] += tokens
        self.lengths |= {index: round(fmean(tokens)) for index, tokens in found.items()}

    def generate(
        self,
        shards: Sequence[Shard],
        *,
        seed: int,
        step: int,
        is_training: bool = False,
        scoring: Scoring | None = None,
    ) -> None:
        """Sample the completions of shards; random numbers are keyed by (seed, step, position, sample).

        Args:
            shards: what to sample.
            seed: seed of the run, or of its evaluation.
            step: round of sampling.
            is_training: whether completions may stop early, and prompts have known lengths.
            scoring: of their groups, which begins as they are sampled.
        """
        requests = self._requests(shards, is_training=is_training)
        if scoring is not None:
            requests = [replace(r, on_done=partial(scoring.start, place)) for place, r in enumerate(requests)]
        with self._run.phases.phase("sampling"):
            found = self.engine.generate(requests, seed=seed, step=step)
        self._fill(shards, requests, found)

    def _fill(
        self, shards: Sequence[Shard], requests: Sequence[Request], found: Sequence[Sequence[Completion]]
    ) -> None:
        """Validate completions, and put them into their shards."""
        vocab_size = causal_lm(self._run.model).config.get_text_config().vocab_size
        check_completions(requests, found, engine=type(self.engine).__name__, vocab_size=vocab_size)
        for shard, completions in zip(shards, found, strict=True):
            shard.group.completions = list(completions)
        if isinstance(self.engine, EpisodeEngine | RolloutFunctionEngine):
            share_openings(shards, self._run.ranks.gathered)
        self._run.phases.add_tokens("sampling", sum(c.num_scored_tokens for c in _completions(shards)))

    def rest(self) -> None:
        """Let the engine free what only sampling needs, where it has a `sleep`."""
        if (sleep := getattr(self.engine, "sleep", None)) is not None:
            sleep()

    def score(self, groups: Sequence[Group], begun: Scoring | None = None) -> list[tuple[str, float]]:
        """Score the completions of groups; return the metrics logged by reward functions on all ranks."""
        logged: list[tuple[str, float]] = []
        with self._run.phases.phase("rewards"):
            scoring = begun or self._stage.rubric.begin(groups, trainer_state=self._run.state)
            scoring.scores(lambda *metric: logged.append(metric))
            if isinstance(self.engine, EpisodeEngine):
                self.engine.end(groups)
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


def _has_failed(completion: Completion) -> bool:
    """Return whether a criterion failed, so that there is no reward; it may also have none because none applies."""
    score = completion.score
    return score is not None and score.total is None and bool(score.errors.keys() - {"total"})
