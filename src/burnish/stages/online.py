"""Train on samples of the policy; start reading at `rollout_step`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback

from burnish.config.online_fields import micro_batches_per_rollout
from burnish.data import EncodeStats, encode_rows, errors_of, finite_rows, prompt_group
from burnish.errors import ConfigError, DataError, user_code
from burnish.model.packing import partition
from burnish.model.positions import check_lengths
from burnish.model.reward_model import RewardModel
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.rewards.settled import SettledRule
from burnish.rollout import Engine, make_engine
from burnish.rollout.compiled import check_compiler, compiling_pays
from burnish.rollout.engine import OverlappingEngine
from burnish.rollout.engines import cache_tokens
from burnish.rollout.prompts import PromptSource, Shard, empty_shard, whole_groups
from burnish.rollout.vllm import EmbeddedLLM, EmbeddedOptions, ServerPool, VLLMColocatedEngine, VLLMServerEngine
from burnish.rollout.vllm.transfer import check_transport, choose_transport
from burnish.stages.agents import Agents
from burnish.stages.algorithm import Algorithm
from burnish.stages.sampler import Sampler, prompts_per_rollout
from burnish.training.callbacks import RecordsCallback
from burnish.training.checks import check_vocabulary
from burnish.training.learning_signal import UNKNOWN, Assessment, Outcome, assess_rollout
from burnish.training.logprobs import fill_logprobs
from burnish.training.metrics import means_by_name, means_over_ranks, with_logged
from burnish.training.reference import Reference, check_reference, check_untrained, refuse_shared_weights
from burnish.training.reward_funcs import as_rubric, penalise_overlong
from burnish.training.rollout_state import RolloutState
from burnish.training.sampler_check import SamplerCheck, default_bound
from burnish.training.sampling import sampling_params
from burnish.training.stage import Run, Stage
from burnish.training.step import Loss, Step, read_groups
from burnish.training.transcripts import TranscriptLog
from burnish.types import Completion, Group, PackedBatch

__all__ = ["OnlineStage"]

logger = logging.getLogger(__name__)

_SINGLE_TURNS = Agents()


class OnlineStage(Stage):
    """Sample, score, train: optimizer steps take turns on a rollout of P prompts with G completions each.

    Args:
        args: the trainer's config.
        tokenizer: the model's tokenizer.
        algorithm: computes advantages and the loss.
        reward_funcs: a `Rubric`, functions, or reward models.
        reward_processing_classes: tokenizers of reward models; None for their own.
        engine: samples completions; None for the native engine, or vLLM with `use_vllm`.
        ref_model: the reference of the KL term; None for the initial policy (adapters off, or a frozen copy).
        compute_metrics: function from the sampled and scored groups of an evaluation to metrics by name.
        agents: tools and environments of episodes.
    """

    columns = "a `prompt` column"
    token_phases = ("sampling", "scoring", "update")

    def __init__(
        self,
        args: Any,
        tokenizer: PreTrainedTokenizerBase,
        algorithm: Algorithm,
        reward_funcs: Any,
        *,
        reward_processing_classes: Any = None,
        engine: Engine | None = None,
        ref_model: Any = None,
        compute_metrics: Callable[[Sequence[Group]], Mapping[str, float]] | None = None,
        agents: Agents = _SINGLE_TURNS,
    ) -> None:
        super().__init__(args, tokenizer)
        check_reference(ref_model)
        if ref_model is not None and not args.beta > 0:
            raise ConfigError("beta = 0.0 does not use a reference: remove ref_model, or set beta.")
        if engine is not None and args.use_vllm:
            raise ConfigError("use_vllm = True with an engine: remove one of the two.")
        if engine is not None and args.stop_settled and not getattr(engine, "stops_settled", False):
            raise ConfigError(
                f"stop_settled = True with {type(engine).__name__}, which does not heed Request.is_settled: remove one "
                "of the two."
            )
        for name, own in (
            ("compile_rollouts", "compile_forward"),
            ("rollout_cache_gib", "max_cache_tokens"),
            ("rollout_cache_dtype", "cache_dtype"),
        ):
            if engine is not None and getattr(args, name):
                raise ConfigError(
                    f"{name} = {getattr(args, name)!r} with an engine: it is for the one that the trainer makes; give "
                    f"NativeEngine {own}, and remove {name}."
                )
        if args.compile_rollouts:
            check_compiler(args.device.type)
        if args.staleness_bound:
            _check_overlap(args, engine)
        self.algorithm = algorithm
        self.whole_groups = algorithm.whole_groups
        self._agents = agents
        self.environments = agents.environments(args, tokenizer)
        self.rubric = as_rubric(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            environments=() if self.environments is None else self.environments.rewarding,
        )
        self.settled = SettledRule(self.rubric) if args.stop_settled else None
        self.reference: Reference | None = None
        self._engine, self._ref_model, self.compute_metrics = engine, ref_model, compute_metrics
        self._pool: ServerPool | None = None
        self._buffer: list[list[Group]] = []
        """This rank's groups of the remaining steps of the last rollout."""
        self._rollouts = 0
        self._assessment = UNKNOWN
        """Assessment of the rollout that feeds the current steps; unknown after resuming in the middle of one."""

    def rollout_step(self) -> list[list[Group]]:
        """Sample completions, score them, and assign advantages.

        Returns:
            This rank's groups of each optimizer step on the rollout, with their streams.
        """
        run, args, level = self.run, self.args, self.sampler.source.level
        with run.phases.phase("sync"):
            run.metrics.add_all(self.sampler.engine.sync(run.state.global_step) or {})
        shards, sampled = self.sampler.sample()
        self.sampler.rest()
        groups = [shard.group for shard in shards]
        if args.overlong_buffer is not None and (penalties := penalise_overlong(groups, args)):
            run.metrics.add("rewards/overlong/mean", fmean(penalties))

        steps = partition(groups, self.steps_per_pass, whole=self.whole_groups)
        # The first step on fresh samples is on-policy: its old log-probabilities are the current ones.
        later = [group for step in steps[1:] for group in step]
        later += [group for group in steps[0] if self.algorithm.needs_old_logprobs(group)]
        self.fill_logprobs(groups, old=groups if self.algorithm.passes > 1 else later)
        run.metrics.add_all(self.algorithm.assign_advantages(shards))

        self._assessment = self._assess(shards, moved=self.sampler.source.level != level)
        self.transcripts.write(sampled, trained=shards, step=run.state.global_step + 1, tokenizer=self.tokenizer)
        self._rollouts += 1
        return steps * self.algorithm.passes

    def next_step(self, batches: Iterator[list[Any]], num_batches: int) -> Step | None:
        """Return the next step of the rollout; collect a new one when it is used up."""
        if read_groups(batches, num_batches) is None:
            return None
        is_fresh = not self._buffer
        if is_fresh:
            self._buffer = self.rollout_step()
        groups = self._buffer.pop(0)
        step = self.algorithm.begin_step(groups, is_on_policy=is_fresh)
        if step.assessment is not None:
            return step
        steps = self.steps_per_pass * self.algorithm.passes
        is_repeated = steps - len(self._buffer) > self.steps_per_pass
        # Later passes over the same samples add no evidence.
        is_known = self._assessment.kind != "learning" and is_repeated
        return dataclasses.replace(step, assessment=UNKNOWN if is_known else self._assessment)

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the algorithm's loss; compare trainer and sampler on fresh samples first."""
        is_scored = batch.num_scored_tokens > 0
        needs_entropy = is_scored and self.algorithm.needs_entropy
        trains_entropy = needs_entropy and self.algorithm.differentiates_entropy(step)
        entropy = {"with_entropy": needs_entropy, "entropy_gradient": trains_entropy}
        scores = score(model, batch, temperature=self.args.temperature, **entropy)
        if step.is_on_policy and is_scored:
            self._compare(batch, scores.logprobs.detach())
        return self.algorithm.loss(scores, batch, step)

    def _compare(self, batch: PackedBatch, logprobs_N: torch.Tensor) -> None:
        """Record the mismatch of trainer and sampler; before the first update, check the reference too."""
        if (sampled_N := batch.token.get("policy_logprobs")) is None:  # all samples are replayed
            return
        fresh_N = ~sampled_N.isnan()
        if (version_N := batch.token.get("policy_version")) is not None:
            fresh_N &= version_N.isnan() | (version_N == self.run.state.global_step)
        self.sampler_check.add(logprobs_N, sampled_N, fresh_N)
        if self.reference is not None and self.reference.is_initial_policy and self.run.is_untouched:
            bound = max(default_bound(self.run.model.dtype), self.args.logprob_check_bound or 0.0)
            check_untrained(logprobs_N[fresh_N], batch.token["ref_logprobs"][fresh_N], bound=bound)

    def before_update(self) -> None:
        """Check the mismatch of sampler and trainer on fresh samples, and end the algorithm's step."""
        run = self.run
        run.metrics.add_all(self.sampler_check.flush(run.state.global_step, run.ranks.sum, run.ranks.max))
        run.metrics.add_all(self.algorithm.end_step())

    @torch.no_grad()
    def fill_logprobs(self, groups: Sequence[Group], *, old: Sequence[Group]) -> None:
        """Write the streams `old_logprobs` and `ref_logprobs`, which the loss and the advantages use.

        Args:
            groups: groups to score with the reference, if there is one.
            old: groups to score with the current policy, unless an earlier one has scored them.
        """
        model, fresh = self.run.model, [g for g in old if all("old_logprobs" not in c.token for c in g.completions)]
        with self.run.phases.phase("scoring"), eval_mode(model):
            self._fill("old_logprobs", fresh, model)
            if self.reference is not None:
                with self.reference.active(model) as reference:
                    self._fill("ref_logprobs", groups, reference)

    def _fill(self, name: str, groups: Sequence[Group], model: torch.nn.Module) -> None:
        self.run.phases.add_tokens("scoring", sum(group.num_tokens for group in groups))
        for part, batch in self.scored_parts(groups, model):
            fill_logprobs(part, batch, name, model, temperature=self.args.temperature, step=self.run.state.global_step)

    def _assess(self, shards: Sequence[Shard], *, moved: bool) -> Assessment:
        """Assess the rewards of a rollout; those of a curriculum that has just `moved` are not comparable."""

        def outcome(completion: Completion) -> Outcome:
            rewards = self.algorithm.reward_components(completion)
            return Outcome(rewards, is_masked=rewards is not None and not self.algorithm.in_loss(completion))

        assessment = assess_rollout(
            shards,
            rubric=self.rubric,
            outcome=outcome,
            gathered=self.run.ranks.gathered,
            compared=self.algorithm.compared,
            max_completion_length=self.args.max_completion_length,
            is_first=self._rollouts == 0,
        )
        if assessment.kind != "constant_reward":
            return assessment
        if moved:
            return UNKNOWN
        return dataclasses.replace(assessment, stops=not self.algorithm.learns_without_rewards())

    @property
    def steps_per_pass(self) -> int:
        """Number of optimizer steps of one pass over a rollout."""
        args = self.args
        rollout = micro_batches_per_rollout(args.steps_per_generation, args.gradient_accumulation_steps)
        return rollout // args.gradient_accumulation_steps

    @property
    def uses_dropout(self) -> bool:
        """Always False: samples are drawn without dropout."""
        return False

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode prompts, with the columns that rewards use."""
        rows = finite_rows(dataset, name)
        if self.environments is not None:
            with errors_of(name):
                rows = [self.environments.prepared(row) for row in rows]
        groups = encode_rows(
            prompt_group,
            rows,
            self.tokenizer,
            stats=stats,
            name=name,
            max_prompt_length=self.args.max_prompt_length,
            chat_template_kwargs=self.args.chat_template_kwargs,
        )
        with errors_of(name):
            self.rubric.check_columns(groups)
        return groups

    def training_set(self, dataset: Any) -> list[Group]:
        """Encode the training prompts and create their source."""
        args, prompts = self.args, self.encode(dataset, "train_dataset")
        if len(prompts) < prompts_per_rollout(args):
            raise DataError(
                f"train_dataset: {len(prompts)} prompts are fewer than the {prompts_per_rollout(args)} of one "
                "rollout. Add prompts, or lower per_device_train_batch_size or steps_per_generation."
            )
        order = args.prompt_sampling if args.shuffle_dataset else "given"
        self._source = PromptSource(prompts, seed=args.seed, order=order, target=args.curriculum_target)
        return prompts

    def train_dataloader(self, batch_size: int) -> DataLoader[Any]:
        """Return a dataloader of placeholders, one per completion of an epoch; rollouts supply the data."""
        numbers: Any = list(range(len(self._source.prompts) * self.args.num_generations * self.algorithm.passes))
        # Each rank reads its shard to count steps and epochs; the values are discarded.
        shard = numbers[: len(numbers) // self.run.ranks.count]
        return DataLoader(shard, batch_size, sampler=SequentialSampler(shard), collate_fn=list, drop_last=True)

    def join(self, run: Run) -> None:
        """Create the reference, sampler, transcripts and sampler check from the loaded policy."""
        super().join(run)
        args = self.args
        self.reference = Reference.of(run.model, self._ref_model) if args.beta > 0 else None
        if self._ref_model is not None:
            check_vocabulary(self._ref_model, self._source.prompts, "ref_model on train_dataset")
            self.check_sampled_lengths(self._ref_model)
        self.check_sampled_lengths(run.model)
        for criterion in self.rubric.criteria:
            if isinstance(criterion.function, RewardModel):
                refuse_shared_weights(run.model, criterion.function.model, f"reward model {criterion.name!r}")
        params = sampling_params(args, causal_lm(run.model), self.tokenizer)
        engine = self._agents.playing(self._chosen_engine(run), self.environments, run.model, self.tokenizer, params)
        self.sampler = Sampler(self, source=self._source, engine=engine, params=params)
        shared: dict[str, Any] = {"is_main": run.ranks.is_first, "gathered": run.ranks.gathered}
        self.transcripts = TranscriptLog(args, **shared)
        self.eval_transcripts = TranscriptLog(args, **shared, name="eval_transcripts.jsonl")
        bound = default_bound(run.model.dtype, cache_dtype=args.rollout_cache_dtype)
        self.sampler_check = SamplerCheck(args.logprob_check_bound or bound)
        if self._tolerates_mismatch:
            self.sampler_check.report_only()
        self.algorithm.join(self)

    def load(self, model: Any) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """Load the model, once the servers that will sample from it have been found and checked."""
        if self.args.use_vllm and self.args.vllm_mode == "server":
            args = self.args
            check_transport(args.vllm_weight_transfer)
            # At temperature 1 the model's own log-probabilities serve too; of stale samples under truncation only they.
            needs_own = args.staleness_bound and args.samples_part
            modes = ("processed",) if args.temperature != 1 else ("raw",) if needs_own else ("processed", "raw")
            self._pool = ServerPool.connected(args.server_urls, self.tokenizer, args.vllm_server_timeout, modes)
        return super().load(model)

    def _chosen_engine(self, run: Run) -> Engine:
        args = self.args
        if self._engine is not None:
            return self._engine
        if not args.use_vllm:
            return self._native_engine(run)
        bound = args.logprob_check_bound or default_bound(run.model.dtype)
        shared: dict[str, Any] = {
            # A loss that corrects the mismatch tolerates more of it, but never other weights.
            "bound": max(bound, 0.05) if self._tolerates_mismatch else bound,
            "weights_dir": args.vllm_weights_dir,
        }
        if self._pool is not None:
            pool, ranks, device = self._pool, run.ranks, causal_lm(run.model).device
            by: dict[str, Any] = {"ranks": ranks.count, "overlaps": args.staleness_bound > 0}
            shared["transport"] = ranks.agreed(
                lambda: choose_transport(args.vllm_weight_transfer, device, pool.servers, **by)
            )
            shared |= {"agreed": ranks.agreed, "gathered": ranks.gathered}
            return VLLMServerEngine(run.model, self.tokenizer, pool, **shared)
        micro_batches = micro_batches_per_rollout(args.steps_per_generation, args.gradient_accumulation_steps)
        options = EmbeddedOptions(
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            max_model_length=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            max_sequences=min(256, args.per_device_train_batch_size * micro_batches * args.vllm_tensor_parallel_size),
        )
        llm = EmbeddedLLM(run.model, self.tokenizer, options, processes=run.ranks.count)
        return VLLMColocatedEngine(
            run.model, self.tokenizer, llm, rank=run.ranks.index, gathered=run.ranks.gathered, **shared
        )

    def _native_engine(self, run: Run) -> Engine:
        args, bound = self.args, None
        held: dict[str, Any] = {"cache_dtype": args.rollout_cache_dtype}
        if args.rollout_cache_gib is not None:
            sets = [self._source.prompts, *run.eval_sets.values()]
            longest = max(len(group.prompt_ids) for groups in sets for group in groups)
            completion = args.max_completion_length
            bound = cache_tokens(run.model, args.rollout_cache_gib, prompt=longest, completion=completion, **held)
        compiles: bool | Literal["unfused"] = bool(args.compile_rollouts)
        if args.compile_rollouts is None:
            forwards = self._most_rollouts * args.max_completion_length
            compiles = "unfused" if compiling_pays(causal_lm(run.model), forwards) else False
        return make_engine(run.model, self.tokenizer, max_cache_tokens=bound, compile_forward=compiles, **held)

    @property
    def _most_rollouts(self) -> float:
        """Number of rollouts of a run from its start to its end."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps / (self.steps_per_pass * self.algorithm.passes)
        return args.num_train_epochs * len(self._source.prompts) / prompts_per_rollout(args)

    @property
    def _tolerates_mismatch(self) -> bool:
        """Whether the user has asked for weights that correct a mismatch of sampler and trainer."""
        return self.algorithm.corrects_sampling and self.args.sampling_correction is not None

    def check_sampled_lengths(self, model: Any) -> None:
        """Refuse prompts whose completions may exceed a model's positions."""
        sets = {"train_dataset": self._source.prompts}
        sets |= {name.replace("eval", "eval_dataset", 1): groups for name, groups in self.run.eval_sets.items()}
        fix, more = "lower max_completion_length or max_prompt_length", self.args.max_completion_length
        for name, groups in sets.items():
            check_lengths(causal_lm(model), groups, name, fix, more=more)

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return the callback that truncates transcripts to the step at which a run starts."""
        return [RecordsCallback(self.transcripts.records, self.eval_transcripts.records)]

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Sample on evaluation prompts; compute the loss, the mean reward and each criterion."""
        args, run, names = self.args, self.run, self.rubric.names
        number = args.num_generations_eval or args.num_generations
        positions = range(run.ranks.index, len(groups), run.ranks.count)
        shards = [empty_shard(groups[p], p, number=number) for p in positions]
        self.sampler.engine.sync(run.state.global_step)
        self.sampler.generate(shards, seed=args.seed + 1, step=0)
        self.sampler.rest()
        logged = self.sampler.score([shard.group for shard in shards])
        step = run.state.global_step
        self.eval_transcripts.write(shards, step=step, tokenizer=self.tokenizer, time=time.time(), split=split)
        completions = [completion for shard in shards for completion in shard.group.completions]
        metrics = means_over_ranks(completions, names, run.ranks.sum)
        if self.compute_metrics is not None:
            with user_code("compute_metrics"):
                own = self.compute_metrics(list(whole_groups(run.ranks.gathered(shards)).values()))
            metrics |= {name: float(value) for name, value in own.items()}
        return with_logged({"loss": self._held_out_loss(shards), **metrics}, means_by_name(logged))

    def _held_out_loss(self, shards: Sequence[Shard]) -> float:
        """Compute the loss of evaluation samples with their advantages; adaptive coefficients are left unchanged."""
        groups, model, state = [shard.group for shard in shards], self.run.model, self.algorithm.state_dict()
        try:
            self.fill_logprobs(groups, old=[group for group in groups if self.algorithm.needs_old_logprobs(group)])
            self.algorithm.assign_advantages(shards)
            step = self.algorithm.step(groups)
            parts = self.scored_parts(step.groups, model, whole=self.whole_groups)
            return self.run.ranks.sum(sum(float(self.loss(model, batch, step).value) for _, batch in parts))
        finally:
            self.algorithm.load_state_dict(state)

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Name the metrics of `evaluate`; None if a function of the user's adds some."""
        if self.compute_metrics is not None or self.rubric.logs_metrics:
            return None
        criteria = (f"rewards/{name}/mean" for name in self.rubric.names)
        return ("loss", "reward", "completions/mean_length", *criteria)

    def save_state(self, folder: Path) -> None:
        """Save the position in the data, the samples in flight, and the algorithm's state."""
        state = RolloutState(
            rollouts=self._rollouts,
            rounds=self.sampler.rounds,
            position=self.sampler.position,
            level=self.sampler.source.level,
            buffer=self._buffer,
            replay=self.sampler.replay.groups,
            algorithm=self.algorithm.state_dict(),
            lengths=self.sampler.lengths,
        )
        state.save(folder, self.run.ranks.index)
        if self.run.ranks.is_first:
            self.algorithm.save_state(folder)

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Restore the position in the data, the samples in flight, and the algorithm's state."""
        ranks, sampler = self.run.ranks, self.sampler
        state = RolloutState.load(folder, rank=ranks.index, world=ranks.count, prompts=sampler.source.prompts)
        self._rollouts, sampler.rounds = state.rollouts, state.rounds
        sampler.position, sampler.source.level = state.position, state.level
        self._buffer, sampler.replay.groups, sampler.lengths = state.buffer, state.replay, state.lengths
        self.algorithm.load_state_dict(state.algorithm)
        self.algorithm.load_state(folder, changed)

    def save_beside(self, folder: Path) -> None:
        """Save models delivered beside the policy."""
        self.algorithm.save_beside(folder)

    def reward_names(self) -> Sequence[str]:
        """Return the names of the criteria."""
        return self.rubric.names

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return a separate reference, reward models, and other models that train."""
        named = {f"reward {criterion.name}": criterion.function for criterion in self.rubric.criteria}
        rewards = {name: function.model for name, function in named.items() if isinstance(function, RewardModel)}
        reference = {} if self.reference is None else self.reference.given_models()
        return {**rewards, **reference, **self.algorithm.trained_models()}

    def other_trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the other models that train."""
        return self.algorithm.trained_models()


def _check_overlap(args: Any, engine: Engine | None) -> None:
    """Refuse engines that cannot sample while the trainer trains."""
    shown = f"max_staleness = {args.staleness_bound}"
    if not ((args.use_vllm and args.vllm_mode == "server") or isinstance(engine, OverlappingEngine)):
        name = "vLLM" if args.use_vllm else "the native engine" if engine is None else type(engine).__name__
        raise ConfigError(
            f"{shown}: {name} samples in the trainer's process with the weights that change; with use_vllm, "
            'set vllm_mode = "server" and start one with `burnish serve MODEL`, or leave it out.'
        )
