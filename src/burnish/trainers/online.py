"""The online trainer: sample, score, turn rewards into advantages, take policy-gradient steps."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.data import encode_rows, errors_of, finite_rows, prompt_group
from burnish.errors import ConfigError, DataError
from burnish.model.packing import partition
from burnish.model.positions import check_lengths
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import causal_lm, eval_mode
from burnish.rewards import Rubric
from burnish.rollout import Engine, Request, SamplingParams, make_engine
from burnish.rollout.dynamic_sampling import Replay, fill_batch
from burnish.rollout.prompts import PromptSource, Share, shares_of, whole_groups
from burnish.rollout.validation import generate
from burnish.training.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.training.base import GroupTrainer
from burnish.training.batches import collate
from burnish.training.callbacks import RecordsCallback
from burnish.training.checks import check_vocabulary, resolve_tokenizer
from burnish.training.held_out import encode_sets, named_sets, sets_of_rows
from burnish.training.held_out_samples import evaluate_samples
from burnish.training.liveness import UNJUDGED, Outcome, Verdict, judge_gradient, only_said
from burnish.training.logprobs import LogprobName, fill_logprobs
from burnish.training.reference import Reference, check_reference, check_untrained, refuse_shared_weights
from burnish.training.reward_funcs import RewardFunction, as_rubric, penalise_overlong
from burnish.training.rollout_state import RolloutState
from burnish.training.rollout_verdict import judge_rollout
from burnish.training.sampler_check import Agreement, default_bound
from burnish.training.sampling import sampling_params
from burnish.training.transcripts import TranscriptLog
from burnish.types import Completion, Group, PackedBatch, StopReason

__all__ = ["OnlineTrainer"]

logger = logging.getLogger(__name__)


class OnlineTrainer(GroupTrainer):
    """Rollouts for trainers that learn from their own samples.

    Each optimizer step takes its share of a rollout: P prompts, G completions each, sampled by the engine with the
    trainer's own weights and scored by the rubric. Subclasses say what the rewards mean (`judge`) and give the loss.
    """

    args: Any
    config_class: ClassVar[type[Any]]
    timings = ()

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        reward_funcs: Rubric | RewardFunction | Sequence[RewardFunction],
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        *,
        engine: Engine | None = None,
        ref_model: PreTrainedModel | None = None,
        compute_metrics: Callable[[Sequence[Group]], Mapping[str, float]] | None = None,
    ) -> None:
        refuse_arguments(tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
        args = with_quantization(resolve_args(args, self.config_class), model, quantization_config)
        check_reference(ref_model)
        if ref_model is not None and not args.beta > 0:
            raise ConfigError("beta = 0.0 reads no reference: remove ref_model, or set beta.")
        if train_dataset is None:
            raise DataError("train_dataset = None: pass rows with a `prompt` column.")
        self.rubric = as_rubric(reward_funcs, args.reward_weights, reward_processing_classes)
        self.args = args
        self.metrics_of_groups = compute_metrics
        self.tokenizer = resolve_tokenizer(model, processing_class, args)
        self.prompts = self.encode(train_dataset, "train_dataset")
        self._check_sizes()
        order = args.prompt_sampling if args.shuffle_dataset else "given"
        self.source = PromptSource(self.prompts, seed=args.seed, order=order, target=args.curriculum_target)
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self.prompts,
            eval_dataset=encode_sets(eval_dataset, self.encode),
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference = Reference.of(self.model, ref_model) if args.beta > 0 else None
        if ref_model is not None:
            check_vocabulary(ref_model, self.prompts, "ref_model on train_dataset")
            self.check_sampled_lengths(ref_model)
        self.check_sampled_lengths(self.model)
        for criterion in self.rubric.criteria:
            if isinstance(criterion.function, RewardModel):
                refuse_shared_weights(self.model, criterion.function.model, f"reward model {criterion.name!r}")
        self._prepare_rollouts(engine)
        self.set_up()

    def _prepare_rollouts(self, engine: Engine | None) -> None:
        """The engine, what it samples next, and what a rollout leaves for later steps."""
        args = self.args
        self.engine = engine if engine is not None else make_engine(self.model, self.tokenizer)
        shared: dict[str, Any] = {"is_main": self.is_world_process_zero(), "gathered": self.gathered}
        self.transcripts = TranscriptLog(args, **shared)
        self.eval_transcripts = TranscriptLog(args, **shared, name="eval_transcripts.jsonl")
        self.add_callback(RecordsCallback(self.transcripts.records, self.eval_transcripts.records))
        self.params = sampling_params(args, causal_lm(self.model), self.tokenizer)
        self._buffer: list[list[Group]] = []
        self.replay = Replay(args.replay_size)
        self._rollouts = 0
        self._rounds = 0
        """Rounds of sampling so far, of which a rollout may have several: part of the key of every random number."""
        self._fresh = False
        self._sampled: list[Share] = []
        """Completions sampled since the last rollout began, whether they are trained on or not."""
        self._verdict = UNJUDGED
        """Of the rollout that feeds the present steps; unknown where a checkpoint holds the rest of one."""
        bound = args.logprob_check_bound
        self.agreement = Agreement(default_bound(self.model.dtype) if bound is None else bound)

    def set_up(self) -> None:
        """Hook: what the loss keeps between steps."""

    @property
    def uses_dropout(self) -> bool:
        """Never: samples are drawn without it."""
        return False

    def check_sampled_lengths(self, model: Any) -> None:
        """Refuse prompts whose completions may grow beyond a model's positions."""
        more = self.args.max_completion_length
        for name, groups in {"train_dataset": self.prompts, **named_sets(self.eval_dataset, "eval_dataset")}.items():
            check_lengths(causal_lm(model), groups, name, "lower max_completion_length or max_prompt_length", more=more)

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        groups = encode_rows(
            prompt_group,
            finite_rows(dataset, name),
            self.tokenizer,
            name=name,
            max_prompt_length=self.args.max_prompt_length,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        with errors_of(name):
            self.rubric.check_columns(groups)
        return groups

    @property
    def passes(self) -> int:
        """Times that each rollout is gone through."""
        return 1

    @property
    def _reuse(self) -> int:
        """Optimizer steps per rollout."""
        return (self._micro_batches_per_rollout // self.args.gradient_accumulation_steps) * self.passes

    @property
    def _micro_batches_per_rollout(self) -> int:
        return micro_batches_per_rollout(self.args.steps_per_generation, self.args.gradient_accumulation_steps)

    @property
    def _prompts_per_rollout(self) -> int:
        completions = self.args.per_device_train_batch_size * self.args.world_size * self._micro_batches_per_rollout
        return completions // self.args.num_generations

    def _check_sizes(self) -> None:
        if len(self.prompts) < self._prompts_per_rollout:
            raise DataError(
                f"train_dataset: {len(self.prompts)} prompts are fewer than the {self._prompts_per_rollout} of one "
                "rollout. Add prompts, or lower per_device_train_batch_size or steps_per_generation."
            )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Tickets: as many as completions pass through training in an epoch; the rollout decides what they mean."""
        tickets = list(range(len(self.prompts) * self.args.num_generations * self.passes))
        loader = DataLoader(
            tickets,  # pyright: ignore[reportArgumentType]
            batch_size=self._train_batch_size,
            sampler=SequentialSampler(tickets),
            collate_fn=collate,  # pyright: ignore[reportArgumentType]
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def step_groups(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Group] | None:
        """This rank's share of the rollout; samples anew when the last one is used up."""
        if super().step_groups(epoch_iterator, num_batches) is None:
            return None
        self._fresh = not self._buffer
        if self._fresh:
            self._buffer = self._rollout()
        return self._buffer.pop(0)

    def _rollout(self) -> list[list[Group]]:
        started = time.perf_counter()
        self.engine.sync(self.state.global_step)
        self._sampled, level = [], self.source.level
        shares = self._collect()
        sampled = time.perf_counter()
        groups = [share.group for share in shares]
        self._punish_overlong(groups)
        steps = partition(groups, self._reuse // self.passes, whole=self.whole_groups)
        with torch.no_grad(), eval_mode(self.model):
            # The first step on fresh samples is on-policy: its old log-probabilities are its own.
            later = [group for step in steps[1:] for group in step]
            later += [group for group in steps[0] if self.needs_old_logprobs(group)]
            unknown = groups if self.passes > 1 else later
            self._fill([group for group in unknown if _is_fresh(group)], "old_logprobs", self.model)
            self._fill_reference(groups)
        self.judge(shares)
        self._verdict = self._judge_rollout(shares, moved=self.source.level != level)
        step = self.state.global_step + 1
        self.transcripts.write(self._sampled, trained=shares, step=step, tokenizer=self.tokenizer)
        self._rollouts += 1
        self._metrics.add("seconds/rollout", sampled - started)
        self._metrics.add("seconds/reference", time.perf_counter() - sampled)
        return steps * self.passes

    def _collect(self) -> list[Share]:
        """Scored groups of a batch, this rank's part of them."""
        args, wanted = self.args, self._prompts_per_rollout
        if not (args.dynamic_sampling or args.replay_size):
            return self._round(wanted)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch = fill_batch(
            lambda number: self._everywhere(self._round(number)),
            wanted,
            max_rounds=args.max_sampling_rounds if args.dynamic_sampling else 1,
            replay=self.replay,
            multiple=world // math.gcd(world, args.num_generations),
        )
        for name, value in batch.metrics(args.num_generations).items():
            self._metrics.add(name, value)
        if args.dynamic_sampling:
            batch.warn_if_flat()
        return shares_of(batch.groups, rank=rank, world=world)

    def _round(self, num_prompts: int) -> list[Share]:
        """Sample the next prompts and score their completions."""
        shares = self.source.take(
            num_prompts=num_prompts,
            num_samples=self.args.num_generations,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        groups = [share.group for share in shares]
        self._generate(shares, self.params, seed=self.args.seed, step=self._rounds)
        self.check_samples([c for group in groups for c in group.completions])
        self._rounds += 1
        super().count_tokens(groups)
        started = time.perf_counter()
        logged: list[tuple[str, float]] = []
        self.rubric.score(groups, trainer_state=self.state, log_metric=lambda *metric: logged.append(metric))
        self._metrics.add("seconds/rewards", time.perf_counter() - started)
        self._metrics.add_logged(self.gathered(logged))
        self._log_round([share.group for share in shares])
        self._sampled += shares
        rewards: dict[int, list[float | None]] = defaultdict(list)
        own = [(share.place, share.first, [c.reward for c in share.group.completions]) for share in shares]
        for place, _, values in sorted(self.gathered(own)):
            rewards[place] += values
        self._metrics.add_rewards(list(rewards.values()))
        known = [r for row in rewards.values() for r in row if r is not None]
        if known and self.args.prompt_sampling == "curriculum":
            self.source.learn(fmean(known))
            self._metrics.add("curriculum/level", self.source.level)
        return shares

    def _everywhere(self, shares: Sequence[Share]) -> dict[int, Group]:
        """The whole groups of all ranks, by place, on every rank."""
        return whole_groups(self.gathered(shares))

    def _punish_overlong(self, groups: Sequence[Group]) -> None:
        """DAPO's penalty, as one more criterion: after the filter, so that it does not make spread by itself."""
        if self.args.overlong_buffer is not None and (values := penalise_overlong(groups, self.args)):
            self._metrics.add("rewards/overlong/mean", fmean(values))

    def count_tokens(self, groups: Sequence[Group]) -> None:
        """Nothing: tokens count when they are sampled, whether they are trained on once, twice or not at all."""

    def needs_old_logprobs(self, group: Group) -> bool:
        """Hook: whether `judge` reads the trainer's log-probabilities of a group that is on-policy."""
        return False

    def judge(self, shares: Sequence[Share]) -> None:
        """Hook: turn the rewards of a batch into what the loss reads."""

    def _generate(self, shares: Sequence[Share], params: SamplingParams, *, seed: int, step: int) -> None:
        # Keyed by place: a prompt may come twice in a round, at the end of one epoch and the start of the next.
        requests = [
            Request(s.group.prompt_ids, len(s.group.completions), params, index=s.place, first_sample=s.first)
            for s in shares
        ]
        vocab_size = causal_lm(self.model).config.get_text_config().vocab_size
        found = generate(self.engine, requests, seed=seed, step=step, vocab_size=vocab_size)
        for share, completions in zip(shares, found, strict=True):
            share.group.completions = completions

    def check_samples(self, completions: Sequence[Completion]) -> None:
        """Say, once, that an engine leaves out the log-probabilities that the check of sampler and trainer reads."""
        if self._rounds == 0 and any(c.policy_logprobs is None for c in completions):
            logger.warning(
                "%s gives no policy_logprobs: nothing checks that it samples from the weights that are trained, at "
                "the temperature that the loss assumes. Let the engine fill Completion.policy_logprobs.",
                type(self.engine).__name__,
            )

    def _fill(self, groups: Sequence[Group], name: LogprobName, model: torch.nn.Module) -> None:
        """Write the log-probability of every token under a model into the completions."""
        for part in self.split(groups):
            fill_logprobs(part, name, model, args=self.args, step=self.state.global_step)

    def _fill_reference(self, groups: Sequence[Group]) -> None:
        if self.reference is not None:
            with self.reference.active(self.model) as reference:
                self._fill(groups, "ref_logprobs", reference)

    def prepare_terms(self, groups: Sequence[Group]) -> None:
        """Hook: what the loss of these groups needs to know of all of them."""

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """What the loss needs to know of the step."""
        self.prepare_terms(groups)

    def in_loss(self, completion: Completion) -> bool:
        """Whether a completion has a reward, and is not masked as truncated."""
        masked = self.args.mask_truncated_completions and completion.stop_reason is StopReason.LENGTH
        return completion.reward is not None and not masked

    @property
    def compared(self) -> str:
        """Hook: with what a completion's reward is compared; see `judge_rewards`."""
        return "group"

    def signals(self, completion: Completion) -> tuple[float, ...] | None:
        """Hook: the numbers that a completion is judged by, or None where it has no reward."""
        reward = completion.reward
        return None if reward is None else (reward,)

    def learns_otherwise(self) -> bool:
        """Hook: whether terms of the loss teach where no reward differs."""
        return False

    def _judge_rollout(self, shares: Sequence[Share], *, moved: bool) -> Verdict:
        """Whether the rewards of a rollout carry a signal; `moved`: the curriculum has."""
        verdict = judge_rollout(
            shares,
            rubric=self.rubric,
            outcome=self._outcome,
            gathered=self.gathered,
            compared=self.compared,
            max_completion_length=self.args.max_completion_length,
            is_first=self._rollouts == 0,
        )
        if verdict.kind != "constant_reward":
            return verdict
        return UNJUDGED if moved else only_said(verdict) if self.learns_otherwise() else verdict

    def _outcome(self, completion: Completion) -> Outcome:
        rewards = self.signals(completion)
        return Outcome(rewards, is_masked=rewards is not None and not self.in_loss(completion))

    def verdict(self, grad_norm: float) -> Verdict:
        """The rollout's; where its rewards differ, that of the gradient, if they do in this step, too."""
        is_repeated = self._reuse - len(self._buffer) > self._reuse // self.passes
        if self._verdict.kind != "alive":
            # Later passes over the same samples are no more evidence.
            return UNJUDGED if is_repeated else self._verdict
        if not self.liveness.has_work:
            return UNJUDGED
        flat = judge_gradient(grad_norm)
        return self._verdict if flat.kind == "alive" else flat

    def compare(self, batch: PackedBatch, logprobs_N: torch.Tensor) -> None:
        """Remember how far trainer and sampler are apart; first of all, check the reference."""
        sampled_N = batch.token.get("policy_logprobs")
        if sampled_N is None:  # replayed, all of them
            return
        fresh_N = ~sampled_N.isnan()
        self.agreement.add(logprobs_N[fresh_N], sampled_N[fresh_N])
        own_reference = self.reference is not None and self.reference.is_initial_policy
        if own_reference and self.is_untrained and self.state.global_step == 0:
            bound = max(default_bound(self.model.dtype), self.args.logprob_check_bound or 0.0)
            check_untrained(logprobs_N[fresh_N], batch.token["ref_logprobs"][fresh_N], bound=bound)

    def before_optimizer_step(self) -> None:
        """Stop before the update when sampler and trainer disagree about fresh samples."""
        metrics = self.agreement.flush(self.state.global_step, self.sum_over_ranks, self.max_over_ranks)
        for name, value in metrics.items():
            self._metrics.add(name, value)

    def _log_round(self, groups: Sequence[Group]) -> None:
        clipped = self._metrics.add_completions(groups, self.rubric.names)
        failed = [c.score for g in groups for c in g.completions if c.score is not None and c.score.total is None]
        if failed:
            logger.warning("%d completions leave the loss: %s", len(failed), "; ".join(failed[0].errors.values()))
        if clipped > 0.5 and self._rounds == 1:
            logger.warning(
                "%.0f%% of the completions hit max_completion_length = %d: rewards that look at the end will miss. "
                "Raise it, or shorten what the prompt asks for.",
                100 * clipped,
                self.args.max_completion_length,
            )

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Names of the metrics of `evaluate`, unless a function of the user's adds some."""
        if self.metrics_of_groups is not None or self.rubric.logs_metrics:
            return None
        criteria = (f"rewards/{name}/mean" for name in self.rubric.names)
        return ("loss", "reward", "completions/mean_length", *criteria)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample on held-out prompts; report the loss, the mean reward and each criterion, of each set by its name."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if (sets := sets_of_rows(given)) is not None:
            parts = [self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}") for name, rows in sets.items()]
            return {name: value for part in parts for name, value in part.items()}
        found = evaluate_samples(self, self.held_out(given), metric_key_prefix)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_own_state(self, folder: Path) -> None:
        """What has been sampled and what is in flight."""
        state = RolloutState(
            rollouts=self._rollouts,
            rounds=self._rounds,
            place=self.source.place,
            level=self.source.level,
            buffer=self._buffer,
            replay=self.replay.groups,
            own=self.own_state(),
        )
        state.save(folder, self.accelerator.process_index)

    def own_state(self) -> dict[str, Any]:
        """Hook: numbers that a checkpoint keeps for `load_state`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Hook: what `own_state` gave."""

    def reward_names(self) -> Sequence[str]:
        """The criteria."""
        return self.rubric.names

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """A reference of its own, and reward models."""
        named = {f"reward {criterion.name}": criterion.function for criterion in self.rubric.criteria}
        rewards = {name: function.model for name, function in named.items() if isinstance(function, RewardModel)}
        return {**rewards, **({} if self.reference is None else self.reference.given_models())}

    def load_own_state(self, folder: Path) -> None:
        """Continue with the samples in flight."""
        state = RolloutState.load(
            folder,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            prompts=self.prompts,
        )
        self._rollouts, self._rounds = state.rollouts, state.rounds
        self.source.place, self.source.level = state.place, state.level
        self._buffer, self.replay.groups = state.buffer, state.replay
        self.load_state(state.own)


def _is_fresh(group: Group) -> bool:
    return all(completion.old_logprobs is None for completion in group.completions)
