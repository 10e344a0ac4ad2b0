"""The online trainer: sample, score, turn rewards into advantages, take policy-gradient steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from burnish.data import as_rows, encode_rows, prompt_group
from burnish.errors import CheckFailed, ConfigError, DataError
from burnish.model.dropout import disable_dropout
from burnish.model.scoring import causal_lm, eval_mode, score
from burnish.objectives.kl import kl_k3
from burnish.packing import pack, partition
from burnish.rewards import Rubric
from burnish.rollout import Engine, Request, SamplingParams, eos_token_ids, make_engine
from burnish.trainers.agreement import Agreement, default_bound
from burnish.trainers.arguments import refuse_arguments, resolve_args, with_quantization
from burnish.trainers.base import GroupTrainer, check_vocabulary, collate, resolve_tokenizer
from burnish.trainers.metrics import criterion_values, total
from burnish.trainers.prompts import PromptSource, Share, share_of
from burnish.trainers.reference import Reference, check_reference
from burnish.trainers.transcripts import TranscriptLog
from burnish.types import Completion, Group, PackedBatch, Score, StopReason

__all__ = ["OnlineTrainer", "RewardFunction"]

logger = logging.getLogger(__name__)


RewardFunction = Callable[..., Any]


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
        reward_processing_classes: None = None,
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
    ) -> None:
        refuse_arguments(
            reward_processing_classes=reward_processing_classes,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        args = with_quantization(resolve_args(args, self.config_class), model, quantization_config, peft_config)
        check_reference(ref_model)
        if ref_model is not None and not args.beta > 0:
            raise ConfigError("beta = 0.0 reads no reference: remove ref_model, or set beta.")
        if train_dataset is None:
            raise DataError("train_dataset = None: pass rows with a `prompt` column.")
        self.rubric = _rubric(reward_funcs, args.reward_weights)
        self.args = args
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
        disable_dropout(self.model)
        self.reference = Reference.of(self.model, ref_model) if args.beta > 0 else None
        if ref_model is not None:
            check_vocabulary(ref_model, self.prompts, "ref_model on train_dataset")
        self.engine = engine if engine is not None else make_engine(self.model, self.tokenizer)
        self.transcripts = TranscriptLog.of(args, self.is_world_process_zero(), args.kind)
        self.params = self._sampling_params()
        self._buffer: list[list[Group]] = []
        self.source = PromptSource(self.prompts, seed=args.seed, shuffle=args.shuffle_dataset)
        self._rollouts = 0
        self._fresh = False
        bound = args.logprob_check_bound
        self.agreement = Agreement(default_bound(self.model.dtype) if bound is None else bound)

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
        shares = self.source.shares(
            self._rollouts,
            num_prompts=self._prompts_per_rollout,
            num_samples=self.args.num_generations,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        groups = [share.group for share in shares]
        self.engine.sync(self.state.global_step)
        self._generate(shares, self.params, seed=self.args.seed, step=self._rollouts)
        sampled = time.perf_counter()
        self.rubric.score(groups)
        scored = time.perf_counter()
        self.judge(shares)
        self._log_rollout(groups)
        with torch.no_grad(), eval_mode(self.model):
            if self._reuse > 1:
                self._fill(groups, "old_logprobs", self.model)
            if self.reference is not None:
                with self.reference.active(self.model) as reference:
                    self._fill(groups, "ref_logprobs", reference)
        self._rollouts += 1
        self._metrics.add("seconds/rollout", sampled - started)
        self._metrics.add("seconds/rewards", scored - sampled)
        self._metrics.add("seconds/reference", time.perf_counter() - scored)
        steps = self._reuse // self.passes
        return partition(groups, steps, whole=self.whole_groups) * self.passes

    def judge(self, shares: Sequence[Share]) -> None:
        """Hook: turn the rewards of a rollout into what the loss reads."""
        self._metrics.add_rewards([[total(c) for c in share.group.completions] for share in shares])

    def _generate(self, shares: Sequence[Share], params: SamplingParams, *, seed: int, step: int) -> None:
        requests = [
            Request(s.group.prompt_ids, len(s.group.completions), params, index=s.group.index, first_sample=s.first)
            for s in shares
        ]
        for share, completions in zip(shares, self.engine.generate(requests, seed=seed, step=step), strict=True):
            share.group.completions = completions

    @torch.no_grad()
    def _fill(self, groups: Sequence[Group], name: str, model: torch.nn.Module) -> None:
        """Write the log-probability of every token under a model into the completions."""
        for part in self.split(groups):
            batch = pack(part).to(self.args.device)
            values = score(model, batch, temperature=self.args.temperature).logprobs.tolist()
            completions = [c for group in part for c in group.completions]
            lengths = [len(c.token_ids) for c in completions]
            for completion, length in zip(completions, lengths, strict=True):
                setattr(completion, name, values[:length])
                values = values[length:]

    def in_loss(self, completion: Completion) -> bool:
        """Whether a completion has a reward, and is not masked as truncated."""
        masked = self.args.mask_truncated_completions and completion.stop_reason is StopReason.LENGTH
        return total(completion) is not None and not masked

    def compare(self, batch: PackedBatch, logprobs_N: torch.Tensor) -> None:
        """Remember how far trainer and sampler are apart; first of all, check the reference."""
        self.agreement.add(logprobs_N, batch.token["policy_logprobs"])
        own_reference = self.reference is not None and self.reference.is_initial_policy
        if own_reference and self.state.global_step == 0:
            apart = float(kl_k3(logprobs_N, batch.token["ref_logprobs"]).mean())
            if not apart <= self.agreement.bound:
                raise CheckFailed(
                    f"before the first update the reference differs from the policy by {apart:.3g} nats a token "
                    f"(bound {self.agreement.bound:g}), so the KL term pulls towards another model. Pass the intended "
                    "ref_model, or the unmodified policy."
                )

    def before_optimizer_step(self) -> None:
        """Stop before the update when sampler and trainer disagree about fresh samples."""
        metrics = self.agreement.flush(self.state.global_step, self.sum_over_ranks, self.max_over_ranks)
        for name, value in metrics.items():
            self._metrics.add(name, value)

    def _log_rollout(self, groups: Sequence[Group]) -> None:
        clipped = self._metrics.add_completions(groups, self.rubric.names)
        failed = [c.score for g in groups for c in g.completions if c.score is not None and c.score.total is None]
        if failed:
            logger.warning("%d completions leave the loss: %s", len(failed), "; ".join(failed[0].errors.values()))
        if clipped > 0.5 and self._rollouts == 0:
            logger.warning(
                "%.0f%% of the completions hit max_completion_length = %d: rewards that look at the end will miss. "
                "Raise it, or shorten what the prompt asks for.",
                100 * clipped,
                self.args.max_completion_length,
            )
        self.transcripts.write(groups, step=self.state.global_step + 1, tokenizer=self.tokenizer)

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
        completions = [c for share in shares for c in share.group.completions]
        rewards = [r for c in completions if (r := total(c)) is not None]
        sums = {"reward": (sum(rewards), len(rewards))}
        for name in self.rubric.names:
            values = criterion_values(completions, name)
            sums[f"rewards/{name}/mean"] = (sum(values), len(values))
        sums["completions/mean_length"] = (sum(len(c.token_ids) for c in completions), len(completions))
        metrics = {
            f"{metric_key_prefix}_{name}": self.sum_over_ranks(value) / max(self.sum_over_ranks(count), 1.0)
            for name, (value, count) in sums.items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_own_state(self, folder: Path) -> None:
        """The rollouts so far and the samples in flight: with the seed, all that decides what comes next."""
        buffer = [[dataclasses.asdict(group) for group in groups] for groups in self._buffer]
        state = {"rollouts": self._rollouts, "buffer": buffer, "rank": self.accelerator.process_index}
        (folder / f"rollout_{self.accelerator.process_index}.json").write_text(json.dumps(state, default=str))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"rollout_{self.accelerator.process_index}.json"
        if not file.is_file():
            raise ConfigError(
                f"resume_from_checkpoint = {checkpoint!r}: {file.name} is missing, so the prompts and samples in "
                "flight are unknown. Resume with as many processes as wrote the checkpoint."
            )
        state = json.loads(file.read_text())
        self._rollouts = int(state["rollouts"])
        self._buffer = [[_group_from_dict(group) for group in groups] for groups in state["buffer"]]
        self.transcripts.truncate_after(self.state.global_step)


def _group_from_dict(values: dict[str, Any]) -> Group:
    completions: list[Completion] = []
    for entry in cast("list[dict[str, Any]]", values["completions"]):
        reason, scores = entry["stop_reason"], entry["score"]
        entry["stop_reason"] = StopReason(reason) if reason else None
        entry["score"] = Score(**scores) if scores else None
        completions.append(Completion(**entry))
    return Group(values["prompt_ids"], completions, values["row"], values["index"])


def _rubric(rewards: Any, weights: Sequence[float] | None) -> Rubric:
    if isinstance(rewards, Rubric):
        if weights is not None:
            raise ConfigError(f"reward_weights = {list(weights)!r} beside a Rubric: set the weights in its criteria.")
        return rewards
    for one in rewards if isinstance(rewards, list | tuple) else (rewards,):
        if isinstance(one, str | PreTrainedModel):
            name = one if isinstance(one, str) else type(one).__name__
            raise ConfigError(
                f"reward_funcs = {name!r}: a reward model is a function here; pass "
                "burnish.RewardModel(model, tokenizer) in its place."
            )
    return Rubric.from_functions(rewards, weights)
