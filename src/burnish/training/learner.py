"""The subclass of `transformers.Trainer` that trains by a stage, with packed micro-batches and exact denominators."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
import transformers
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from burnish.errors import CheckFailed, ConfigError, DataError
from burnish.model.adapters import add_adapters, saving_adapters
from burnish.model.finite import check_finite
from burnish.model.host_embedding import keep_embedding_on_host
from burnish.model.masters import MasterWeights, over_masters
from burnish.model.offload import offloading
from burnish.model.packing import partition, zero_weight_group
from burnish.model.recomputation import tile_mlps
from burnish.model.scoring import continuing, eval_mode, keeps_prompts
from burnish.training.arguments import check_constructor, check_parts
from burnish.training.callbacks import MetricsCallback, ProgressCallback
from burnish.training.cards import CardWriter, keeping_card
from burnish.training.checkpoint import RunCheckpoints, check_weights, keeping_dtypes, reading, writing_checkpoint
from burnish.training.checks import check_loaded, check_run, use_non_reentrant_checkpointing
from burnish.training.evaluation_sets import (
    check_tracked_metric,
    check_tracked_metric_name,
    encode_sets,
    evaluation_set,
    named_row_sets,
    named_sets,
)
from burnish.training.learning_signal import LearningMonitor
from burnish.training.log_state import LogState
from burnish.training.memory_plan import compare_with_plan, plan_memory
from burnish.training.metrics import StepMetrics
from burnish.training.model_state import restoring_model_state
from burnish.training.optimizers import check_optimizer, masters_by_config
from burnish.training.phases import PhaseCallback, Phases
from burnish.training.process_memory import held_memory
from burnish.training.processes import claimed_folder
from burnish.training.ranks import Ranks
from burnish.training.replica import Replica
from burnish.training.signals import stopping_on_signals
from burnish.training.stage import Stage
from burnish.training.status import recorded_status
from burnish.training.step import MicroBatch, Step, collate
from burnish.types import Group

__all__ = ["Learner"]

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Stage)


class Learner(Trainer, Generic[S]):
    """A `transformers.Trainer` that trains by a stage.

    For each optimizer step it asks the stage for a `Step`, packs its groups into exactly as many micro-batches as
    transformers counts, splits those by `token_budget`, and keeps the gradient independent of either split.
    transformers clips, steps, schedules, logs, saves and calls back.

    Args:
        model: path, hub name, package that carries a model, or a model in memory.
        stage: provides the steps and their loss.
        args: the stage's config.
        train_dataset, eval_dataset: rows that the stage encodes.
        peft_config: train these adapters instead of the weights.
        callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`.

    Raises:
        ConfigError, DataError, ModelError: before any weight is loaded where possible.
    """

    args: Any
    model: Any
    stage: S
    config_class: ClassVar[type[Any]]
    stage_class: ClassVar[type[Stage]]

    is_untrained = True
    """True until the first update; `state.global_step` starts at 0 with every train()."""

    num_tokens = 0
    """Tokens that this process has trained on; in a resumed run, the first process adds those of the checkpoint."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the names of the arguments, which Python would refuse without naming the fix."""
        check_constructor(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        stage: S,
        args: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        if train_dataset is None:
            raise DataError(f"train_dataset = None: pass rows with {stage.columns}.")
        self.stage = stage
        training_set = stage.training_set(train_dataset)
        held_out = encode_sets(eval_dataset, stage.encode)
        check_run(model, args, training_set, peft_config)
        check_parts(
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            args=args,
            eval_dataset=held_out,
        )
        self._held_before = held_memory(args.device)
        self._memory_plan = plan_memory(model, args, training_set, peft_config)
        loaded, self._exact = stage.load(model)
        self.checkpoints = RunCheckpoints(self, loaded)
        if peft_config is not None:
            loaded, self._exact = add_adapters(loaded, peft_config, seed=args.seed)
        check_loaded(loaded, train_dataset=training_set, eval_dataset=held_out)
        check_optimizer(optimizers[0], loaded)
        self._prepare(loaded, args)
        super().__init__(
            model=loaded,
            args=args,
            data_collator=cast(Any, collate),
            train_dataset=training_set,
            eval_dataset=cast(Any, held_out),
            processing_class=stage.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.ranks = Ranks(self.accelerator)
        self.metrics = StepMetrics()
        self.phases = Phases()
        self.learning_monitor = LearningMonitor(args.max_dead_steps)
        # The loss is divided by a global count here; transformers 5.17 only has the second name.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.neftune_noise_alpha = None  # transformers would scale the noise by the length of the whole packed row
        self._observe()
        stage.join(self)
        for callback in stage.callbacks():
            self.add_callback(callback)

    def _prepare(self, model: Any, args: Any) -> None:
        """Let the stage prepare the model, then arrange what saves memory."""
        use_non_reentrant_checkpointing(args)
        self.stage.prepare(model)
        tile_mlps(model, args.mlp_tiles)
        if args.embedding_offloading:
            keep_embedding_on_host(model)

    def _observe(self) -> None:
        """Replace the progress callbacks, and add those that record the run."""
        for shown in (transformers.ProgressCallback, transformers.PrinterCallback):
            self.remove_callback(shown)
        if self.args.progress and not self.args.disable_tqdm:
            self.add_callback(ProgressCallback(self.args.kind))
        self._card = CardWriter(self)
        self.log_state = LogState(self)
        self.add_callback(PhaseCallback(self.phases, self._count_tokens))
        self.add_callback(self.log_state)
        self.add_callback(MetricsCallback(self.args))
        self.status = recorded_status(self)

    def _count_tokens(self, tokens: Mapping[str, int]) -> None:
        """Record the tokens of a step by phase, summed over the ranks."""
        for phase in self.stage.token_phases:
            self.metrics.add(f"tokens/{phase}", float(tokens.get(phase, 0) * self.ranks.count))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, by its name in older versions of transformers."""
        return self.stage.tokenizer

    @property
    def is_untouched(self) -> bool:
        """Whether no step has changed the model yet."""
        return self.is_untrained and self.state.global_step == 0

    @property
    def lr_factor(self) -> float:
        """Learning rate of this step over the peak learning rate."""
        peak, scheduler = self.args.learning_rate, cast(Any, self.lr_scheduler)
        return float(scheduler.get_last_lr()[0]) / peak if scheduler is not None and peak else 1.0

    @property
    def eval_sets(self) -> Mapping[str, list[Group]]:
        """Evaluation sets by the prefix of their metrics."""
        return named_sets(self.eval_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is given here or in the configuration.

        Raises:
            ConfigError: there is no such checkpoint, it is of another run, or a new run would mix with an earlier one.
            FileError: another run writes to `output_dir`.
            Interrupted: a signal stopped the run, after a checkpoint was saved.
        """
        check_tracked_metric_name(self)
        restoring = restoring_model_state(self.model, lambda: self.master_weights, dropout=self.stage.uses_dropout)
        with claimed_folder(self), restoring, self.status.recording(), stopping_on_signals(self):
            checkpoint = self.checkpoints.begin(resume_from_checkpoint)
            self.status.begin("preparing to train")
            self.stage.begin_training()
            try:
                result = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finally:
                self.is_in_train = False  # transformers leaves it set where training fails
            compare_with_plan(self._memory_plan, self.args.device, self._held_before)
            self.learning_monitor.end_run()
            self.stage.end_training()
            return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step beyond `max_steps`, which transformers only checks after a step."""
        if self.state.global_step >= self.state.max_steps:
            logger.warning("step %d of max_steps = %d: no step is left", self.state.global_step, self.state.max_steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the stage's dataloader, if it has one."""
        own = self.stage.train_dataloader(self._train_batch_size)
        return super().get_train_dataloader() if own is None else own

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return exactly `num_batches` micro-batches of the next step, and the denominator of its loss."""
        step = self.stage.next_step(epoch_iterator, num_batches)
        if step is None:
            return [], None
        has_work = self.ranks.max(len(step.groups)) > 0
        self.learning_monitor.begin_step(step.count, has_work=has_work, assessment=step.assessment)
        batches = [
            self._micro_batch(groups, step)
            for groups in partition(step.groups, num_batches, whole=self.stage.whole_groups)
        ]
        self.phases.add_tokens("update", sum(group.num_tokens for group in step.groups))
        self.phases.begin("update")
        return batches, torch.tensor(step.denominator, device=device)

    def _micro_batch(self, groups: list[Group], step: Step) -> MicroBatch:
        parts = self.stage.parts(groups, keep_prompts=self.keeps_prompts(self.model))
        filler = [zero_weight_group(int(self.tokenizer.pad_token_id or 0))]
        if self.ranks.count > 1 and parts and parts[-1][0].kept_prompt is not None:
            # The prompt's backward pass ends its group; gradients are synchronised after it.
            parts.append(filler)
        count = int(self.ranks.max(len(parts)))
        # Ranks must run the same number of forwards, and a step without work still runs the optimizer.
        parts += [filler] * (max(count, 1) - len(parts))
        return MicroBatch(step, [self.stage.pack(part) for part in parts])

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run backward through each part of a micro-batch; gradients are synchronised with the last part only."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()
        # DDP averages gradients over the ranks, while the loss is a sum over them.
        scale = self.accelerator.num_processes // self.get_tp_size()
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(inputs.parts):
            last = number == len(inputs.parts) - 1
            # Masters average their own fp32 gradients over the ranks, once a step.
            reduces = last and self.master_weights is None
            offload = offloading(model) if self.args.activation_offloading else contextlib.nullcontext()
            synchronised = contextlib.nullcontext() if reduces else self.accelerator.no_sync(model)
            batch = part.to(self.args.device)
            with synchronised, offload, continuing(model, batch):
                loss = self.stage.loss(model, batch, inputs.step)
                value = loss.value * scale
                self.accelerator.backward(value)
            self.metrics.add_loss(loss, step=self.state.global_step, scale=scale)
            if loss.watched is not None:
                self.learning_monitor.watch(loss.watched * scale)
            total += value.detach()
        self.learning_monitor.add_loss(total)
        return total

    def keeps_prompts(self, model: torch.nn.Module) -> bool:
        """Return whether pieces of a group share keys and values of its prompt in passes of a model."""
        # Sharded weights may not be there when the prompt's backward pass needs them.
        kind, whole = self.accelerator.distributed_type, ("NO", "MULTI_CPU", "MULTI_GPU")
        return kind in whole and self.get_tp_size() == 1 and keeps_prompts(model)

    @property
    def master_weights(self) -> MasterWeights | None:
        """The optimizer that owns fp32 masters, if the run has one."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, MasterWeights) else None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the configured optimizer, over fp32 masters if trained weights are bf16."""
        target = cast(torch.nn.Module, self.model if model is None else model)
        trained = [p for p in target.parameters() if p.requires_grad]
        given = cast("torch.optim.Optimizer | None", self.optimizer)
        if (masters := self.master_weights) is not None:
            masters.attach()
        if masters is not None or all(p.dtype.itemsize >= 4 for p in trained):
            return super().create_optimizer(model)
        if given is not None:
            self.optimizer = over_masters(given, self._exact)
        else:
            named = {name: parameter for name, parameter in target.named_parameters() if parameter.requires_grad}
            decayed = set(self.get_decay_parameter_names(target))
            self.optimizer = masters_by_config(self, named, decayed, self._exact)
        self._exact = {}
        if self.ranks.count > 1:
            # Masters average the gradients, and transformers leaves a model that is wrapped out of DDP and its buckets.
            self.model_wrapped = Replica(self.accelerator.prepare_model(self.model, evaluation_mode=True))
        return self.optimizer

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Clip the gradients of masters and check the step; called once per step, before the optimizer."""
        self.stage.before_update()
        if (masters := self.master_weights) is not None:
            if self.ranks.count > 1:
                masters.all_reduce_gradients()
            grad_norm = masters.clip_gradients(self.args.max_grad_norm or math.inf)
        norm = cast(Any, super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            raise CheckFailed(
                f"step {self.state.global_step}: the gradient norm is {float(norm)}; the step is not taken. Look for "
                "NaN rewards or logits; a lower learning_rate or a longer warm-up helps where the loss diverged."
            )
        monitor = self.learning_monitor
        assessment = monitor.assess_step(float(norm), lambda loss: self.ranks.sum(loss) / self.ranks.count)
        monitor.end_step(self.state.global_step + 1, assessment)
        self.is_untrained = False
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last training log, and `num_tokens`, the tokens trained on so far."""
        if "loss" in logs:
            timed = self.phases.flush(self.ranks.gathered)
            logs = {**logs, **self.stage.step_metrics(), **timed, "num_tokens": self.total_tokens()}
        super().log(logs, start_time)

    def total_tokens(self) -> float:
        """Return the tokens trained on by all ranks so far, each prompt counted once per group."""
        return self.ranks.sum(float(self.num_tokens))

    def held_out(self, given: Any = None) -> list[Group]:
        """Return an evaluation set of the trainer (None, or its name), or encode other rows.

        Raises:
            DataError: there is no evaluation set.
        """
        own = evaluation_set(self.eval_dataset, given)
        return self.stage.encode(given, "eval_dataset") if own is None else own

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the loss and the stage's metrics on evaluation rows; with several sets, each under its name.

        Raises:
            DataError: there is no evaluation set.
            ConfigError: `metric_for_best_model` is missing.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        prefix = metric_key_prefix
        if (sets := named_row_sets(given)) is not None:
            parts = [self.evaluate(rows, ignore_keys, f"{prefix}_{name}") for name, rows in sets.items()]
            metrics = {name: value for part in parts for name, value in part.items()}
        else:
            started, groups = time.time(), self.held_out(given)
            with self.phases.phase("evaluation"), torch.no_grad(), eval_mode(self.model):
                found = self.stage.evaluate(groups, prefix)
            metrics = {f"{prefix}_{name.removeprefix(f'{prefix}_')}": value for name, value in found.items()}
            batches = math.ceil(len(groups) / (self.args.per_device_eval_batch_size * self.ranks.count))
            metrics |= speed_metrics(prefix, started, num_samples=len(groups), num_steps=batches)
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and eval_dataset is None:
            check_tracked_metric(self, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: predictions would be logits of padded rows.

        Raises:
            ConfigError: always, naming what to call instead.
        """
        raise ConfigError(
            "predict(): not supported, as rows are never padded. Metrics come from evaluate(rows, "
            "metric_key_prefix='test'), texts from `burnish eval` or burnish.rollout, scores from burnish.RewardModel."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and the models delivered beside it; for a checkpoint, the model only.

        Raises:
            CheckFailed: a weight is not finite; nothing is written.
        """
        folder = Path(output_dir or self.args.output_dir)
        with contextlib.ExitStack() as stack:
            if not _internal_call:
                stack.enter_context(self.status.resumed("saving the model"))
                stack.enter_context(self.checkpoints.saving_result(folder))
            for name, model in {"the model": self.model, **self.stage.other_trained_models()}.items():
                check_finite(model, f"step {self.state.global_step}, {name}", self.ranks.max)
            with keeping_card(folder), writing_checkpoint(folder, "the model"), saving_adapters(self.model, folder):
                super().save_model(str(folder), _internal_call=True)
            if _internal_call:
                return
            self._card.write(folder)
            if self.ranks.is_first:
                self.stage.save_beside(folder)
            if self.args.push_to_hub:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the model card into `output_dir`; later cards keep these arguments."""
        self._card.tell(model_name=model_name, dataset_name=dataset_name, tags=tags)
        with self.checkpoints.saving_result(folder := Path(self.args.output_dir)):
            self._card.write(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint as a draft, and rename it once it is complete."""
        with self.phases.phase("saving"):
            self.checkpoints.save(Path(self._get_output_dir(trial=trial)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore the stage's state too; changed settings take precedence."""
        if checkpoint is not None:
            load = super()._load_optimizer_and_scheduler
            self.checkpoints.load(Path(checkpoint), lambda: load(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Refuse weights of another model, keep dtypes, and name a damaged checkpoint."""
        with reading(resume_from_checkpoint), keeping_dtypes(self.model):
            check_weights(self.model, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
