"""Base of all stages: plain objects that provide the groups of each optimizer step and their loss."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from burnish.data import EncodeStats
from burnish.model.loading import load_model
from burnish.model.packing import pack, split_by_tokens
from burnish.model.scoring import continuing, prepare_for_scoring
from burnish.training.checks import refuse_router_loss
from burnish.training.learning_signal import LearningMonitor
from burnish.training.metrics import StepMetrics
from burnish.training.phases import Phases
from burnish.training.ranks import Ranks
from burnish.training.step import Loss, Step
from burnish.types import Group, PackedBatch

__all__ = ["Run", "Stage"]


class Run(Protocol):
    """The parts of a `Learner` that a stage may use."""

    model: Any
    state: TrainerState
    ranks: Ranks
    metrics: StepMetrics
    phases: Phases
    learning_monitor: LearningMonitor
    num_tokens: int
    """Tokens that this process has trained on so far."""

    @property
    def is_untouched(self) -> bool:
        """Whether no step has changed the model yet."""
        ...

    @property
    def lr_factor(self) -> float:
        """Learning rate of this step over the peak learning rate."""
        ...

    @property
    def eval_sets(self) -> Mapping[str, list[Group]]:
        """Evaluation sets by the prefix of their metrics."""
        ...

    def keeps_prompts(self, model: torch.nn.Module) -> bool:
        """Return whether pieces of a group share keys and values of its prompt in passes of a model."""
        ...


class Stage:
    """A training stage.

    A stage is created before any weight is loaded (`encode`, `load`, `prepare`), joins a run once the model is loaded
    (`join`), and then provides one `Step` after another and the loss of each packed part.

    Args:
        args: the trainer's config.
        tokenizer: the model's tokenizer.
    """

    columns: ClassVar[str]
    """Columns of the training rows, for messages."""

    whole_groups: bool = False
    """True if the loss couples the completions of a group, so that no split may separate them."""

    token_phases: ClassVar[Sequence[str]] = ("update",)
    """Phases whose tokens are logged."""

    run: Run

    def __init__(self, args: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args = args
        self.tokenizer = tokenizer

    @property
    def uses_dropout(self) -> bool:
        """Whether the model's dropout stays on during training."""
        return not self.args.disable_dropout

    def encode(self, dataset: Any, name: str, stats: EncodeStats | None = None) -> list[Group]:
        """Encode rows and add to `stats`; `name` is for messages."""
        raise NotImplementedError

    def training_set(self, dataset: Any) -> Any:
        """Encode the training rows into a list of groups, or a stream of them."""
        return self.encode(dataset, "train_dataset")

    def load(self, model: Any) -> tuple[Any, dict[torch.nn.Parameter, torch.Tensor]]:
        """Load the model without new adapters, and the fp32 values of parameters that were rounded."""
        return load_model(model, bf16=bool(self.args.bf16), init_kwargs=self.args.model_init_kwargs)

    def prepare(self, model: torch.nn.Module) -> None:
        """Prepare the forward of the loaded model, adapters included, for `loss`."""
        refuse_router_loss(model)
        prepare_for_scoring(model)

    def join(self, run: Run) -> None:
        """Build what depends on the model: a reference, an engine, a critic."""
        self.run = run

    def callbacks(self) -> Sequence[TrainerCallback]:
        """Return the stage's callbacks; called once, after `join`."""
        return ()

    def train_dataloader(self, batch_size: int) -> DataLoader[Any] | None:
        """Return the dataloader that `next_step` reads; None for that of transformers."""
        return None

    def begin_training(self) -> None:
        """Prepare for the first step of a new or resumed run."""

    def end_training(self) -> None:
        """Report on a run after its last step."""

    def next_step(self, batches: Iterator[list[Group]], num_batches: int) -> Step | None:
        """Return this rank's next optimizer step, or None at the end of the data."""
        raise NotImplementedError

    def parts(self, groups: Sequence[Group], *, keep_prompts: bool = False) -> list[list[Group]]:
        """Split groups into parts within `token_budget`; those that share a kept prompt come first."""
        budget, whole = self.args.token_budget, self.whole_groups
        return split_by_tokens(groups, budget, whole=whole, keep_prompts=keep_prompts)

    def scored_parts(
        self, groups: Sequence[Group], model: torch.nn.Module, *, whole: bool = False
    ) -> Iterator[tuple[list[Group], PackedBatch]]:
        """Split and pack groups for passes of a model without gradients; the prompt of a group that is cut runs once.

        Args:
            groups: this rank's groups.
            model: runs on each part before the next is asked for.
            whole: do not cut groups, for values that couple their completions.

        Yields:
            Each part with its packed row, on the device. The keys and values of a kept prompt live until its last part
            is done.
        """
        keeps = self.run.keeps_prompts(model)
        for part in split_by_tokens(groups, self.args.token_budget, whole=whole, keep_prompts=keeps):
            batch = self.pack(part).to(self.args.device)
            with continuing(model, batch):
                yield part, batch

    def pack(self, groups: Sequence[Group]) -> PackedBatch:
        """Pack groups into one row, with the tensors that `loss` uses."""
        return pack(groups)

    def loss(self, model: torch.nn.Module, batch: PackedBatch, step: Step) -> Loss:
        """Compute the contribution of a packed part to the step's loss."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Check a step whose gradients are complete, before its update.

        Raises:
            CheckFailed: the update must not be taken.
        """

    def step_metrics(self) -> dict[str, float]:
        """Return the metrics since the last log over all ranks, and reset them."""
        return self.run.metrics.flush(self.run.ranks.gathered)

    def evaluate(self, groups: Sequence[Group], split: str) -> dict[str, float]:
        """Compute the loss and metrics of evaluation groups.

        Args:
            groups: groups of all ranks; each computes its shard, and all return the same.
            split: prefix of the metrics, such as "eval".
        """
        raise NotImplementedError

    def own(self, groups: Sequence[Group]) -> list[Group]:
        """Return this rank's shard of evaluation groups."""
        return list(groups[self.run.ranks.index :: self.run.ranks.count])

    def held_out_parts(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Split this rank's evaluation groups into batches, and those into parts within `token_budget`."""
        own, size = self.own(groups), self.args.per_device_eval_batch_size
        for first in range(0, len(own), size):
            yield from self.parts(own[first : first + size])

    def evaluation_names(self, groups: Sequence[Group]) -> Collection[str] | None:
        """Name the metrics of an evaluation of these groups; None if they are not known."""
        return None

    def metrics_state(self) -> dict[str, Any]:
        """Return metrics since the last log that are not in `run.metrics`, as JSON."""
        return {}

    def load_metrics_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `metrics_state` returned."""

    def save_state(self, folder: Path) -> None:
        """Save this rank's state of the stage into a checkpoint."""

    def load_state(self, folder: Path, changed: Mapping[str, Any]) -> None:
        """Load what `save_state` saved; the settings in `changed` take precedence."""

    def save_beside(self, folder: Path) -> None:
        """Save models delivered beside the trained one."""

    def other_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the other models that the loss depends on, by argument."""
        return {}

    def other_trained_models(self) -> Mapping[str, torch.nn.Module]:
        """Return the other models that train, by their name in messages."""
        return {}

    def reward_names(self) -> Sequence[str]:
        """Return the names of the reward criteria."""
        return ()
