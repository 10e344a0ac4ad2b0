"""The online trainer: sample, score, turn rewards into advantages, take policy-gradient steps."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.data import as_rows, encode_rows, prompt_group
from burnish.errors import CheckFailed, ConfigError, DataError, user_code
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.objectives.kl import kl_k3
from burnish.packing import pack, partition, unpack
from burnish.rewards import Rubric
from burnish.rewards.verifiers import soft_overlong
from burnish.rollout import Engine, Request, SamplingParams, eos_token_ids, make_engine
from burnish.rollout.validation import generate
from burnish.trainers.agreement import Agreement, default_bound
from burnish.trainers.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.trainers.base import GroupTrainer, collate
from burnish.trainers.callbacks import RecordsCallback
from burnish.trainers.metrics import criterion_values, total
from burnish.trainers.preflight import check_vocabulary, resolve_tokenizer
from burnish.trainers.prompts import PromptSource, Share, share_of, shares_of
from burnish.trainers.reference import Reference, check_reference, refuse_shared_weights
from burnish.trainers.reward_funcs import RewardFunction, as_rubric
from burnish.trainers.rollout_state import RolloutState
from burnish.trainers.rounds import Replay, fill_batch
from burnish.trainers.transcripts import TranscriptLog
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
        self.eval_prompts = [] if eval_dataset is None else self.encode(eval_dataset, "eval_dataset")
        self._check_sizes()
        super().__init__(
            model,
            args,
            processing_class=self.tokenizer,
            train_dataset=self.prompts,
            eval_dataset=self.eval_prompts or None,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.reference = Reference.of(self.model, ref_model) if args.beta > 0 else None
        if ref_model is not None:
            check_vocabulary(ref_model, self.prompts, "ref_model on train_dataset")
        for criterion in self.rubric.criteria:
            if isinstance(criterion.function, RewardModel):
                refuse_shared_weights(self.model, criterion.function.model, f"reward model {criterion.name!r}")
        self._prepare_rollouts(engine)
        self.set_up()

    def _prepare_rollouts(self, engine: Engine | None) -> None:
        """The engine, what it samples next, and what a rollout leaves for later steps."""
        args = self.args
        self.engine = engine if engine is not None else make_engine(self.model, self.tokenizer)
        self.transcripts = TranscriptLog(args, is_main=self.is_world_process_zero(), gathered=self.gathered)
        self.add_callback(RecordsCallback(self.transcripts.records))
        self.params = self._sampling_params()
        self._buffer: list[list[Group]] = []
        order = args.prompt_sampling if args.shuffle_dataset else "given"
        self.source = PromptSource(self.prompts, seed=args.seed, order=order, target=args.curriculum_target)
        self.replay = Replay(args.replay_size)
        self._rollouts = 0
        self._rounds = 0
        """Rounds of sampling so far, of which a rollout may have several: part of the key of every random number."""
        self._fresh = False
        bound = args.logprob_check_bound
        self.agreement = Agreement(default_bound(self.model.dtype) if bound is None else bound)

    def set_up(self) -> None:
        """Hook: what the loss keeps between steps."""

    @property
    def uses_dropout(self) -> bool:
        """Never: samples are drawn without it."""
        return False

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """Groups of rows."""
        return encode_rows(
            prompt_group,
            as_rows(dataset, name),
            self.tokenizer,
            name=name,
            max_prompt_length=self.args.max_prompt_length,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )

    def _sampling_params(self) -> SamplingParams:
        args = self.args
        ends = eos_token_ids(causal_lm(self.model), self.tokenizer)
        if not ends and not args.stop:
            raise ConfigError(
                "neither the tokenizer nor the model's generation_config has an eos_token, so every completion would "
                "run to max_completion_length: set tokenizer.eos_token, or stop."
            )
        return SamplingParams(
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            stop=tuple(args.stop or ()),
            eos_token_ids=ends,
        )

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
        return self.args.steps_per_generation or self.args.gradient_accumulation_steps

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
            if self.reference is not None:
                with self.reference.active(self.model) as reference:
                    self._fill(groups, "ref_logprobs", reference)
        self.judge(shares)
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
        self._metrics.add("sampling/rounds", batch.num_rounds)
        self._metrics.add("sampling/extra_completions", (batch.num_sampled - wanted) * args.num_generations)
        self._metrics.add("sampling/replayed_groups", batch.num_replayed)
        if batch.num_flat and args.dynamic_sampling:
            logger.warning(
                "%d of %d groups have equal rewards after %d rounds of sampling: raise max_sampling_rounds, or give "
                "prompts that are neither always nor never solved.",
                batch.num_flat, wanted, batch.num_rounds,
            )  # fmt: skip
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
        self.rubric.score(groups)
        self._metrics.add("seconds/rewards", time.perf_counter() - started)
        self._log_round(shares)
        rewards: dict[int, list[float | None]] = defaultdict(list)
        for place, _, values in sorted(self.gathered([_rewards_of(share) for share in shares])):
            rewards[place] += values
        self._metrics.add_rewards(list(rewards.values()))
        known = [r for row in rewards.values() for r in row if r is not None]
        if known and self.args.prompt_sampling == "curriculum":
            self.source.learn(fmean(known))
            self._metrics.add("curriculum/level", self.source.level)
        return shares

    def _everywhere(self, shares: Sequence[Share]) -> dict[int, Group]:
        """The whole groups of all ranks, by place, on every rank."""
        groups: dict[int, Group] = {}
        for share in sorted(self.gathered(shares), key=lambda share: (share.place, share.first)):
            if share.place in groups:
                groups[share.place].completions += share.group.completions
            else:
                groups[share.place] = dataclasses.replace(share.group, completions=list(share.group.completions))
        return groups

    def _punish_overlong(self, groups: Sequence[Group]) -> None:
        """DAPO's punishment, as one more criterion: after the filter, so that it does not make spread by itself."""
        buffer, limit = self.args.overlong_buffer, self.args.max_completion_length
        if buffer is None:
            return
        tokens = max(1, round(buffer * limit if buffer < 1 else buffer))
        judged = [(c.score, c.token_ids) for group in groups for c in group.completions if c.score is not None]
        punish = soft_overlong(max_completion_length=limit, cache=tokens)
        values = [self.args.overlong_penalty * value for value in punish(completion_ids=[ids for _, ids in judged])]
        for (own, _), value in zip(judged, values, strict=True):
            own.criteria["overlong"] = value
            own.total = None if own.total is None else own.total + value
        if values:
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

    @torch.no_grad()
    def _fill(self, groups: Sequence[Group], name: str, model: torch.nn.Module) -> None:
        """Write the log-probability of every token under a model into the completions."""
        for part in self.split(groups) if groups else []:
            batch = pack(part).to(self.args.device)
            logprobs = unpack(part, score(model, batch, temperature=self.args.temperature).logprobs.tolist())
            completions = [completion for group in part for completion in group.completions]
            for completion, values in zip(completions, logprobs, strict=True):
                if not all(map(math.isfinite, values)):
                    raise CheckFailed(
                        f"step {self.state.global_step}: {name} are not finite. The policy or its reference overflows: "
                        "lower learning_rate, or go back to an earlier checkpoint."
                    )
                setattr(completion, name, values)

    def in_loss(self, completion: Completion) -> bool:
        """Whether a completion has a reward, and is not masked as truncated."""
        masked = self.args.mask_truncated_completions and completion.stop_reason is StopReason.LENGTH
        return total(completion) is not None and not masked

    def compare(self, batch: PackedBatch, logprobs_N: torch.Tensor) -> None:
        """Remember how far trainer and sampler are apart; first of all, check the reference."""
        sampled_N = batch.token.get("policy_logprobs")
        if sampled_N is None:  # replayed, all of them
            return
        fresh_N = ~sampled_N.isnan()
        self.agreement.add(logprobs_N[fresh_N], sampled_N[fresh_N])
        own_reference = self.reference is not None and self.reference.is_initial_policy
        if own_reference and self.is_untrained and self.state.global_step == 0:
            apart = float(kl_k3(logprobs_N[fresh_N], batch.token["ref_logprobs"][fresh_N]).mean())
            bound = default_bound(self.model.dtype)
            if not apart <= max(bound, self.args.logprob_check_bound or 0.0):
                raise CheckFailed(
                    f"before the first update the reference differs from the policy by {apart:.3g} nats a token "
                    f"(bound {bound:g}), so the KL term pulls towards another model. Pass the intended "
                    "ref_model, or the unmodified policy."
                )

    def before_optimizer_step(self) -> None:
        """Stop before the update when sampler and trainer disagree about fresh samples."""
        metrics = self.agreement.flush(self.state.global_step, self.sum_over_ranks, self.max_over_ranks)
        for name, value in metrics.items():
            self._metrics.add(name, value)

    def _log_round(self, shares: Sequence[Share]) -> None:
        groups = [share.group for share in shares]
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
        self.transcripts.write(shares, step=self.state.global_step + 1, tokenizer=self.tokenizer)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample on held-out prompts and report the mean reward and each criterion."""
        prompts = self.eval_prompts if eval_dataset is None else self.encode(eval_dataset, "eval_dataset")
        if not prompts:
            raise DataError("eval_dataset = None: pass held-out rows to the trainer or to evaluate().")
        samples = self.args.num_generations_eval or self.args.num_generations
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        shares = [
            share_of(prompt, place, first=0, number=samples) for place, prompt in list(enumerate(prompts))[rank::world]
        ]
        self.engine.sync(self.state.global_step)
        self._generate(shares, self.params, seed=self.args.seed + 1, step=0)
        self.rubric.score([share.group for share in shares])
        metrics = self._held_out_means([c for share in shares for c in share.group.completions])
        if self.metrics_of_groups is not None:
            with user_code("compute_metrics"):
                own = self.metrics_of_groups(list(self._everywhere(shares).values()))
            metrics |= {name: float(value) for name, value in own.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_means(self, completions: Sequence[Completion]) -> dict[str, float]:
        """Means of the reward, of each criterion and of the lengths over the completions of all ranks."""
        rewards = [r for c in completions if (r := total(c)) is not None]
        sums = {"reward": (sum(rewards), len(rewards))}
        for name in self.rubric.names:
            values = criterion_values(completions, name)
            sums[f"rewards/{name}/mean"] = (sum(values), len(values))
        sums["completions/mean_length"] = (sum(len(c.token_ids) for c in completions), len(completions))
        return {
            name: self.sum_over_ranks(value) / max(self.sum_over_ranks(count), 1.0)
            for name, (value, count) in sums.items()
        }

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


def _rewards_of(share: Share) -> tuple[int, int, list[float | None]]:
    return share.place, share.first, [total(c) for c in share.group.completions]


def _is_fresh(group: Group) -> bool:
    return all(completion.old_logprobs is None for completion in group.completions)
