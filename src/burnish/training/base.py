"""What every trainer shares: groups in, packed micro-batches, token-budgeted backward, exact denominators, masters."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
import transformers
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from burnish.errors import CheckFailed, ConfigError
from burnish.model.adapters import add_adapters, saving_adapters
from burnish.model.finite import check_finite
from burnish.model.loading import load_model
from burnish.model.masters import MasterWeights, over_masters
from burnish.model.packing import pack, partition, split_by_tokens, zero_weight_group
from burnish.model.scoring import prepare_for_scoring
from burnish.training.arguments import check_constructor, check_parts
from burnish.training.batches import MicroBatch, collate, scored_tokens
from burnish.training.callbacks import MetricsCallback, ProgressCallback
from burnish.training.cards import CardWriter, keeping_card
from burnish.training.checkpoint import RunCheckpoints, check_weights, keeping_dtypes, reading, writing_checkpoint
from burnish.training.checks import check_loaded, check_run, refuse_router_loss, use_non_reentrant_checkpointing
from burnish.training.handover import handed_over
from burnish.training.held_out import TIMINGS, check_best_metric, evaluate_steered, own_set
from burnish.training.liveness import Liveness, Verdict
from burnish.training.log_state import LogState
from burnish.training.metrics import StepMetrics
from burnish.training.optimizers import check_optimizer, masters_by_config
from burnish.training.processes import agreed, claimed_folder
from burnish.training.signals import stopping_on_signals
from burnish.training.status import recorded_status
from burnish.types import Group, PackedBatch

__all__ = [
    "GroupTrainer",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GroupTrainer(Trainer):
    """A `transformers.Trainer` over groups.

    Subclasses give `step_groups` (this rank's groups of one optimizer step), `pack_groups` and `batch_loss`; this class
    turns them into exactly as many micro-batches as the Trainer counts, splits those by `token_budget`, and keeps the
    gradient independent of either split.
    """

    args: Any
    model: Any
    tokenizer: PreTrainedTokenizerBase
    timings: ClassVar[Collection[str]] = TIMINGS
    whole_groups: ClassVar[bool] = False
    """Whether the completions of a group meet in one loss, so that no split may separate them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the names of the arguments, which Python would refuse without saying what to do."""
        check_constructor(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: Any,
        *,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Any,
        eval_dataset: Any,
        peft_config: Any,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[torch.optim.Optimizer | None, Any],
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        check_run(model, args, train_dataset, peft_config)
        check_parts(
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            args=args,
            eval_dataset=eval_dataset,
        )
        self.tokenizer = processing_class
        loaded, self._exact = self.load(model, args)
        self.checkpoints = RunCheckpoints(self, loaded)
        if peft_config is not None:
            loaded, self._exact = add_adapters(loaded, peft_config, seed=args.seed)
        check_loaded(loaded, train_dataset=train_dataset, eval_dataset=eval_dataset)
        check_optimizer(optimizers[0], loaded)
        use_non_reentrant_checkpointing(args)
        self.prepare_model(loaded)
        self._metrics = StepMetrics()
        self.liveness = Liveness(args.max_dead_steps)
        self.is_untrained = True
        """Whether this trainer has not changed the model yet; `state.global_step` starts anew with every train()."""
        self.num_tokens = 0
        """This process's share of the tokens trained on so far; a resumed run's first process has those before."""
        super().__init__(
            model=loaded,
            args=args,
            data_collator=cast(Any, collate),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        for shown in (transformers.ProgressCallback, transformers.PrinterCallback):
            self.remove_callback(shown)
        if args.progress and not args.disable_tqdm:
            self.add_callback(ProgressCallback(args.kind))
        self._card = CardWriter(self)
        self.log_state = LogState(self)
        self.add_callback(self.log_state)
        self.add_callback(MetricsCallback(args))
        self.status = recorded_status(self)
        # The loss is divided by a global count here; both names are needed, since old versions read only the second.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def agreed(self, work: Callable[[], T]) -> T:
        """What the first process finds, on every process; its error too, so that none waits for it."""
        return work() if self.accelerator.num_processes == 1 else agreed(work, self.is_world_process_zero())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint where one is named here or in the configuration.

        Raises:
            ConfigError: there is no such checkpoint, it is of another run, or a new run would mix with an earlier one.
            FileError: another run writes to `output_dir`.
            Interrupted: a signal stopped the run, after a checkpoint was saved.
        """
        check_best_metric(self)
        handing_over = handed_over(self.model, lambda: self.master_weights, dropout=self.uses_dropout)
        with claimed_folder(self), handing_over, self.status.recording(), stopping_on_signals(self):
            checkpoint = self.checkpoints.begin(resume_from_checkpoint)
            self.status.begin("preparing to train")
            self.before_training()
            result = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            self.liveness.end_run()
            return result

    def before_training(self) -> None:
        """Hook: what must be known before the first step of a run, new or resumed."""

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Hook: models beside the trained one that the loss depends on, by argument."""
        return {}

    def reward_names(self) -> Sequence[str]:
        """Hook: what rewards the samples."""
        return ()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # transformers looks at the limit after a step only.
            logger.warning("step %d of max_steps = %d: no step is left", self.state.global_step, self.state.max_steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def uses_dropout(self) -> bool:
        """Whether the model's dropout stays on during training."""
        return True

    def load(
        self, model: str | Path | PreTrainedModel, args: Any
    ) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """The model to train, without adapters, and exact values of the parameters that were rounded."""
        return load_model(model, bf16=bool(args.bf16), init_kwargs=args.model_init_kwargs)

    def prepare_model(self, model: torch.nn.Module) -> None:
        """Teach the loaded model, adapters included, what `batch_loss` asks of its forward."""
        refuse_router_loss(model)
        prepare_for_scoring(model)

    def step_groups(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Group] | None:
        """This rank's groups of one optimizer step, or None when the data ended."""
        batches: list[list[Group]] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        return [group for batch in batches for group in batch] or None

    def pack_groups(self, groups: Sequence[Group]) -> PackedBatch:
        """One packed row with the tensors that `batch_loss` reads."""
        return pack(groups)

    def step_denominator(self, groups: Sequence[Group]) -> float:
        """This rank's share of the loss's denominator: by default its scored tokens."""
        return float(sum(scored_tokens(group) for group in groups))

    def batch_loss(self, model: torch.nn.Module, batch: PackedBatch, *, denominator: float) -> torch.Tensor:
        """This batch's share of the step's loss (shares add up)."""
        raise NotImplementedError

    def prepare_groups(self, groups: Sequence[Group]) -> None:
        """Hook: what the loss needs to know of all of this rank's groups of a step, before they are split."""

    def split(self, groups: Sequence[Group]) -> list[list[Group]]:
        """Groups in parts within `token_budget`."""
        return split_by_tokens(groups, self.args.token_budget, whole=self.whole_groups)

    def trainable_groups(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that have a gradient."""
        return list(groups)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Exactly `num_batches` micro-batches of one optimizer step and the global denominator of its loss."""
        groups = self.step_groups(epoch_iterator, num_batches)
        if groups is None:
            return [], None
        self.count_tokens(groups)
        self.prepare_groups(groups)
        denominator = self.sum_over_ranks(self.step_denominator(groups))
        trainable = self.trainable_groups(groups)
        self.liveness.begin_step(denominator, has_work=self.max_over_ranks(len(trainable)) > 0)
        batches = [self._micro_batch(part) for part in partition(trainable, num_batches, whole=self.whole_groups)]
        return batches, torch.tensor(max(denominator, 1.0), device=device)

    def _micro_batch(self, groups: list[Group]) -> MicroBatch:
        parts = self.split(groups)
        count = int(self.max_over_ranks(len(parts)))
        # Ranks must run the same number of forwards, and a step without work still takes its optimizer step.
        filler = [zero_weight_group(cast(int, self.tokenizer.pad_token_id or 0))]
        parts += [filler] * (max(count, 1) - len(parts))
        return MicroBatch([self.pack_groups(part) for part in parts])

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Backward through each part of a micro-batch; gradients are synchronised with the last part only."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(inputs.parts):
            last = number == len(inputs.parts) - 1
            # Masters average their own fp32 gradients over the ranks, once a step.
            reduces = last and self.master_weights is None
            with contextlib.nullcontext() if reduces else self.accelerator.no_sync(model):
                loss = self.compute_loss(model, part.to(self.args.device), num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.liveness.add_loss(total)
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """A part's share of the loss, times the ranks over which gradients are averaged."""
        assert num_items_in_batch is not None
        loss = self.batch_loss(model, inputs, denominator=float(num_items_in_batch)) * self.data_parallel_size
        return (loss, {}) if return_outputs else loss

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data."""
        return self.accelerator.num_processes // self.get_tp_size()

    def sum_over_ranks(self, value: float) -> float:
        """Sum of a number over all ranks."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.args.device)
        return float(cast(torch.Tensor, self.accelerator.reduce(tensor, reduction="sum"))[0])

    def max_over_ranks(self, value: float) -> float:
        """Largest of a number over all ranks."""
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.args.device)
        return float(cast(torch.Tensor, self.accelerator.gather(tensor)).max())

    def gathered(self, rows: Sequence[T]) -> list[T]:
        """The same of all ranks, in the order of the ranks."""
        return list(cast("list[T]", gather_object(list(rows)) if self.accelerator.num_processes > 1 else rows))

    @property
    def master_weights(self) -> MasterWeights | None:
        """The optimizer that owns fp32 masters, where this run has one."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, MasterWeights) else None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The configured optimizer, over fp32 masters where trained weights are bf16."""
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
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if (masters := self.master_weights) is None:
            return super()._clip_grad_norm(model)
        if self.accelerator.num_processes > 1:
            masters.all_reduce_gradients()
        return masters.clip_gradients(self.args.max_grad_norm or float("inf"))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the complete gradient, checked; transformers calls it once a step, before the optimizer's."""
        self.before_optimizer_step()
        if grad_norm is None and self.master_weights is not None:
            grad_norm = self._clip_grad_norm(model)
        norm = cast(Any, super()._get_grad_norm(model, grad_norm=grad_norm))
        if not math.isfinite(norm):
            raise CheckFailed(
                f"step {self.state.global_step}: the gradient norm is {float(norm)}; the step is not taken. Look for "
                "NaN rewards or logits; a lower learning_rate or a longer warm-up helps where the loss diverged."
            )
        self.liveness.end_step(self.state.global_step + 1, self.verdict(float(norm)))
        self.is_untrained = False
        return norm

    def verdict(self, grad_norm: float) -> Verdict:
        """Hook: whether this step can teach anything; the same on every rank."""
        loss = self.sum_over_ranks(self.liveness.step_loss) / self.accelerator.num_processes
        return self.liveness.judge_step(loss, grad_norm, uniform=self.uniform_loss())

    def uniform_loss(self) -> float | None:
        """Hook: the watched loss of a model that guesses, where there is such a number."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last log of a training step, and `num_tokens`, all tokens trained on so far."""
        if "loss" in logs:
            logs = {**logs, **self.step_metrics(), "num_tokens": self.total_tokens()}
        super().log(logs, start_time)

    def step_metrics(self) -> dict[str, float]:
        """Metrics of the training steps since the last log, over all ranks."""
        return self._metrics.flush(self.gathered)

    def metrics_state(self) -> dict[str, Any]:
        """What `step_metrics` has collected since the last log, as JSON."""
        return {"metrics": self._metrics.state_dict(), "liveness": self.liveness.state_dict()}

    def load_metrics_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `metrics_state` gave."""
        self._metrics.load_state_dict(state["metrics"])
        if "liveness" in state:
            self.liveness.load_state_dict(state["liveness"])

    def count_tokens(self, groups: Sequence[Group]) -> None:
        """Hook: add a step's tokens to `num_tokens`."""
        self.num_tokens += sum(group.num_tokens for group in groups)

    def total_tokens(self) -> float:
        """Tokens trained on so far by all ranks, each prompt counted once for its group."""
        return self.sum_over_ranks(float(self.num_tokens))

    def before_optimizer_step(self) -> None:
        """Hook: gradients of the step are complete, nothing has been updated; run-time checks raise here."""

    def save_own_state(self, folder: Path) -> None:
        """Hook: write this rank's part of a checkpoint that transformers knows nothing of."""

    def saved_models(self) -> dict[str, torch.nn.Module]:
        """Every model that `save_model` or a checkpoint writes, by what messages call it."""
        return {"the model": self.model}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless its weights are not finite; checkpoints begin with this, too.

        Raises:
            CheckFailed: a weight is not finite; nothing is written.
        """
        folder = Path(output_dir or self.args.output_dir)
        with contextlib.ExitStack() as stack:
            if not _internal_call:
                stack.enter_context(self.status.resumed("saving the model"))
                stack.enter_context(self.checkpoints.saving_result(folder))
            for name, model in self.saved_models().items():
                check_finite(model, f"step {self.state.global_step}, {name}", self.max_over_ranks)
            super().save_model(output_dir, _internal_call)
            if not _internal_call:
                self._card.write(folder)

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the model card into `output_dir`, and what is told here into every later one; see `CardWriter`."""
        self._card.tell(model_name=model_name, dataset_name=dataset_name, tags=tags)
        with self.checkpoints.saving_result(folder := Path(self.args.output_dir)):
            self._card.write(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or str(self.args.output_dir)
        with keeping_card(Path(folder)), writing_checkpoint(folder, "the model"), saving_adapters(self.model, folder):
            super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return self.checkpoints.place(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.checkpoints.drafting:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        write = super()._save_checkpoint
        self.checkpoints.save(Path(self._get_output_dir(trial=trial)), lambda: write(model, trial))

    def load_own_state(self, folder: Path) -> None:
        """Hook: read back what `save_own_state` wrote."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load = super()._load_optimizer_and_scheduler
        self.checkpoints.load(Path(checkpoint), lambda: load(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint), keeping_dtypes(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        check_weights(self.model, load_result.missing_keys, load_result.unexpected_keys)

    def encode(self, dataset: Any, name: str) -> list[Group]:
        """The groups of a data set's rows; `name` is for messages."""
        raise NotImplementedError

    def held_out(self, given: Any = None) -> list[Group]:
        """The trainer's own held-out set (None, or its name), or the groups of other rows."""
        own = own_set(self.eval_dataset, given)
        return self.encode(given, "eval_dataset") if own is None else own

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Names of the metrics that `groups` have, without prefix and `timings`; None where they cannot be known."""
        return None

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return evaluate_steered(self, partial(super()._evaluate, *args, **kwargs))

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: predictions would be logits of padded rows.

        Raises:
            ConfigError: always, with what to call instead.
        """
        raise ConfigError(
            "predict(): logits of padded rows do not exist here. Metrics come from evaluate(rows, "
            "metric_key_prefix='test'), texts from `burnish eval` or burnish.rollout, scores from burnish.RewardModel."
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """A plain loader over groups; rows that were not given to the trainer are encoded.

        Raises:
            DataError: there is nothing to evaluate on.
        """
        return self._plain_loader(self.held_out(eval_dataset))

    def _plain_loader(self, dataset: Any) -> DataLoader[Any]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return DataLoader(
            cast(Any, [dataset[i] for i in range(rank, len(dataset), world)]),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=collate,
        )
